"""Seconds in turns, the operations that torch counts, and the check of a fast output against a slow one."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.models import Setting
from benchmarks.ways import Run, Way
from dylo_moe.training.throughput import time_in_turns

# Largest difference from the loop over experts, as a share of what the experts add to the logits. float32: the worst
# token, sums in another order. bfloat16 rounds each product to 8 bits, and now and then two experts' scores change
# places with it, which changes that token alone: so the median token.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds of one way's seconds by another's in the same round, and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(seconds: list[float], over: list[float]) -> Ratio:
    """Ratio of each round, then its median and quartiles. Needs at least two rounds."""
    ratios = [mine / other for mine, other in zip(seconds, over, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def measure(actions: dict[str, Callable[[], object]], *, rounds: int) -> list[dict]:
    """Time actions in turns and count the operations of each.

    Returns:
        A row for each action: its name (`way`), `seconds` of every round, `flops` of one call.
    """
    flops = {name: count_flops(action) for name, action in actions.items()}
    seconds = time_in_turns(actions, rounds=rounds)
    return [{"way": name, "seconds": seconds[name], "flops": flops[name]} for name in actions]


def count_flops(action: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of one call, backward included, a multiply-add as two."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
        action()
    return counter.get_total_flops()


def forward_of(run: Run, input_ids: Tensor) -> Callable[[], Tensor]:
    """A forward pass without gradients, to be called again and again."""
    return torch.no_grad()(lambda: run.logits(input_ids))


def step_of(run: Run, input_ids: Tensor, setting: Setting) -> Callable[[], None]:
    """A training step without the optimizer's: forward, loss, backward, gradients made anew."""
    trained = run.parameters()

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        with setting.autocast():
            loss = run.loss(input_ids)
        loss.backward()

    return step


def check_gradients(run: Run) -> None:
    """Raise a RuntimeError unless the last step gave every trained parameter a finite gradient."""
    bad = [tuple(p.shape) for p in run.parameters() if p.grad is None or not p.grad.isfinite().all()]
    if bad:
        raise RuntimeError(f"{len(bad)} trained parameters have no finite gradient, the first of shape {bad[0]}.")


def check_logits(logits: Tensor, input_ids: Tensor, vocab: int) -> None:
    """Raise a RuntimeError unless the logits are finite and of the right shape."""
    if logits.shape != (*input_ids.shape, vocab) or not logits.isfinite().all():
        raise RuntimeError(f"Expected finite logits of shape {(*input_ids.shape, vocab)}, got {tuple(logits.shape)}.")


def check_against_the_loop(way: Way, outputs: dict[str, Tensor], dtype: str) -> dict:
    """How far a routed way's logits are from those of the loop over the same experts, with the same weights.

    Args:
        way: a routed way whose loop is in `outputs`.
        outputs: logits of the ways, by name, the base among them.
        dtype: chooses the tolerance.

    Returns:
        What was compared, the difference (a share of what the experts add to the logits) and its tolerance.

    Raises:
        RuntimeError: the difference is larger.
    """
    difference = (outputs[way.name].float() - outputs[way.loop].float()).norm(dim=-1)
    added = (outputs[way.loop].float() - outputs["base"].float()).norm(dim=-1)
    share = difference / added
    found = (share.max() if dtype == "float32" else share.median()).item()
    if not found <= TOLERANCES[dtype]:
        raise RuntimeError(
            f"{way.name} differs from {way.loop} by {found:.2g} of what the experts add to the logits, more than "
            f"the {TOLERANCES[dtype]} that {dtype} is allowed."
        )
    return {"check": f"{way.name} = {way.loop}", "difference": found, "tolerance": TOLERANCES[dtype]}


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


# torch 2.13 counts attention on a GPU and leaves out the operator of the CPU.
_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
