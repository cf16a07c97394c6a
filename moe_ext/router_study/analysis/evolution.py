"""How early in training the routing is what it is at the end.

    saturation(t) = |E(t) & E(T)| / k

averaged over tokens, with E(t) the experts that a token chooses after t steps and T the end (OLMoE, Muennighoff et al.
2024, arXiv:2409.02060, section 5.1). By chance k / E.

Shape letters: L gates, R rows, S tokens, K choices, E experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_common.runs.run_folder import Measured
from moe_ext.router_study.analysis.measure import interval
from moe_ext.router_study.collect.data import TokenRows
from moe_ext.router_study.collect.revisions import Revision, in_order
from moe_ext.router_study.collect.wrapper import MoEModelWrapper


@dataclass(frozen=True)
class Choices:
    """What a model chose for a text.

    Args:
        chosen_LRSK: int16, the first choice first.
        mask_RS: true for tokens.
    """

    chosen_LRSK: Tensor
    mask_RS: Tensor
    num_experts: int


@dataclass(frozen=True)
class Saturation:
    """One revision against the last.

    Args:
        revision: its name.
        step, tokens: of training, where the name says so.
        chosen, first: |E(t) & E(T)| / k, and the part of tokens with the same first choice; one a layer.
        low, high: bootstrap interval of `chosen` over rows.
        shuffled: `chosen` where the earlier choices are dealt out to other tokens.
        chance, first_chance: k / E and 1 / E.
    """

    revision: str
    step: int | None
    tokens: float | None
    chosen: list[float]
    low: list[float]
    high: list[float]
    shuffled: list[float]
    chance: float
    first: list[float]
    first_chance: float


def choices_of(wrapper: MoEModelWrapper, rows: TokenRows, *, batch_size: int = 8) -> Choices:
    """Read the rows and keep every choice."""
    chosen = []
    for start in range(0, len(rows), batch_size):
        ids_BS = rows.ids_NS[start : start + batch_size].to(wrapper.device)
        mask_BS = rows.mask_NS[start : start + batch_size].to(wrapper.device)
        _, routing = wrapper.run(ids_BS, mask_BS)
        chosen.append(routing.chosen_LTK.unflatten(1, ids_BS.shape).to("cpu", torch.int16))
    return Choices(torch.cat(chosen, dim=1), rows.mask_NS, wrapper.gates.num_experts)


def overlap(one_LRSK: Tensor, other_LRSK: Tensor, num_experts: int) -> Tensor:
    """|E & E'| / |E'| for each token, [L, R, S]; places that hold no expert are no part of a set."""
    same = one_LRSK[..., :, None] == other_LRSK[..., None, :]
    real_LRSK = other_LRSK < num_experts
    return (same & real_LRSK[..., None, :]).sum(dim=(-1, -2)) / real_LRSK.sum(dim=-1).clamp_min(1)


def saturation(
    earlier: Choices,
    last: Choices,
    *,
    revision: str = "",
    step: int | None = None,
    tokens: float | None = None,
    replicates: int = 200,
    seed: int = 0,
) -> Saturation:
    """Compare an earlier model's choices with the last one's.

    Raises:
        ValueError: the two models have other gates or experts, or read another text.
    """
    if earlier.chosen_LRSK.shape != last.chosen_LRSK.shape or earlier.num_experts != last.num_experts:
        raise ValueError(
            f"{revision or 'The earlier model'} made choices of the shape {list(earlier.chosen_LRSK.shape)} (layers, "
            f"rows, tokens, choices) among {earlier.num_experts} experts, the last one {list(last.chosen_LRSK.shape)} "
            f"among {last.num_experts}. Compare revisions of one model."
        )
    generator = torch.Generator().manual_seed(seed)
    real_RS, E = last.mask_RS, last.num_experts
    overlap_LRS = overlap(earlier.chosen_LRSK, last.chosen_LRSK, E) * real_RS
    sums_LR, counts_R = overlap_LRS.sum(dim=-1).double(), real_RS.sum(dim=-1).double()
    value_L = sums_LR.sum(dim=-1) / counts_R.sum()
    draws = []
    for _ in range(replicates):
        drawn_R = torch.randint(len(real_RS), (len(real_RS),), generator=generator)
        draws.append(sums_LR[:, drawn_R].sum(dim=-1) / counts_R[drawn_R].sum())
    low_L, high_L = interval(torch.stack(draws), value_L)
    ours_LNK, theirs_LNK = earlier.chosen_LRSK[:, real_RS], last.chosen_LRSK[:, real_RS]
    order_N = torch.randperm(ours_LNK.shape[1], generator=generator)
    shuffled_L = overlap(ours_LNK[:, order_N, None], theirs_LNK[:, :, None], E).double().mean(dim=(1, 2))
    same_first_L = (ours_LNK[..., 0] == theirs_LNK[..., 0]).double().mean(dim=1)
    per_token = float((theirs_LNK < E).sum(dim=-1).double().mean())
    return Saturation(
        revision=revision,
        step=step,
        tokens=tokens,
        chosen=value_L.tolist(),
        low=low_L.tolist(),
        high=high_L.tolist(),
        shuffled=shuffled_L.tolist(),
        chance=per_token / E,
        first=same_first_L.tolist(),
        first_chance=1 / E,
    )


def follow(
    names: Sequence[str],
    load: Callable[[str], MoEModelWrapper],
    rows_for: Callable[[MoEModelWrapper], TokenRows],
    *,
    batch_size: int = 8,
    replicates: int = 200,
    seed: int = 0,
    measured: Measured = lambda _, measure: measure(),
) -> tuple[list[Saturation], list[str]]:
    """Compare revisions with the last of them, one model in memory at a time.

    Args:
        names: revisions in any order; they are taken by number.
        load: a revision's model.
        rows_for: the text, as tokens of the last revision's tokenizer.
        measured: keeps each comparison by its name, so that an interrupted run goes on behind it;
            `RunFolder.measured`.

    Returns:
        One comparison for each earlier revision, first to last, and the labels of the gates.
    """
    *earlier, last = in_order(names)
    wrapper = load(last.name)
    rows, labels = rows_for(wrapper), wrapper.gates.labels
    last_choices = choices_of(wrapper, rows, batch_size=batch_size)
    del wrapper
    found = []
    for revision in tqdm(earlier, desc="revisions", unit="revision"):

        def compare(revision: Revision = revision) -> dict[str, Any]:
            choices = choices_of(load(revision.name), rows, batch_size=batch_size)
            one = saturation(
                choices,
                last_choices,
                revision=revision.name,
                step=revision.step,
                tokens=revision.tokens,
                replicates=replicates,
                seed=seed,
            )
            return asdict(one)

        found.append(Saturation(**measured(f"saturation of {revision.name}", compare)))
    return found, labels


def saturations(
    model: str,
    names: Sequence[str],
    rows_of: Callable[[MoEModelWrapper], Mapping[str, TokenRows]],
    *,
    device: str,
    layers: Sequence[int] | None,
    batch_size: int,
    seed: int,
    measured: Measured,
) -> tuple[list[Saturation], list[str], dict[str, int]]:
    """Follow the revisions of a model over the text of several domains.

    Args:
        model: as `MoEModelWrapper.load` takes it.
        names: of the revisions, the last one last.
        rows_of: the text of each domain, as tokens of a model.
        device, layers: as `MoEModelWrapper.load` takes them.
        batch_size, seed, measured: as `follow` takes them.

    Returns:
        The comparisons, the labels of the gates, and the tokens of each domain.
    """
    tokens: dict[str, int] = {}

    def load(name: str) -> MoEModelWrapper:
        return MoEModelWrapper.load(model, revision=name, device=device, layers=layers)

    def joined_rows(wrapper: MoEModelWrapper) -> TokenRows:
        rows = rows_of(wrapper)
        tokens.update({domain: held.num_tokens for domain, held in rows.items()})
        return TokenRows(
            torch.cat([held.ids_NS for held in rows.values()]), torch.cat([held.mask_NS for held in rows.values()])
        )

    found, labels = follow(names, load, joined_rows, batch_size=batch_size, seed=seed, measured=measured)
    return found, labels, tokens
