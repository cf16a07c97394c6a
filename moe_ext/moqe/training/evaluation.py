"""What each way to use the experts costs on held-out text, document by document.

    each expert            by itself
    uniform mean           the mean of the experts' logits
    static weights         learned weights that no input changes
    router                 a trained router, of either mode
    oracle, per token      at each token the expert that gives it the highest probability
    oracle, per sequence   for each row the best expert

Oracles know the answer; they say what choosing one expert could gain at most.

Shape letters: B rows, L tokens, D documents, R resamples, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from moe_common.models.perplexity import token_losses
from moe_common.text.packing import IGNORED_LABEL
from moe_ext.moqe.mixture.expert_set import ExpertSet
from moe_ext.moqe.mixture.model import MoQEModel
from moe_ext.moqe.options import TextOptions
from moe_ext.moqe.training.documents import Documents
from moe_ext.moqe.training.losses import mixed_losses, single_losses
from moe_ext.moqe.training.rows import Row, collate_rows, to_rows

UNIFORM, STATIC = "uniform mean of logits", "static learned weights"
ORACLE_TOKEN, ORACLE_SEQUENCE = "oracle, per token", "oracle, per sequence"
REFERENCE = "full precision"


@dataclass(frozen=True)
class Measured:
    """Losses of every way on every document.

    Args:
        sources: the source of each document.
        tokens, num_bytes: of each document [D].
        nats: summed loss of each document [D] by way.
        usage: mean weight of each expert [E] by router.
    """

    sources: list[str]
    tokens: np.ndarray
    num_bytes: np.ndarray
    nats: dict[str, np.ndarray]
    usage: dict[str, list[float]]

    @property
    def source_names(self) -> list[str]:
        return list(dict.fromkeys(self.sources))

    def of_source(self, source: str) -> np.ndarray:
        """Which documents are of a source [D]."""
        return np.array([name == source for name in self.sources])

    def perplexity(self, way: str, source: str) -> float:
        """exp of the mean loss of a source's tokens."""
        own = self.of_source(source)
        return math.exp(self.nats[way][own].sum() / self.tokens[own].sum())

    def bits_per_byte(self, way: str) -> float:
        """Of the text, every source weighing the same."""
        parts = [self.of_source(source) for source in self.source_names]
        return float(np.mean([self.nats[way][own].sum() / math.log(2) / self.num_bytes[own].sum() for own in parts]))

    def mean_nats(self, way: str) -> float:
        """A token, every source weighing the same."""
        parts = [self.of_source(source) for source in self.source_names]
        return float(np.mean([self.nats[way][own].sum() / self.tokens[own].sum() for own in parts]))

    def difference(self, way: str, other: str, *, resamples: int, seed: int = 0) -> tuple[float, float, float]:
        """How much less a way costs than another in nats a token, and its 95 % interval.

        A paired bootstrap: the documents of each source are drawn with replacement, the same for both ways.
        """
        generator = np.random.default_rng(seed)
        gains_R = np.zeros(resamples)
        for source in self.source_names:
            own = self.of_source(source)
            gain_D, tokens_D = self.nats[other][own] - self.nats[way][own], self.tokens[own]
            counts_RD = generator.multinomial(len(gain_D), np.full(len(gain_D), 1 / len(gain_D)), size=resamples)
            gains_R += (counts_RD @ gain_D) / (counts_RD @ tokens_D)
        gains_R /= len(self.source_names)
        low, high = np.quantile(gains_R, (0.025, 0.975))
        return self.mean_nats(other) - self.mean_nats(way), float(low), float(high)


def held_out_rows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, options: TextOptions, *, max_tokens: int | None
) -> list[Row]:
    """The rows of each source in turn."""
    return [
        row
        for source, texts in documents.texts.items()
        for row in to_rows(
            texts,
            source,
            tokenizer,
            row_length=options.row_length,
            max_tokens=max_tokens,
            rows_per_document=options.rows_per_document,
        )
    ]


@torch.no_grad()
def measure(
    experts: ExpertSet,
    mixtures: Mapping[str, MoQEModel],
    rows: Sequence[Row],
    *,
    batch_size: int,
    reference=None,
) -> Measured:
    """Run every expert over the text once, and take from its states what each way costs.

    Args:
        experts: the experts.
        mixtures: trained routers of these experts, by the name they get in the table.
        rows: the text.
        batch_size: rows at once.
        reference: an `Expert` in full precision, or None.
    """
    documents = list(dict.fromkeys((row.source, row.document) for row in rows))
    place_of = {document: place for place, document in enumerate(documents)}
    nats: dict[str, np.ndarray] = {}
    usage = {name: torch.zeros(len(experts)) for name in mixtures}
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    for start in tqdm(range(0, len(ordered), batch_size), desc="measuring", unit="batch"):
        some = ordered[start : start + batch_size]
        batch = collate_rows(some, experts.tokenizer.pad_token_id)
        places = [place_of[row.source, row.document] for row in some]
        for way, losses_B in _losses_of_batch(experts, mixtures, batch, usage, reference).items():
            np.add.at(nats.setdefault(way, np.zeros(len(documents))), places, losses_B.double().cpu().numpy())
    tokens, num_bytes = np.zeros(len(documents)), np.zeros(len(documents))
    for row in rows:
        tokens[place_of[row.source, row.document]] += len(row.tokens) - 1
        num_bytes[place_of[row.source, row.document]] += row.num_bytes
    shares = {name: (total / total.sum()).tolist() for name, total in usage.items()}
    return Measured([source for source, _ in documents], tokens, num_bytes, nats, shares)


def _losses_of_batch(
    experts: ExpertSet, mixtures: Mapping[str, MoQEModel], batch: dict[str, Tensor], usage: dict, reference
) -> dict[str, Tensor]:
    """Summed loss of each row [B] by way."""
    device = experts.embedding.weight.device
    labels_BL, mask_BL = batch["labels"].to(device), batch["attention_mask"].to(device)
    losses = {}
    if reference is not None:
        states = reference.states(batch["input_ids"], batch["attention_mask"])
        logits_BLV = reference.logits_of(states)[..., : experts.vocab_size]
        losses[REFERENCE] = token_losses(logits_BLV, batch["labels"].to(logits_BLV.device)).sum(-1)
    states = experts.states(batch["input_ids"], batch["attention_mask"])
    singles_BLE = single_losses(experts, [state.to(device) for state in states], labels_BL)
    for number, name in enumerate(experts.names):
        losses[name] = singles_BLE[..., number].sum(-1)
    uniform_E = torch.full((len(experts),), 1 / len(experts), device=device)
    losses[UNIFORM] = mixed_losses(experts, states, uniform_E, labels_BL).sum(-1)
    for name, mixture in mixtures.items():
        if STATIC not in losses:
            static_E = torch.tensor(mixture.static_weights, device=device)
            losses[STATIC] = mixed_losses(experts, states, static_E, labels_BL).sum(-1)
        weights_BLE = mixture.routing_weights(batch["input_ids"], mask_BL)
        usage[name] += weights_BLE[labels_BL != IGNORED_LABEL].sum(0).cpu()
        if mixture.router.config.mode == "sequence":
            # What the prefix is predicted by must not have been chosen by reading it.
            weights_BLE = weights_BLE.clone()
            weights_BLE[:, : mixture.router.config.prefix_length - 1] = 0
            weights_BLE[:, : mixture.router.config.prefix_length - 1, mixture.default_expert] = 1
            losses[name] = (singles_BLE * weights_BLE).sum((-1, -2))
        else:
            losses[name] = mixed_losses(experts, states, weights_BLE, labels_BL).sum(-1)
    losses[ORACLE_SEQUENCE] = singles_BLE.sum(1).amin(-1)
    losses[ORACLE_TOKEN] = singles_BLE.amin(-1).sum(-1)
    return losses
