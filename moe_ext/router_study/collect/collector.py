"""Run a mixture over the text once and keep what the metrics need; memory does not grow with the text.

    collector = ActivationCollector(wrapper)
    activations = collector.collect_router_activations(rows, batch_size=8)
    collector.compute_activation_correlations(activations)      # [L * E, L * E]

Shape letters: L gates, E experts, M = L * E, B rows of a batch, S tokens of a row.
"""

import logging
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from moe_common.runs.checkpoints import load_state, save_state
from moe_common.runs.whole_files import whole_file
from moe_ext.router_study.collect.counts import Counts
from moe_ext.router_study.collect.data import TokenRows
from moe_ext.router_study.collect.sample import Sample
from moe_ext.router_study.collect.totals import totals_of
from moe_ext.router_study.collect.vocabulary_counts import VocabularyCounts, predictions
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.gates.base import Gates, Routing
from moe_ext.router_study.metrics.coactivation import correlation_of_masks

logger = logging.getLogger(__name__)

MEBIBYTE = 1 << 20
SAVE_SECONDS = 60
STATE, PROGRESS = "state.safetensors", "progress.json"


@dataclass
class Activations:
    """What was collected.

    Args:
        domains: their names; `counts` has num_groups parts for each, in this order.
        gates: whose decisions these are.
        counts, vocabulary, sample: see those classes; all on the CPU.
    """

    domains: list[str]
    num_groups: int
    gates: Gates
    counts: Counts
    vocabulary: VocabularyCounts
    sample: Sample

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        tokens_DG = self.counts.tokens_U.view(len(self.domains), self.num_groups)
        return dict(zip(self.domains, tokens_DG.sum(dim=1).tolist(), strict=True))

    @property
    def sample_is_all(self) -> bool:
        """Whether the sample holds every token that was counted."""
        return self.sample.num_tokens == int(self.counts.tokens_U.sum())


class ActivationCollector:
    """Collects by forward hooks on the gates.

    Args:
        wrapper: the mixture.
        num_groups: parts of a domain that a bootstrap draws from; fewer where it has fewer rows.
        counts_mb: MiB that the counts may take; a study that would take more is refused.
        sample_mb: MiB of scores to keep for shuffled controls and pictures.
        in_rank: also count experts next to each other in rank, as the OLMoE authors' script does.
    """

    def __init__(
        self,
        wrapper: MoEModelWrapper,
        *,
        num_groups: int = 20,
        counts_mb: int = 4096,
        sample_mb: int = 256,
        in_rank: bool = False,
    ) -> None:
        for name, value in (("num_groups", num_groups), ("counts_mb", counts_mb), ("sample_mb", sample_mb)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        self.wrapper, self.num_groups, self.in_rank = wrapper, num_groups, in_rank
        self.counts_mb, self.sample_mb = counts_mb, sample_mb

    def collect_router_activations(
        self,
        rows: Mapping[str, TokenRows],
        *,
        batch_size: int = 8,
        resume_folder: str | Path | None = None,
        save_logits: bool = False,
    ) -> Activations:
        """Read all rows once.

        Args:
            rows: the text, by domain.
            batch_size: rows of a forward pass.
            resume_folder: for the checkpoints of this run and no other, written every minute and, between two batches,
                when it is interrupted; it goes on from the newest whole one.
            save_logits: write the raw scores there too, `logits-00000.safetensors` and on, one file a batch.

        Raises:
            ValueError: no text, counts that would not fit.
        """
        run = _Run(self, rows, batch_size, Path(resume_folder) if resume_folder else None, save_logits)
        return run.to_the_end()

    def compute_activation_correlations(self, activations: Activations) -> Tensor:
        """Correlation of every (gate, expert) with every other over all tokens, [M, M]; see `correlation_of_masks`."""
        return correlation_of_masks(totals_of(activations.counts, len(activations.domains)))


class _Run:
    """The batches, and what an interrupted run needs to go on."""

    def __init__(
        self,
        collector: ActivationCollector,
        rows: Mapping[str, TokenRows],
        batch_size: int,
        folder: Path | None,
        save_logits: bool,
    ) -> None:
        if not rows or not all(len(held) for held in rows.values()):
            raise ValueError("There is no text to read. Give at least one row for each domain.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1.")
        if save_logits and folder is None:
            raise ValueError("save_logits needs a resume_folder to write the scores into.")
        self.wrapper, self.gates = collector.wrapper, collector.wrapper.gates
        self.domains, self.folder, self.save_logits = list(rows), folder, save_logits
        self.num_groups = min(collector.num_groups, *(len(held) for held in rows.values()))
        self.batches = [
            (domain, start, held.ids_NS[start : start + batch_size], held.mask_NS[start : start + batch_size])
            for domain, held in enumerate(rows.values())
            for start in range(0, len(held), batch_size)
        ]
        self.num_tokens = sum(held.num_tokens for held in rows.values())
        L, E, parts = len(self.gates), self.gates.num_experts, len(rows) * self.num_groups
        self._check_size(collector.counts_mb, parts)
        device = str(self.wrapper.device)
        self.counts = Counts.empty(parts, L, E, in_rank=collector.in_rank, device=device)
        self.vocabulary = VocabularyCounts.empty(L, self.wrapper.num_ids, E, device=device)
        self.sample: list[Sample] = []
        token_bytes = Sample.num_bytes(1, L, E, self.gates.num_chosen)
        self.sample_tokens = max(1, collector.sample_mb * MEBIBYTE // token_bytes // len(rows))
        self.sampled = [0] * len(rows)
        self.done = 0
        self.counting = False

    def _check_size(self, counts_mb: int, parts: int) -> None:
        L, E = len(self.gates), self.gates.num_experts
        needed = Counts.num_bytes(parts, L, E) + VocabularyCounts.num_bytes(L, self.wrapper.num_ids, E)
        if needed > counts_mb * MEBIBYTE:
            raise ValueError(
                f"Counting {L} layers of {E} experts in {parts} parts takes {needed / MEBIBYTE:,.0f} MiB, but "
                f"counts_mb is {counts_mb}. Study fewer layers at a time, lower num_groups, or raise counts_mb."
            )

    def to_the_end(self) -> Activations:
        if self.folder:
            self._resume()
        saved = time.monotonic()
        try:
            with tqdm(total=self.num_tokens, desc="reading", unit="token", unit_scale=True) as bar:
                bar.update(sum(int(mask_BS.sum()) for _, _, _, mask_BS in self.batches[: self.done]))
                while self.done < len(self.batches):
                    bar.update(self._read(*self.batches[self.done]))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._save()
                        saved = time.monotonic()
        finally:
            # At the end as well: what follows can be broken off too. A batch that is half counted is never kept.
            if not self.counting:
                self._save()
        counts, vocabulary = self.counts.to("cpu"), VocabularyCounts(self.vocabulary.table_3LVE.cpu())
        return Activations(self.domains, self.num_groups, self.gates, counts, vocabulary, Sample.joined(self.sample))

    def _read(self, domain: int, start: int, ids_BS: Tensor, mask_BS: Tensor) -> int:
        device = self.wrapper.device
        ids_BS, mask_BS = ids_BS.to(device), mask_BS.to(device)
        logits_BSV, routing = self.wrapper.run(ids_BS, mask_BS)
        predicted_BS = predictions(logits_BSV)
        part_B = domain * self.num_groups + (start + torch.arange(len(ids_BS), device=device)) % self.num_groups
        self.counting = True
        self.counts.add(routing, mask_BS, part_B)
        self.vocabulary.add(routing.first_LT, ids_BS, predicted_BS, mask_BS)
        if self.save_logits:
            self._write_logits(routing, ids_BS, mask_BS, domain, start)
        num_tokens = int(mask_BS.sum())
        if self.sampled[domain] < self.sample_tokens:
            self.sample.append(_kept(routing, ids_BS, predicted_BS, mask_BS, part_B))
            self.sampled[domain] += num_tokens
        self.done += 1
        self.counting = False
        return num_tokens

    def _write_logits(self, routing: Routing, ids_BS: Tensor, mask_BS: Tensor, domain: int, start: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {
            "logits": routing.logits_LTE.unflatten(1, ids_BS.shape).cpu().contiguous(),  # [L, B, S, E]
            "chosen": routing.chosen_LTK.unflatten(1, ids_BS.shape).to("cpu", torch.int16).contiguous(),
            "ids": ids_BS.cpu().contiguous(),
            "mask": mask_BS.cpu().contiguous(),
        }
        where = {"domain": self.domains[domain], "first_row": str(start)}
        with whole_file(self.folder / f"logits-{self.done:05d}.safetensors") as partial:
            save_file(held, partial, metadata=where)

    def _save(self) -> None:
        if self.folder is None or not self.done:
            return
        state = {
            "counts": {name: tensor.cpu() for name, tensor in self.counts.tensors().items()},
            "vocabulary": self.vocabulary.table_3LVE.cpu(),
            "sample": Sample.joined(self.sample).tensors() if self.sample else None,
            "done": self.done,
            "sampled": self.sampled,
        }
        save_state(self.folder, self.done, state)

    def _resume(self) -> None:
        state = load_state(self.folder)
        if state is None:
            return
        device = str(self.wrapper.device)
        self.sample = [Sample(**state["sample"])] if state["sample"] else []
        self.vocabulary = VocabularyCounts(state["vocabulary"].to(device))
        self.counts = Counts(**state["counts"]).to(device)
        self.done, self.sampled = state["done"], state["sampled"]
        logger.info("going on with batch %d of %d", self.done + 1, len(self.batches))


def fingerprint(wrapper: MoEModelWrapper, rows: Mapping[str, TokenRows]) -> dict[str, int]:
    """Checksums of the model's `weights` and of the `text`, by which a run knows itself again."""
    text = weights = 0
    for held in rows.values():
        for tensor in (held.ids_NS, held.mask_NS):
            text = zlib.crc32(tensor.contiguous().numpy().tobytes(), text)
    for parameter in wrapper.model.parameters():  # a part of each: enough to tell two checkpoints apart
        few = parameter.detach().flatten()[:16].float().cpu()
        weights = zlib.crc32(few.numpy().tobytes(), weights)
    return {"weights": weights, "text": text}


def _kept(routing: Routing, ids_BS: Tensor, predicted_BS: Tensor, mask_BS: Tensor, part_B: Tensor) -> Sample:
    def by_row(per_token: Tensor) -> Tensor:
        return per_token.unflatten(1, ids_BS.shape).transpose(0, 1).cpu()

    return Sample(
        ids_RS=ids_BS.cpu(),
        predicted_RS=predicted_BS.cpu(),
        mask_RS=mask_BS.cpu(),
        part_R=part_B.cpu(),
        logits_RLSE=by_row(routing.logits_LTE),
        chosen_RLSK=by_row(routing.chosen_LTK).to(torch.int16),
    )
