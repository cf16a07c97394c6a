"""A run whose numbers are not finite is lost, and is stopped where it was lost."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A loss or a weight is infinite or not a number."""


def check_loss(loss: float | Tensor, step: int, tensors: Iterable[tuple[str, Tensor]] = ()) -> None:
    """Refuse to learn from a loss that is not finite.

    Args:
        loss: of one step.
        step: its number, from 1.
        tensors: by name, that the loss was computed with; the first that is not finite is named.

    Raises:
        NotFiniteError: names the step, and the tensor where one of them is the cause.
    """
    value = loss.detach().item() if isinstance(loss, Tensor) else loss
    if math.isfinite(value):
        return
    name = first_not_finite(tensors)
    cause = f"{name} is not finite" if name else "all weights are finite; lower the learning rate, or check the data"
    raise NotFiniteError(f"The loss of step {step} is {value}: {cause}. The last whole checkpoint is kept.")


def check_weights(tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Refuse weights that are not finite.

    Args:
        tensors: by name.
        step: the step that changed them, from 1.

    Raises:
        NotFiniteError: names the step and the first such tensor.
    """
    held = list(tensors)
    floating = [_local(tensor) for _, tensor in held if tensor.is_floating_point()]
    # One number to look at: a sum of norms is finite unless a weight is not, or all are enormous.
    if not floating or torch.stack([norm.cpu() for norm in torch._foreach_norm(floating)]).sum().isfinite():
        return
    if name := first_not_finite(held):
        raise NotFiniteError(
            f"{name} is not finite after step {step}: training diverged. Lower the learning rate. The last whole "
            "checkpoint is kept."
        )


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with an entry that is infinite or not a number."""
    named = ((name, tensor) for name, tensor in tensors if tensor.is_floating_point())
    return next((name for name, tensor in named if not _local(tensor).isfinite().all()), None)


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
