"""Find the first routed layer of a model that does not compute what it should.

Every adapted layer is compared, while the model runs, with the plain float64 loop on the very input it got and the
weights it was given. A layer's fault therefore shows at that layer and not at those behind it, which only get another
input.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dylo_moe.equivalence.loop import expert_update, has_loop, lora_layers

# Of the probabilistic bound on rounding errors, lambda sqrt(n) u in place of n u (Higham and Mary 2019, "A new
# approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5)): the larger lambda, the less likely
# it is exceeded, by the tail of a normal distribution.
LAMBDA = 8.0


@dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """One call of one layer against the loop.

    Args:
        layer: its name in the base model.
        difference: |layer - loop| where it is largest against its tolerance.
        tolerance: what rounding explains at that element.
    """

    layer: str
    difference: float
    tolerance: float

    @property
    def differs(self) -> bool:
        return not self.difference <= self.tolerance

    @property
    def excess(self) -> float:
        """How many times its tolerance the difference is."""
        if self.tolerance == 0:
            return 0.0 if self.difference == 0 else math.inf
        return self.difference / self.tolerance


@torch.no_grad()
def layer_differences(
    model: nn.Module, run: Callable[[], object], *, weights: Tensor | None = None
) -> list[LayerDifference]:
    """Compare every adapted layer with the plain loop while `run` calls the model once.

    Args:
        model: a PEFT model in eval mode.
        run: one forward of it.
        weights: the `routing_weights` that `run` passes; None to read the attached router's own.

    Returns:
        One entry for each layer that ran, in the order in which they ran.
    """
    found: list[LayerDifference] = []
    tuner = model.base_model

    def compare(name: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
        given, names = weights, list(layer.active_adapters)
        if given is None:
            site, names = layer.routing_port.site, tuner.moe_router.expert_names
            made = recorded.get(site)
            # A router of scope "model" has not spoken yet for the layers before its block: they are the base model.
            given = made[-1] if made else torch.zeros(len(names))
        found.append(_compare(name, layer, args[0], output, given, names))

    layers = {name: layer for name, layer in lora_layers(model).items() if has_loop(layer)}
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: compare(name, module, args, output))
        for name, layer in layers.items()
    ]
    try:
        with tuner.record_routing() as recorded:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def first_difference(differences: list[LayerDifference]) -> str:
    """Where a fault lies, in words."""
    wrong = [entry for entry in differences if entry.differs]
    if not wrong:
        return (
            f"all {len(differences)} adapted layers equal the plain loop on their own inputs and weights: the fault "
            "lies between them (weights, masks, cache, backward pass)"
        )
    first = wrong[0]
    return (
        f"first in {first.layer}: differs by {first.difference:.1e} from the plain loop on the same input, rounding "
        f"explains {first.tolerance:.1e} ({len(wrong)} of {len(differences)} layers differ)"
    )


def _compare(name: str, layer: nn.Module, x: Tensor, output: Tensor, weights: Tensor, names: list[str]):
    base = layer.base_layer(x).double()  # the same call the layer made: bit-equal to what it got
    update = expert_update(layer, x, weights, names)
    parameters = [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
    unit = max(torch.finfo(tensor.dtype).eps for tensor in (output, *parameters)) / 2
    tolerance = unit * (
        LAMBDA * update.terms**0.5 * update.magnitude + 4 * (base.abs() + update.value.abs())  # the products; the sum
    )
    difference = (output.double() - (base + update.value)).abs().nan_to_num(nan=torch.inf)
    tolerance = tolerance.expand_as(difference)
    ratio = torch.where(difference > 0, difference / tolerance, 0.0)
    worst = ratio.argmax()
    return LayerDifference(
        layer=name, difference=difference.flatten()[worst].item(), tolerance=tolerance.flatten()[worst].item()
    )
