"""One routed pass against one pass for each expert whose logits are mixed.

They are not the same function. They agree where the weights of a sequence choose one expert, and where nothing is
nonlinear behind the adapters, that is, where only the last linear layer is adapted. Otherwise the gap is of second
order in the update: with updates of size s, both are base + s * (the same linear term) + s^2 * (different terms), so
that half the update leaves a quarter of the gap.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dylo_moe.equivalence.case import Case, Result, random_weights
from dylo_moe.equivalence.models import randomize_adapter, scaled
from dylo_moe.equivalence.rounding import largest_difference

# A gap (root mean square over the vocabulary) is told from rounding if it is this many times larger than the largest
# effect of rounding on a logit, some 40 times its root mean square. Rounding then adds in squares: a thousandth.
CLEAR_OF_ROUNDING = 10
# Half the update leaves a quarter of the gap, plus terms that themselves halve with the update.
RATIO_BAND = (3.6, 4.4)
MOST_HALVINGS = 10


@torch.no_grad()
def one_expert_a_sequence(case: Case) -> Iterator[Result]:
    """One pass for each expert, one-hot weights for each sequence: exact."""
    columns = torch.arange(len(case.ids)) % len(case.names)
    weights = nn.functional.one_hot(columns, len(case.names)).float().to(case.ids.device)
    yield case.judge(
        "one pass for each expert, one-hot weights for each sequence",
        largest_difference(case.logits(routing_weights=weights), mixed_logits(case, weights[:, None])),
        suspect=lambda: case.logits(routing_weights=weights),
        weights=weights,
    )


@torch.no_grad()
def last_linear(case: Case) -> Iterator[Result]:
    """One pass for each expert, only the last linear adapted: exact."""
    check = "one pass for each expert, only the last linear adapted"
    base = case.model.base_model.model
    head = base.get_output_embeddings()
    name = next((name for name, module in base.named_modules() if module is head), None)
    if name is None or not isinstance(getattr(head, "base_layer", head), nn.Linear):
        yield case.skip(check, "this model ends in no linear layer")
        return
    if getattr(base.config.get_text_config(), "final_logit_softcapping", None):
        yield case.skip(check, "this model caps its logits behind the last linear, which is not linear")
        return
    names = [f"head_{i}_of_the_check" for i in range(2)]
    generator = torch.Generator().manual_seed(2)
    try:
        for i, expert in enumerate(names):
            config = LoraConfig(r=2 + 2 * i, lora_alpha=3, target_modules=[name], task_type="CAUSAL_LM")
            case.model.add_adapter(expert, config)
            randomize_adapter(base.get_submodule(name), expert, generator)
        case.model.eval()
        case.model.base_model.set_adapter(names)
        weights = torch.softmax(random_weights(*case.ids.shape, 2), dim=-1).to(case.ids.device)
        heads = Case(model=case.model, names=names, ids=case.ids, rounding=case.rounding)
        yield heads.judge(
            check,
            largest_difference(heads.logits(routing_weights=weights), mixed_logits(heads, weights)),
            suspect=lambda: heads.logits(routing_weights=weights),
            weights=weights,
        )
    finally:
        for expert in names:
            if expert in case.model.peft_config:
                case.model.delete_adapter(expert)
        case.model.base_model.set_adapter(case.names)


@torch.no_grad()
def gap_of_the_two(case: Case) -> Iterator[Result]:
    """Mixing in the layers against mixing logits: the gap and how it shrinks."""
    if len(case.names) < 2:
        yield case.skip("mixing in the layers against mixing logits", "there is one expert: nothing to mix")
        return
    weights = torch.arange(1.0, len(case.names) + 1, device=case.ids.device)
    weights = weights / weights.sum()

    def difference() -> Tensor:
        """The gap of each token's logits: [batch, seq, vocabulary]."""
        return case.logits(routing_weights=weights) - mixed_logits(case, weights)

    full = difference().abs().max().item()
    yield Result(
        check="mixing in the layers against mixing logits",
        verdict="measured",
        difference=full,
        why="two functions, not one: a gap is expected",
    )
    gaps: list[tuple[float, float]] = []
    floor, factor = CLEAR_OF_ROUNDING * case.rounding, _first_factor(case, difference)
    for _ in range(MOST_HALVINGS):
        with scaled(case.model, factor):
            gap = _typical(difference())
        if gap < floor:
            break
        gaps.append((factor, gap))
        factor /= 2
    check = "that gap, update halved: the ratio of gaps nears 4"
    if len(gaps) < 2:
        yield case.skip(check, f"the gap is too small to be told from rounding ({floor:.1e})")
        return
    ratios = [larger / smaller for (_, larger), (_, smaller) in pairwise(gaps)]
    steps = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    lowest, highest = RATIO_BAND
    yield Result(
        check=check,
        verdict="pass" if lowest <= ratios[-1] <= highest else "fail",
        difference=abs(ratios[-1] - 4),
        tolerance=highest - 4,
        why=f"second order; updates x {gaps[0][0]:g} to x {gaps[-1][0]:g} give {steps}",
        unit="from 4",
    )


def _typical(difference: Tensor) -> float:
    """Root mean square over the vocabulary of the median token.

    Of the median, because a base model's own router may send a few tokens elsewhere, which is no smooth change.
    """
    return difference.square().mean(dim=-1).sqrt().median().item()


def _first_factor(case: Case, difference) -> float:
    """1, or as many times the update as it takes for a gap that can be halved a few times above rounding."""
    factor = 1.0
    while factor < 2**MOST_HALVINGS:
        with scaled(case.model, factor):
            if _typical(difference()) > 100 * CLEAR_OF_ROUNDING * case.rounding:
                break
        factor *= 2
    return factor


def mixed_logits(case: Case, weights: Tensor) -> Tensor:
    """Logits of one pass for each expert alone, mixed: `weights` broadcast against `[batch, seq, experts]`."""
    mixed = torch.zeros((), device=case.ids.device)
    for column, name in enumerate(case.names):
        with case.active(name):
            mixed = mixed + weights[..., column, None] * case.logits()
    return mixed


MIXING_CHECKS = [one_expert_a_sequence, gap_of_the_two, last_linear]
