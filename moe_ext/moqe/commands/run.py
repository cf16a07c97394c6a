"""`run`: sets of experts from one model, routers for each set and a table; what is there is not made again."""

import logging
from dataclasses import asdict, fields
from pathlib import Path

from moe_common.runs.options import split_names
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_text
from moe_ext.moqe.experts.quantize import quantize
from moe_ext.moqe.experts.schemes import is_scheme
from moe_ext.moqe.options import EvalOptions, QuantizeOptions, RunOptions, TrainOptions
from moe_ext.moqe.training.report import evaluate
from moe_ext.moqe.training.train import CACHE, train

logger = logging.getLogger(__name__)

TABLE = "table.md"
FREE_OPTIONS = ("output", "cache_dir", "cache_gb", "save_steps", "logging_steps")


def run(options: RunOptions) -> str:
    """Make, train and measure; returns the tables in Markdown.

    Raises:
        ValueError, FileNotFoundError: as the single steps.
    """
    run_folder = RunFolder(options.output, "moqe run", asdict(options), free=FREE_OPTIONS, option="--output")
    with run_folder:
        return _run_sets(options, run_folder.folder)


def _run_sets(options: RunOptions, folder: Path) -> str:
    tables = []
    for number, schemes in enumerate(options.sets, start=1):
        own = folder / f"set-{number}"
        table = own / TABLE
        if not table.exists():
            logger.info("set %d: %s", number, schemes)
            experts = _experts(options, schemes, folder / "experts")
            held = {"expert_paths": experts, "cache_dir": options.cache_dir or str(folder / CACHE)}
            for mode in options.modes:
                held["epochs"] = options.sequence_epochs if mode == "sequence" else options.epochs
                train(_as(TrainOptions, options, mode=mode, save_dir=str(own / mode), **held))
            evaluate(
                _as(
                    EvalOptions,
                    options,
                    checkpoint_path=[str(own / mode) for mode in options.modes],
                    expert_paths=None,
                    reference=options.reference or options.model,
                    max_tokens=options.test_tokens,
                    output=str(table),
                )
            )
        tables.append(f"### {schemes.replace(',', ', ')}\n\n{table.read_text(encoding='utf-8')}")
    write_text(folder / TABLE, "\n".join(tables))
    return "\n".join([*tables, f"The tables lie in {folder / TABLE}"])


def _experts(options: RunOptions, entries: str, folder: Path) -> list[str]:
    """What `quantize` makes of the schemes in a set, and the other entries as they are."""
    names = split_names(entries)
    schemes = [name for name in names if is_scheme(name)]
    made: dict[str, Path] = {}
    if schemes:
        made = dict(
            zip(
                schemes,
                quantize(_as(QuantizeOptions, options, schemes=",".join(schemes), output=str(folder))),
                strict=True,
            )
        )
    return [str(made.get(name, name)) for name in names]


def _as(options_class, options: RunOptions, **changed):
    """The options of one step: those of the run that it knows, and what is changed."""
    known = {part.name for part in fields(options_class)}
    held = {part.name: getattr(options, part.name) for part in fields(options) if part.name in known}
    return options_class(**{**held, **changed})
