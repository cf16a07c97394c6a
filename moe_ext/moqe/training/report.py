"""`--eval`: one table of what each way to use the experts costs and gives, on held-out text by source."""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_common.runs.checkpoints import weights_of
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import check_free, check_writable, write_text
from moe_ext.moqe.experts.expert import Expert, load_expert
from moe_ext.moqe.mixture.model import MoQEModel
from moe_ext.moqe.mixture.storage import CONFIG, check_experts
from moe_ext.moqe.options import EvalOptions
from moe_ext.moqe.training.documents import read_documents
from moe_ext.moqe.training.evaluation import (
    ORACLE_SEQUENCE,
    ORACLE_TOKEN,
    REFERENCE,
    STATIC,
    UNIFORM,
    Measured,
    held_out_rows,
    measure,
)
from moe_ext.moqe.training.rows import Row, collate_rows
from moe_ext.moqe.training.train import RESULT

logger = logging.getLogger(__name__)


def evaluate(options: EvalOptions) -> str:
    """Measure trained mixtures of the same experts; returns the table in Markdown.

    Raises:
        ValueError, FileNotFoundError: mixtures, experts or text that cannot work; nothing is written then.
        FileExistsError: the output is there, and not of this evaluation.
    """
    folders = [_mixture_folder(path) for path in options.checkpoint_path]
    if options.output is None:
        return _measure(folders, options)[0]
    table_file = Path(options.output)
    settings = {**asdict(options), "weights": [weights_of(folder) for folder in folders]}
    place = table_file.with_suffix(".json")
    run = RunFolder.beside(place, "moqe --eval", settings, free=("output",), option="--output")
    if run.is_done and table_file.exists():
        logger.info(run.done)
        return table_file.read_text(encoding="utf-8")
    check_writable(table_file)
    if not run.is_begun:
        check_free(table_file)
    with run:
        table, figures = _measure(folders, options)
        write_text(table_file, table)
        run.write_result(figures)
    return table


def _measure(folders: list[Path], options: EvalOptions) -> tuple[str, dict[str, Any]]:
    """The table, and the same for programs."""
    paths = [check_experts(folder, options.expert_paths) for folder in folders]
    for folder in folders[1:]:
        check_experts(folder, paths[0])
    documents = read_documents(options.data_dir, options.split, text_column=options.text_column)
    first = MoQEModel.from_pretrained(folders[0], paths[0], dtype=options.dtype, gguf_backend=options.gguf_backend)
    models = [first, *(MoQEModel.on_experts(folder, first.expert_set) for folder in folders[1:])]
    mixtures = {_name_of(model, folder, folders): model for model, folder in zip(models, folders, strict=True)}
    reference = load_expert(options.reference, dtype=options.dtype) if options.reference else None
    if reference is not None and torch.cuda.is_available():
        reference.model.to(first.device)
    rows = held_out_rows(documents, first.expert_set.tokenizer, options, max_tokens=options.max_tokens)
    measured = measure(first.expert_set, mixtures, rows, batch_size=options.batch_size, reference=reference)
    costs = costs_of(mixtures, rows, reference, options)
    table = as_table(measured, mixtures, costs, options, unreadable=documents.unreadable)
    return table, as_json(measured, costs)


def costs_of(
    mixtures: dict[str, MoQEModel], rows: list[Row], reference: Expert | None, options: EvalOptions
) -> dict[str, dict[str, float]]:
    """Forward passes a token, weights in MiB, and tokens a second over a batch of whole rows, by way."""
    model = next(iter(mixtures.values()))
    experts = model.expert_set
    named = dict(zip(experts.names, experts.experts, strict=True))
    mib = {name: expert.memory_bytes() / 2**20 for name, expert in named.items()}
    longest = sorted(rows, key=lambda row: -len(row.tokens))[: options.batch_size]
    batch = collate_rows(longest, experts.tokenizer.pad_token_id)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    runs: dict[str, Callable[[], Any]] = {
        name: lambda expert=expert: expert.logits_of(expert.states(ids, mask)) for name, expert in named.items()
    }
    if reference is not None:
        mib[REFERENCE] = reference.memory_bytes() / 2**20
        runs[REFERENCE] = lambda: reference.logits_of(reference.states(ids, mask))
    for name, mixture in mixtures.items():
        runs[name] = lambda mixture=mixture: mixture(ids.to(mixture.device), mask.to(mixture.device)).logits
    speed = tokens_per_second(runs, int(mask.sum()), rounds=options.speed_rounds)
    whole, one = experts.memory_bytes() / 2**20, {"forwards": 1.0}
    costs = {way: {**one, "mib": mib[way], "tokens_per_second": speed[way]} for way in mib}
    for name, mixture in mixtures.items():
        forwards = 1.0 if mixture.router.config.mode == "sequence" else float(len(experts))
        costs[name] = {"forwards": forwards, "mib": whole, "tokens_per_second": speed[name]}
    for way in (UNIFORM, STATIC, ORACLE_SEQUENCE, ORACLE_TOKEN):
        costs[way] = {"forwards": float(len(experts)), "mib": whole}
    return costs


@torch.no_grad()
def tokens_per_second(runs: dict[str, Callable[[], Any]], num_tokens: int, *, rounds: int) -> dict[str, float | None]:
    """The median over rounds in which all ways take turns; the first round only warms up. None without rounds."""
    times: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(rounds + 1 if rounds else 0):
        for way, run in runs.items():
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            if turn:
                times[way].append(time.perf_counter() - started)
    return {way: num_tokens / statistics.median(taken) if taken else None for way, taken in times.items()}


def as_table(
    measured: Measured,
    mixtures: dict[str, MoQEModel],
    costs: dict[str, dict[str, float]],
    options: EvalOptions,
    *,
    unreadable: int,
) -> str:
    """The table, what a router gains with its interval, and how it uses the experts."""
    sources = measured.source_names
    lines = [
        f"| perplexity on {options.split} text | {' | '.join(Path(source).name for source in sources)} | nats a token "
        "| bits a byte | forwards a token | weights, MiB | tokens/s |",
        "|" + " --- |" * (len(sources) + 6),
    ]
    singles = next(iter(mixtures.values())).expert_set.names
    ways = [way for way in (REFERENCE, *singles, UNIFORM, STATIC, *mixtures) if way in measured.nats]
    for way in [*ways, ORACLE_SEQUENCE, ORACLE_TOKEN]:
        cost = costs[way]
        speed = cost.get("tokens_per_second")
        numbers = [f"{measured.perplexity(way, source):.3f}" for source in sources]
        numbers += [f"{measured.mean_nats(way):.4f}", f"{measured.bits_per_byte(way):.4f}"]
        numbers += [f"{cost['forwards']:.0f}", f"{cost['mib']:.1f}", f"{speed:.0f}" if speed else ""]
        lines.append(f"| {way} | {' | '.join(numbers)} |")
    best = min(singles, key=measured.mean_nats)
    lines += [
        "",
        f"| gained, nats a token [95 %] | over the best single ({best}) | over the uniform mean | over static weights "
        "|",
        "| --- | --- | --- | --- |",
    ]
    for name in mixtures:
        gains = [measured.difference(name, other, resamples=options.resamples) for other in (best, UNIFORM, STATIC)]
        cells = [f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]" for gain, low, high in gains]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for name in mixtures:
        won = [measured.difference(name, other, resamples=options.resamples)[1] > 0 for other in (best, STATIC)]
        said = ["outside the interval" if one else "NOT outside the interval" for one in won]
        shares = ", ".join(
            f"{single} {share:.1%}" for single, share in zip(singles, measured.usage[name], strict=True)
        )
        lines.append(f"{name}: better than the best single expert {said[0]}, than the static weights {said[1]}. ")
        lines[-1] += f"Use: {shares}."
    lines += [
        "",
        f"{int(measured.tokens.sum())} tokens of {len(measured.sources)} documents; {unreadable} samples could not be "
        f"read; {options.resamples} resamples of documents.",
    ]
    return "\n".join(lines) + "\n"


def as_json(measured: Measured, costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The same, for programs."""
    return {
        "ways": {
            way: {
                "perplexity": {source: measured.perplexity(way, source) for source in measured.source_names},
                "nats": measured.mean_nats(way),
                "bits_per_byte": measured.bits_per_byte(way),
                **costs[way],
            }
            for way in measured.nats
        },
        "usage": measured.usage,
    }


def _mixture_folder(path: str) -> Path:
    """The folder of a mixture, or the run that it lies in."""
    folder = Path(path)
    return folder / RESULT if (folder / RESULT / CONFIG).exists() else folder


def _name_of(model: MoQEModel, folder: Path, folders: list[Path]) -> str:
    name = f"router, by {model.router.config.mode}"
    return name if len(folders) == 1 else f"{name} ({folder.parent.name if folder.name == RESULT else folder.name})"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
