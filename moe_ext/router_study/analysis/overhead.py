"""What collecting costs: a pass that collects against a plain one of the same model, in turns in one process."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_ext.router_study.collect.counts import Counts
from moe_ext.router_study.collect.vocabulary_counts import VocabularyCounts, predictions
from moe_ext.router_study.collect.wrapper import MoEModelWrapper

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 8192,
}


@dataclass(frozen=True)
class Overhead:
    """Medians over rounds.

    Args:
        plain, collecting: seconds of a pass.
        ratio: median of the ratios of the rounds, and their quartiles.
    """

    tokens: int
    rounds: int
    plain: float
    collecting: float
    ratio: float
    low: float
    high: float


def wide_model(seed: int = 0) -> OlmoeForCausalLM:
    """An untrained OLMoE of width 512 with 16 experts, 4 of them a token; what it says does not change its time."""
    torch.manual_seed(seed)
    return OlmoeForCausalLM(OlmoeConfig(**WIDE)).eval()


def measure_overhead(wrapper: MoEModelWrapper, *, batch_size: int, row_tokens: int, rounds: int) -> Overhead:
    """Time both kinds of passes in turns, the order changing from round to round.

    Args:
        wrapper: the mixture.
        batch_size, row_tokens: rows of a pass and their tokens, drawn at random.
        rounds: pairs of passes, after one pair to warm up.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, but must be at least 1.")
    generator, device = torch.Generator().manual_seed(0), wrapper.device
    ids_BS = torch.randint(2, wrapper.num_ids, (batch_size, row_tokens), generator=generator).to(device)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    part_B = torch.arange(batch_size, device=device) % 20
    L, E = len(wrapper.gates), wrapper.gates.num_experts
    counts = Counts.empty(20, L, E, device=str(device))
    vocabulary = VocabularyCounts.empty(L, wrapper.num_ids, E, device=str(device))

    def plain() -> None:
        wrapper.forward(ids_BS, mask_BS)

    def collecting() -> None:
        logits_BSV, routing = wrapper.run(ids_BS, mask_BS)
        counts.add(routing, mask_BS, part_B)
        vocabulary.add(routing.first_LT, ids_BS, predictions(logits_BSV), mask_BS)

    seconds: dict[Callable[[], None], list[float]] = {plain: [], collecting: []}
    for number in tqdm(range(rounds + 1), desc="rounds", unit="round"):
        for run in (plain, collecting) if number % 2 else (collecting, plain):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[run].append(time.perf_counter() - started)
    ratios = [ours / theirs for ours, theirs in zip(seconds[collecting], seconds[plain], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
    return Overhead(
        tokens=batch_size * row_tokens,
        rounds=rounds,
        plain=statistics.median(seconds[plain]),
        collecting=statistics.median(seconds[collecting]),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
    )
