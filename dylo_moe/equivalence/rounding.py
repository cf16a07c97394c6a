"""How far rounding alone moves what a model computes: the yardstick of "equal" where bits may differ.

Two ways to compute one function differ in the order of their sums. How much of that arrives at the logits depends on
the model: its depth, its norms, the size of its values. A bound from theory that covers every model is so wide that it
hides real faults, so the effect is measured on the model at hand (Monte Carlo arithmetic: Parker 1997, "Monte Carlo
Arithmetic: exploiting randomness in floating-point arithmetic"): each module's output is moved at random by about one
unit in the last place, and the change of the result is read off.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DRAWS = 3
# Results are float32, so that no effect is smaller than this share of them, even where the draws do not show it.
UNIT = torch.finfo(torch.float32).eps
# Sums of thousands of terms round more than once, and the attention between the modules rounds too. Against float32
# arithmetic in another order, what was seen on the models that are tested was at most 4 times the measured effect.
SAFETY = 16


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference of two tensors; infinite where one of them is not a number."""
    difference = (ours.detach().double() - theirs.detach().double()).abs()
    return difference.nan_to_num(nan=torch.inf).max().item()


def rounding_effect(model: nn.Module, run: Callable, measure: Callable = largest_difference) -> float:
    """How much `run()` changes when every module of the model rounds a little otherwise.

    Args:
        model: the model that `run` calls.
        run: computes something with it; its clean result is compared with that of each draw.
        measure: the difference of two results of `run`, a float.

    Returns:
        The median over the draws, so that one draw in which a base model's own router tips over does not count.
    """
    clean, moved = run(), []
    for seed in range(DRAWS):
        with rounding_errors(model, seed):
            moved.append(measure(run(), clean))
    return statistics.median(moved)


@contextmanager
def rounding_errors(model: nn.Module, seed: int) -> Iterator[None]:
    """Move each output of every module that has no children by one machine epsilon of its root mean square."""
    generators: dict[torch.device, torch.Generator] = {}

    def move(module: nn.Module, args: tuple, output):
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(seed)
        size = output.detach().square().mean(dim=-1, keepdim=True).sqrt() * torch.finfo(output.dtype).eps
        noise = torch.randn(
            output.shape, generator=generators[output.device], dtype=output.dtype, device=output.device
        )
        return output + size * noise

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(move) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
