"""Check that routed LoRA computes what it says, on a model of your choice, and show where a fault lies."""

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dylo_moe.equivalence.models import Source, open_checkpoint, open_model
from dylo_moe.equivalence.report import as_json, as_table
from dylo_moe.equivalence.validate import validate
from moe_common.models.base_model import COMMITTED
from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.commands import INTERRUPTED
from moe_common.runs.options import PlainParser
from moe_common.runs.whole_files import write_text

# Tokens of one forward in the speed table, as in `make bench`; fewer for a model that knows fewer positions.
BENCHMARK_TOKENS = 512


def main(argv: list[str] | None = None, *, speed_table: Callable[[], ModuleType] | None = None) -> int:
    """Print the table; returns 1 if a check failed, 0 otherwise. Bad input ends with exit code 2 and one line.

    Args:
        argv: words of the command line; by default those of the process.
        speed_table: imports benchmarks/table.py, which only a checkout has.
    """
    try:
        return _main(argv, speed_table)
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        return INTERRUPTED


def _main(argv: list[str] | None, speed_table: Callable[[], ModuleType] | None) -> int:
    parser = PlainParser(__doc__, example="dylo-moe-validate --model smollm2-135m --json results/validation.json")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model",
        metavar="NAME",
        default=COMMITTED,
        help="base model for random experts: base (committed), smollm2-135m, a folder or a hub id",
    )
    what.add_argument("--checkpoint", metavar="DIR", help="a saved mixture or folder of LoRA adapters instead")
    parser.add_argument("--benchmark", action="store_true", help="measure a speed table too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results to this file")
    options = parser.parse_args(argv)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    keep_freed_memory()
    try:
        if options.json is not None:
            _refuse_unwritable(options.json)
        if options.benchmark and speed_table is None:
            raise ValueError("--benchmark needs benchmarks/ of the repository. Run validate_moe_modifications.py.")
        speed = speed_table() if options.benchmark else None
        source = open_checkpoint(options.checkpoint) if options.checkpoint is not None else open_model(options.model)
    except (ValueError, OSError, ImportError) as refused:
        parser.error(_one_line(refused))

    results = validate(source)
    print(as_table(results))
    rows = None
    if speed is not None:
        measured = speed.speed_table(_bare_base(source), num_tokens=_num_tokens(source))
        print("\n" + speed.as_markdown(measured))
        rows = [asdict(row) for row in measured]
    if options.json is not None:
        try:
            write_text(options.json, as_json(source, results, rows))
        except OSError as refused:
            parser.error(f"{options.json} cannot be written: {_one_line(refused)}")
    return int(any(result.verdict == "fail" for result in results))


def _refuse_unwritable(path: Path) -> None:
    """Raise before the long work if a file cannot be written there."""
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(f"--json {path} lies in the folder {path.parent}, which is not there. Make it first.")
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    partial.unlink()


def _bare_base(source: Source) -> Callable[[], PreTrainedModel]:
    """A function that loads the base model anew, without adapters, onto the device it was checked on."""

    def load() -> PreTrainedModel:
        base = AutoModelForCausalLM.from_pretrained(source.base.name_or_path, dtype=source.base.dtype)
        return base.to(source.base.device).eval()

    return load


def _num_tokens(source: Source) -> int:
    positions = getattr(source.base.config.get_text_config(), "max_position_embeddings", None)
    return min(BENCHMARK_TOKENS, positions or BENCHMARK_TOKENS)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
