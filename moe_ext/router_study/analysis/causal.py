"""What an expert is for: the loss of each domain without it, or with its tokens sent elsewhere.

The control takes away as many choices of the same gate, but at random. The interval draws rows, the same for the model
as it is and for the changed one.

Shape letters: T tokens, E experts, R rows, B rows of a batch, S tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_common.models.perplexity import token_losses
from moe_common.runs.run_folder import Measured
from moe_ext.router_study.analysis.measure import interval
from moe_ext.router_study.collect.data import TokenRows
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.gates.base import Overrule

NOWHERE, NEXT = "nowhere", "next"


@dataclass(frozen=True)
class Effect:
    """What one intervention does to one domain.

    Args:
        layer, expert: number of the gate and of the expert, from 0.
        share: the part of the domain's choices at that gate that went to the expert.
        change: mean loss with the intervention less that without, nats a token.
        low, high: 95 % bootstrap interval over rows.
        control: the change where as many choices of the gate, drawn at random, are taken away.
    """

    layer: int
    label: str
    expert: int
    domain: str
    share: float
    loss: float
    change: float
    low: float
    high: float
    control: float


def take_away(expert: int) -> Overrule:
    """The expert adds nothing; the other choices of its tokens keep their weights."""

    def overrule(weights_TE: Tensor, _logits_TE: Tensor) -> Tensor:
        weights_TE = weights_TE.clone()
        weights_TE[:, expert] = 0
        return weights_TE

    return overrule


def send_to(expert: int, other: int) -> Overrule:
    """The expert's weight goes to another expert."""

    def overrule(weights_TE: Tensor, _logits_TE: Tensor) -> Tensor:
        weights_TE = weights_TE.clone()
        weights_TE[:, other] += weights_TE[:, expert]
        weights_TE[:, expert] = 0
        return weights_TE

    return overrule


def send_to_next(expert: int) -> Overrule:
    """The expert's weight goes to the best expert that the token did not choose; to none where it chose all."""

    def overrule(weights_TE: Tensor, logits_TE: Tensor) -> Tensor:
        weights_TE = weights_TE.clone()
        free_TE = logits_TE.masked_fill(weights_TE > 0, float("-inf"))
        best_T1 = free_TE.argmax(dim=-1, keepdim=True)
        moved_T1 = weights_TE[:, expert : expert + 1] * free_TE.gather(-1, best_T1).isfinite()
        weights_TE[:, expert] = 0
        return weights_TE.scatter_add(-1, best_T1, moved_T1.to(weights_TE.dtype))

    return overrule


def take_away_at_random(share: float, generator: torch.Generator) -> Overrule:
    """Every choice is taken away with the probability `share`."""

    def overrule(weights_TE: Tensor, _logits_TE: Tensor) -> Tensor:
        kept_TE = torch.rand(weights_TE.shape, generator=generator) >= share
        return weights_TE * kept_TE.to(weights_TE)

    return overrule


def overrule_for(to: str, expert: int, num_experts: int) -> Overrule:
    """The intervention by its name: `nowhere`, `next`, or the number of an expert.

    Raises:
        ValueError: it is none of these.
    """
    if to == NOWHERE:
        return take_away(expert)
    if to == NEXT:
        return send_to_next(expert)
    if to.isdigit() and int(to) < num_experts:
        return send_to(expert, int(to))
    raise ValueError(
        f"to is '{to}', but must be {NOWHERE}, {NEXT}, or the number of an expert, 0 to {num_experts - 1}."
    )


@torch.no_grad()
def row_losses(wrapper: MoEModelWrapper, rows: TokenRows, *, batch_size: int) -> Tensor:
    """Sum of the next-token losses of each row and the number of its predictions, [R, 2], float64."""
    sums = []
    for start in range(0, len(rows), batch_size):
        ids_BS = rows.ids_NS[start : start + batch_size].to(wrapper.device)
        mask_BS = rows.mask_NS[start : start + batch_size].to(wrapper.device)
        counted_BS = mask_BS[:, 1:] & mask_BS[:, :-1]
        losses_BS = token_losses(wrapper.forward(ids_BS, mask_BS)[:, :-1], ids_BS[:, 1:])
        sums.append(torch.stack([(losses_BS * counted_BS).sum(dim=1), counted_BS.sum(dim=1)], dim=1).double().cpu())
    return torch.cat(sums)


def intervene(
    wrapper: MoEModelWrapper,
    rows: Mapping[str, TokenRows],
    shares: Callable[[int, int, str], float],
    *,
    to: str = NOWHERE,
    experts: Iterable[int] | None = None,
    batch_size: int = 8,
    replicates: int = 1000,
    seed: int = 0,
    measured: Measured = lambda _, measure: measure(),
) -> list[Effect]:
    """Change one expert of one gate at a time and measure the loss of every domain.

    Args:
        wrapper: the mixture; its gates are those that are changed.
        rows: the text, by domain.
        shares: (gate, expert, domain) -> the part of the choices that the expert gets, for the control.
        to: where its tokens go: `nowhere`, `next` (the best that was not chosen), or the number of an expert.
        experts: which; None takes all.
        measured: keeps what is found of each expert, so that an interrupted run goes on behind it;
            `RunFolder.measured`.

    Raises:
        ValueError: there is no such expert, or no such intervention.
    """
    E = wrapper.gates.num_experts
    chosen = list(range(E)) if experts is None else list(experts)
    if wrong := [expert for expert in chosen if not 0 <= expert < E]:
        raise ValueError(f"There is no expert {wrong[0]}: a gate has {E}, 0 to {E - 1}.")
    overrule_for(to, chosen[0], E)

    def losses_as_they_are() -> dict[str, list]:
        return {domain: row_losses(wrapper, held, batch_size=batch_size).tolist() for domain, held in rows.items()}

    before = measured("losses without intervention", losses_as_they_are)
    effects: list[Effect] = []
    places = [(place, expert) for place in range(len(wrapper.gates)) for expert in chosen]
    for place, expert in tqdm(places, desc="interventions", unit="expert"):

        def without(place: int = place, expert: int = expert) -> list[dict[str, Any]]:
            return [
                vars(_effect(wrapper, place, expert, domain, held, before, shares, to, batch_size, replicates, seed))
                for domain, held in rows.items()
            ]

        effects += [Effect(**effect) for effect in measured(f"gate {place}, expert {expert}", without)]
    return effects


def _effect(
    wrapper: MoEModelWrapper,
    place: int,
    expert: int,
    domain: str,
    rows: TokenRows,
    before: dict[str, Any],
    shares: Callable[[int, int, str], float],
    to: str,
    batch_size: int,
    replicates: int,
    seed: int,
) -> Effect:
    share, generator = shares(place, expert, domain), torch.Generator().manual_seed(seed)
    before_R2 = torch.tensor(before[domain], dtype=torch.float64)

    def losses(overrule: Overrule) -> Tensor:
        with wrapper.gates.overruled(place, overrule):
            return row_losses(wrapper, rows, batch_size=batch_size)

    after_R2 = losses(overrule_for(to, expert, wrapper.gates.num_experts))
    control_R2 = losses(take_away_at_random(share, generator))
    difference_R, counts_R = (after_R2 - before_R2)[:, 0], before_R2[:, 1]
    change = difference_R.sum() / counts_R.sum()
    drawn_NR = torch.randint(len(counts_R), (replicates, len(counts_R)), generator=generator)
    low, high = interval(difference_R[drawn_NR].sum(dim=1) / counts_R[drawn_NR].sum(dim=1), change)
    return Effect(
        layer=place,
        label=wrapper.gates.labels[place],
        expert=expert,
        domain=domain,
        share=share,
        loss=float(before_R2[:, 0].sum() / counts_R.sum()),
        change=float(change),
        low=float(low),
        high=float(high),
        control=float((control_R2 - before_R2)[:, 0].sum() / counts_R.sum()),
    )
