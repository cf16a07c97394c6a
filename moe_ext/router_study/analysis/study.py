"""A whole study of one model: collect, measure, look at the weights.

Shape letters: L gates, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_ext.router_study.analysis.expert_analyzer import ExpertAnalyzer
from moe_ext.router_study.analysis.measure import REPLICATES, Measured, measure_all
from moe_ext.router_study.analysis.router_analyzer import Compared, RouterAnalyzer
from moe_ext.router_study.collect.collector import ActivationCollector, Activations
from moe_ext.router_study.collect.data import TokenRows
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.metrics import experts, vocabulary

RANKED_TOKENS = 1024  # every expert runs on each of them


@dataclass(frozen=True)
class WeightStudy:
    """What the weights say; an entry is None where this kind of mixture does not have it.

    Args:
        similarity: cosines of all routers' rows, [L * E, L * E].
        spectra, random_spectrum: singular values of each router, centred, and of random ones.
        subspaces: as `RouterAnalyzer.analyze_router_subspaces`.
        alignment_LEE: as `ExpertAnalyzer.analyze_expert_router_alignment`.
        norm_ranks_LEE: P(rank by output norm | rank by gate).
        compared: figures with interval, chance and control.
        left_out: why an entry is None.
    """

    similarity: Tensor | None
    spectra: list[Tensor] | None
    random_spectrum: Tensor | None
    subspaces: dict[str, Tensor] | None
    alignment_LEE: Tensor | None
    norm_ranks_LEE: Tensor | None
    compared: list[Compared]
    left_out: list[str]


@dataclass(frozen=True)
class Study:
    """All results for one model and one text."""

    model: str
    activations: Activations
    measured: dict[str, Measured]
    weights: WeightStudy
    tokenizer: object


def run_study(
    wrapper: MoEModelWrapper,
    rows: Mapping[str, TokenRows],
    *,
    collector: ActivationCollector | None = None,
    batch_size: int = 8,
    replicates: int = REPLICATES,
    seed: int = 0,
    least_seen: int = vocabulary.LEAST_SEEN,
    resume_folder: str | Path | None = None,
    save_logits: bool = False,
) -> Study:
    """Study a mixture; the arguments are those of the collector and of `measure_all`."""
    collector = collector or ActivationCollector(wrapper)
    activations = collector.collect_router_activations(
        rows, batch_size=batch_size, resume_folder=resume_folder, save_logits=save_logits
    )
    measured = measure_all(activations, replicates=replicates, seed=seed, least_seen=least_seen)
    return Study(wrapper.name, activations, measured, study_weights(wrapper, rows, seed=seed), wrapper.tokenizer)


def study_weights(wrapper: MoEModelWrapper, rows: Mapping[str, TokenRows], *, seed: int = 0) -> WeightStudy:
    """Look at routers and experts; a part that this mixture does not have is named in `left_out`."""
    routers, of_experts, left_out = RouterAnalyzer(wrapper, seed=seed), ExpertAnalyzer(wrapper, seed=seed), []
    first = next(iter(rows.values()))
    few = slice(0, max(1, RANKED_TOKENS // first.ids_NS.shape[1]))
    text = (first.ids_NS[few], first.mask_NS[few])

    def tried(look):
        try:
            return look()
        except ValueError as refused:  # a gate of another form, experts of other layers: said, and the rest goes on
            left_out.append(str(refused))
            return None

    def norm_ranks() -> Tensor:
        gate_LTE, norms_LTE = of_experts.gate_and_norm(*text)
        return torch.stack([experts.rank_table(*pair) for pair in zip(gate_LTE, norms_LTE, strict=True)])

    norm_ranks_LEE = tried(norm_ranks)
    compared = tried(routers.compare) or []
    compared += tried(lambda: of_experts.compare(*(text if norm_ranks_LEE is not None else ()))) or []
    return WeightStudy(
        similarity=tried(routers.compute_router_similarity_matrix),
        spectra=tried(lambda: routers.spectra(centred=True)),
        random_spectrum=tried(lambda: routers.random_spectrum(centred=True)),
        subspaces=tried(routers.analyze_router_subspaces),
        alignment_LEE=tried(of_experts.analyze_expert_router_alignment),
        norm_ranks_LEE=norm_ranks_LEE,
        compared=compared,
        left_out=sorted(set(left_out)),
    )
