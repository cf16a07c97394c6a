"""Every figure with what it must be judged by: a bootstrap interval, its chance level and a shuffled control.

Shape letters: U parts (D domains, G groups each), L gates, V vocabulary, R rows of the sample.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_ext.router_study.collect.collector import Activations
from moe_ext.router_study.collect.totals import Totals, totals_of
from moe_ext.router_study.collect.vocabulary_counts import KINDS
from moe_ext.router_study.metrics import (
    coactivation,
    confidence,
    domains,
    load,
    paths,
    repetition,
    transitions,
    vocabulary,
)
from moe_ext.router_study.metrics.metric import Metric

logger = logging.getLogger(__name__)

REPLICATES = 200
SHUFFLES = 3
INTERVAL = 0.95


@dataclass(frozen=True)
class Measured:
    """A figure and what it is judged by; tensors of one shape, float64.

    Args:
        name, title: of the metric.
        axes: what its dimensions are.
        value: over all tokens.
        low, high: 95 % bootstrap interval (Efron 1979; see `interval`): over parts of the domains, over ids for the
            vocabulary, over rows of the sample for paths.
        chance: what chance gives in theory.
        shuffled: the figure for shuffled routing of the sample, the mean of three shuffles.
        on_sample: the figure for the sample as it is; the same as value where the sample holds all tokens.
        tokens, sample_tokens: how many tokens value and shuffled rest on.
    """

    name: str
    title: str
    axes: tuple[str, ...]
    value: Tensor
    low: Tensor
    high: Tensor
    chance: Tensor
    shuffled: Tensor
    on_sample: Tensor
    tokens: int
    sample_tokens: int


def metrics_for(activations: Activations) -> list[Metric]:
    """The metrics of routing that this text and this model allow."""
    chosen = [*load.METRICS, *confidence.METRICS, *coactivation.METRICS, *repetition.METRICS]
    chosen += domains.METRICS if len(activations.domains) > 1 else domains.OF_ONE
    if len(activations.gates) > 1:
        chosen += transitions.METRICS
    if len(activations.counts.next_in_rank_ULEE):
        chosen += coactivation.IN_SCRIPT
    return chosen


def measure_all(
    activations: Activations,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    least_seen: int = vocabulary.LEAST_SEEN,
) -> dict[str, Measured]:
    """All figures of routing by name.

    Args:
        activations: what was collected.
        replicates: of the bootstrap.
        seed: of bootstrap and shuffles.
        least_seen: for the vocabulary, see `metrics.vocabulary.specialisation`.
    """
    if replicates < 2:
        raise ValueError(f"replicates is {replicates}, but an interval needs at least 2.")
    measured = {found.name: found for found in _routing(activations, replicates, seed)}
    for found in _vocabulary(activations, replicates, seed, least_seen):
        measured[found.name] = found
    for found in _paths(activations, replicates, seed):
        measured[found.name] = found
    return measured


def interval(draws: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The middle 95 % of the draws along the first dimension, moved so that their mean is the value.

    A draw holds some parts twice and others not at all, which lowers entropies and raises maxima; only the spread of
    the draws is meant.
    """
    draws, beyond = draws.double(), (1 - INTERVAL) / 2
    low, high = torch.quantile(draws, torch.tensor([beyond, 1 - beyond], dtype=torch.float64), dim=0)
    return low + value - draws.mean(dim=0), high + value - draws.mean(dim=0)


def drawn_parts(num_domains: int, num_groups: int, generator: torch.Generator) -> Tensor:
    """How often a bootstrap drew each part, [U]: as many of each domain as it has."""
    drawn_DG = torch.randint(num_groups, (num_domains, num_groups), generator=generator)
    return torch.stack([torch.bincount(drawn_G, minlength=num_groups) for drawn_G in drawn_DG]).flatten()


def _routing(activations: Activations, replicates: int, seed: int) -> Iterable[Measured]:
    D, counts, sample = len(activations.domains), activations.counts, activations.sample
    metrics, generator = metrics_for(activations), torch.Generator().manual_seed(seed)
    totals = totals_of(counts, D)
    draws: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
    for _ in tqdm(range(replicates), desc="bootstrap", unit="draw"):
        drawn = totals_of(counts, D, drawn_parts(D, activations.num_groups, generator))
        for metric in metrics:
            draws[metric.name].append(metric.compute(drawn))
    as_it_is = totals if activations.sample_is_all else _sample_totals(activations, None)
    shuffled = {
        kind: [_sample_totals(activations, (kind, seed + number)) for number in range(SHUFFLES)]
        for kind in tqdm(("tokens", "columns", "labels"), desc="controls", unit="kind")
    }
    for metric in metrics:
        value = metric.compute(totals)
        low, high = interval(torch.stack(draws[metric.name]), value)
        yield Measured(
            metric.name,
            metric.title,
            metric.axes,
            value,
            low,
            high,
            metric.chance(totals).expand_as(value).contiguous(),
            torch.stack([metric.compute(control) for control in shuffled[metric.shuffle]]).mean(dim=0),
            metric.compute(as_it_is),
            int(totals.num_tokens),
            sample.num_tokens,
        )


def _sample_totals(activations: Activations, shuffle: tuple[str, int] | None) -> Totals:
    sample, gates = activations.sample, activations.gates
    routing = sample.routing(gates) if shuffle is None else sample.shuffled(gates, shuffle[0], seed=shuffle[1])
    in_rank = len(activations.counts.next_in_rank_ULEE) > 0
    counts = sample.counts(routing, activations.counts.shape[0], in_rank=in_rank)
    return totals_of(counts, len(activations.domains))


def _vocabulary(activations: Activations, replicates: int, seed: int, least_seen: int) -> Iterable[Measured]:
    gates, sample = activations.gates, activations.sample
    table_3LVE = activations.vocabulary.table_3LVE
    num_ids = table_3LVE.shape[2]
    generator = torch.Generator().manual_seed(seed)
    ids_drawn = [
        torch.bincount(torch.randint(num_ids, (num_ids,), generator=generator), minlength=num_ids)
        for _ in range(replicates)
    ]
    controls = [
        sample.vocabulary(sample.shuffled(gates, "tokens", seed=seed + number), num_ids).table_3LVE
        for number in range(SHUFFLES)
    ]
    as_it_is = (
        table_3LVE if activations.sample_is_all else sample.vocabulary(sample.routing(gates), num_ids).table_3LVE
    )
    for kind, name in enumerate(KINDS):

        def figure(table_3LVE: Tensor, weights_V: Tensor | None = None, *, kind: int = kind) -> Tensor:
            return vocabulary.specialisation(table_3LVE[kind], least_seen=least_seen, weights_V=weights_V)

        value = figure(table_3LVE)
        low, high = interval(torch.stack([figure(table_3LVE, weights_V) for weights_V in ids_drawn]), value)
        chance = vocabulary.specialisation_by_chance(table_3LVE[kind], least_seen=least_seen, seed=seed)
        yield Measured(
            f"vocabulary.{name}",
            f"vocabulary specialisation, {name} token",
            ("layer",),
            value,
            low,
            high,
            torch.full_like(value, chance),
            torch.stack([figure(control) for control in controls]).mean(dim=0),
            figure(as_it_is),
            int(table_3LVE[kind, 0].sum()),
            sample.num_tokens,
        )


def _paths(activations: Activations, replicates: int, seed: int) -> Iterable[Measured]:
    if len(activations.gates) < 2:
        return
    gates, sample, E = activations.gates, activations.sample, activations.gates.num_experts
    real_T = sample.mask_RS.flatten()
    row_T = torch.arange(len(sample.mask_RS)).repeat_interleave(sample.mask_RS.shape[1])[real_T]
    generator, num_rows = torch.Generator().manual_seed(seed), len(sample.mask_RS)
    rows_drawn = [
        torch.bincount(torch.randint(num_rows, (num_rows,), generator=generator), minlength=num_rows)
        for _ in range(replicates)
    ]
    paths_WT = paths.path_numbers(sample.routing(gates).first_LT[:, real_T], E)
    controls = [
        paths.path_numbers(sample.shuffled(gates, "tokens", seed=seed + number).first_LT[:, real_T], E)
        for number in range(SHUFFLES)
    ]
    figures: tuple[tuple[str, str, Callable[..., Tensor]], ...] = (
        ("paths.entropy", "entropy of paths of three layers, nats", paths.entropy),
        ("paths.distinct", "distinct paths of three layers", paths.distinct),
    )
    for name, title, figure in figures:
        value = figure(paths_WT)
        low, high = interval(torch.stack([figure(paths_WT, weights_R[row_T]) for weights_R in rows_drawn]), value)
        shuffled = torch.stack([figure(control) for control in controls]).mean(dim=0)
        # No closed form for finitely many tokens: chance is the control.
        yield Measured(
            name, title, ("window",), value, low, high, shuffled, shuffled, value, sample.num_tokens, sample.num_tokens
        )
