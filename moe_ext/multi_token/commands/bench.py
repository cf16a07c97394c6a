"""Measure drafting against the ways to generate without heads: all in one process, in turns, on the same prompts.

    generate            the backbone alone, greedy, with its KV cache: what the others are compared with
    prompt lookup       transformers' own drafts, copied from the text so far (n-grams)
    heads               heads draft, as many as pay; the backbone checks
    copies              the same with our copies of the text in place of heads
    heads and copies    both, whichever pays more in a pass: what `generate` of this package does by itself
    independent heads   heads that do not read the draft (Medusa), from a second checkpoint, without copies
    fast                drafts of heads unread: another text, and so no lossless way

Shape letters: L tokens.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_common.runs.checkpoints import weights_of
from moe_common.runs.options import split_names
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import read_json
from moe_ext.multi_token.decoding.bench_report import table
from moe_ext.multi_token.decoding.generation import Record, Report, costs_of, generate
from moe_ext.multi_token.decoding.planning import OpenGates, Planner, wait_for
from moe_ext.multi_token.decoding.quality import negative_log_likelihood
from moe_ext.multi_token.decoding.sources import SourceName
from moe_ext.multi_token.model.mixture import MultiTokenMoE
from moe_ext.multi_token.model.storage import load
from moe_ext.multi_token.options import BenchOptions
from moe_ext.multi_token.training.data import read_source, to_prompts

# What transformers' own candidate generator drafts where it is not told otherwise.
LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class Prompt:
    """Where a prompt comes from, and its tokens, [1, L]."""

    source: str
    tokens_1L: Tensor


@dataclass
class Tally:
    """What a way of generating took, over all prompts and rounds.

    Args:
        seconds: of each round, all prompts added up.
        tokens, passes: of the first round.
        sources: what drafted, of the first round; empty where nothing of ours did.
        exact: prompts whose text is that of `generate`.
        nll: summed negative log-likelihood under the backbone, in nats, of the first round.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    sources: dict[SourceName, Record] = field(default_factory=dict)
    exact: int = 0
    nll: float = 0.0

    def add(self, answer: "Answer", greedy_1L: Tensor, nll: float) -> None:
        """Count one continuation of the first round."""
        report = answer.report
        self.tokens += report.tokens
        self.passes += report.passes
        for name, record in report.sources.items():
            held = self.sources.get(name) or Record([0] * len(record.drafted), [0] * len(record.drafted))
            self.sources[name] = held + record
        self.exact += torch.equal(answer.sequence_1L, greedy_1L)
        self.nll += nll


@dataclass(frozen=True)
class Answer:
    """One continuation: prompt and new tokens, [1, L], and what it took."""

    sequence_1L: Tensor
    report: Report


Way = Callable[[Tensor], Answer]


def bench(options: BenchOptions) -> str:
    """Measure a checkpoint, write the figures as JSON and give them as a table.

    Raises:
        ValueError: no such checkpoint, one of another backbone, no held-out text.
        FileNotFoundError: a folder that is not there.
    """
    folder = Path(options.ckpt)
    destination = Path(options.out) if options.out else folder.parent / f"bench_{folder.name}.json"
    settings = {**asdict(options), "weights": weights_of(folder)}
    run = RunFolder.beside(destination, "multi_token bench", settings, free=("out",), option="--out")
    if run.is_done:
        return f"{table(read_json(destination))}\n\n{run.done}"
    model, tokenizer, meta = load(folder, backbone_name=options.model, quant=options.quant)
    independent = None
    if options.against is not None:
        independent, _, _ = load(Path(options.against), backbone_name=options.model, quant=options.quant)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = options.data or meta.options.get("data")
    if not names:
        raise ValueError(f"{folder} does not say what it was trained on. Name held-out text with --data.")
    prompts = held_out_prompts(split_names(names), tokenizer, options)
    with run:
        figures = measure(model, independent, prompts, options)
        figures["trained"] = meta.options
        run.write_result(figures)
    return f"{table(figures)}\n\nThe figures lie in {destination}"


def held_out_prompts(names: Sequence[str], tokenizer, options: BenchOptions) -> list[Prompt]:
    """The beginnings of held-out documents, the sources taking turns."""
    by_source = {
        name: to_prompts(read_source(name, options.split), tokenizer, length=options.prompt_length, whole_texts=True)
        for name in names
    }
    chosen: list[Prompt] = []
    for turn in range(max(map(len, by_source.values()))):
        for name, prompts in by_source.items():
            if turn < len(prompts) and len(chosen) < options.prompts:
                chosen.append(Prompt(name, torch.tensor([prompts[turn]])))
    return chosen


@torch.inference_mode()
def measure(
    model: MultiTokenMoE, independent: MultiTokenMoE | None, prompts: Sequence[Prompt], options: BenchOptions
) -> dict[str, Any]:
    """All ways on all prompts, the order of the ways turning from prompt to prompt.

    Args:
        model: to be measured.
        independent: with independent heads on the same backbone, or None.
        prompts: to be continued.
        options: how long, and how often.

    Returns:
        The figures, ready for JSON.
    """
    costs = costs_of(model)
    own: dict[str, tuple[SourceName, ...]] = {
        "heads": ("heads",),
        "copies": ("copies",),
        "heads and copies": ("heads", "copies"),
    }
    ways: dict[str, Way] = {
        "generate": lambda prompt_1L: plain(model.backbone, prompt_1L, options.max_tokens),
        "prompt lookup": lambda prompt_1L: plain(
            model.backbone, prompt_1L, options.max_tokens, prompt_lookup_num_tokens=LOOKUP_TOKENS
        ),
    }
    for name, sources in own.items():
        ways[name] = drafted(model, options.max_tokens, sources=sources, plan=Planner(costs.of(sources)))
    if independent is not None:
        heads_alone = {"sources": ("heads",), "plan": Planner(costs_of(independent, ("heads",)))}
        ways["independent heads"] = drafted(independent, options.max_tokens, **heads_alone)
    ways["fast"] = drafted(model, options.max_tokens, plan=OpenGates(), mode="fast")

    names = list(ways)
    tallies = {name: Tally() for name in names}
    by_source = {prompt.source: {name: Tally() for name in names} for prompt in prompts}
    for way in ways.values():
        way(prompts[0].tokens_1L)  # warm-up
    work = [(turn, place) for turn in range(options.rounds) for place in range(len(prompts))]
    for turn, place in tqdm(work, desc="in turns", unit="prompt"):
        prompt = prompts[place]
        if place == 0:
            for tally in [*tallies.values(), *(tally for each in by_source.values() for tally in each.values())]:
                tally.seconds.append(0.0)
        # Which way comes first changes, so that none gains from what the one before it left in the caches.
        first = (turn + place) % len(names)
        answers = {}
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            answers[name] = ways[name](prompt.tokens_1L)
            wait_for(model.backbone_device)
            seconds = time.perf_counter() - start
            tallies[name].seconds[-1] += seconds
            by_source[prompt.source][name].seconds[-1] += seconds
        if turn == 0:
            greedy_1L = answers["generate"].sequence_1L
            for name, answer in answers.items():
                nll = answer.report.tokens * negative_log_likelihood(
                    model, answer.sequence_1L, prompt.tokens_1L.shape[1]
                )
                for tally in (tallies[name], by_source[prompt.source][name]):
                    tally.add(answer, greedy_1L, nll)
    return {
        "ways": summary(tallies, len(prompts)),
        "by_source": {
            source: summary(each, sum(prompt.source == source for prompt in prompts))
            for source, each in by_source.items()
        },
        "cost_ms": costs.ms,
        "machine": machine(model),
    }


def plain(backbone: PreTrainedModel, prompt_1L: Tensor, max_tokens: int, **settings) -> Answer:
    """transformers' own `generate`, its passes counted."""
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    handle = backbone.register_forward_pre_hook(count)
    prompt_1L = prompt_1L.to(backbone.get_input_embeddings().weight.device)
    try:
        sequence_1L = backbone.generate(
            prompt_1L,
            attention_mask=torch.ones_like(prompt_1L),
            max_new_tokens=max_tokens,
            do_sample=False,
            **settings,
        )
    finally:
        handle.remove()
    return Answer(sequence_1L, Report(passes=passes, tokens=sequence_1L.shape[1] - prompt_1L.shape[1]))


def drafted(model: MultiTokenMoE, max_tokens: int, **settings) -> Way:
    """Our own `generate`."""

    def continue_prompt(prompt_1L: Tensor) -> Answer:
        decoding = generate(
            model,
            prompt_1L,
            attention_mask=torch.ones_like(prompt_1L),
            max_new_tokens=max_tokens,
            do_sample=False,
            **settings,
        )
        return Answer(decoding.sequences, decoding.report)

    return continue_prompt


def summary(tallies: dict[str, Tally], num_prompts: int) -> dict[str, dict[str, Any]]:
    """The figures of each way; times against `generate`, round by round, of which the median counts."""
    reference = tallies["generate"].seconds
    figures = {}
    for name, tally in tallies.items():
        ratios = [plain / own for plain, own in zip(reference, tally.seconds, strict=True)]
        figures[name] = {
            "tokens": tally.tokens,
            "passes": tally.passes,
            "tokens_per_pass": tally.tokens / tally.passes,
            "tokens_per_second": tally.tokens / median(tally.seconds),
            "times_generate": median(ratios),
            "times_generate_range": [min(ratios), max(ratios)],
            "exact_match": tally.exact / num_prompts,
            "nats_per_token": tally.nll / tally.tokens,
            "sources": {source: asdict(record) for source, record in tally.sources.items()},
        }
    return figures


def machine(model: MultiTokenMoE) -> dict[str, Any]:
    """What the figures were measured with."""
    device = model.backbone_device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
