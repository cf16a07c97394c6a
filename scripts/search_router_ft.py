"""Choose objective and rate of `python -m moe_ext.router_ft run` on validation text.

    python scripts/search_router_ft.py --plan INT2 --output runs/router_ft_search

Every objective gets its own rate: from `--lr` on, it is tripled and divided by three until the best one has a worse
neighbour on either side. They are judged by the loss of validation text; no test text is read. What is on disk is not
measured again: a search that was interrupted goes on when it is started again with the same options.

Beside each stands what the same finetuning on the next token gains on the unquantised model: that part is no repair.
"""

import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np

from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.bracketing import bracket, lowest
from moe_common.runs.commands import run_command
from moe_common.runs.options import OptionParser, split_names
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_text
from moe_ext.router_ft.evaluate import mean_loss
from moe_ext.router_ft.objectives import ObjectiveName
from moe_ext.router_ft.study import Study, StudyOptions, parse_plan, prepare

logger = logging.getLogger("search_router_ft")

OBJECTIVES = get_args(ObjectiveName)
FACTOR = 3.0
TABLE = "search.md"
# Options of the search itself, which change none of the measurements.
FREE_OPTIONS = ("output", "device", "plan", "objectives", "objective", "lr")


@dataclass(kw_only=True)
class SearchOptions(StudyOptions):
    plan: str = field(default="INT2", metadata={"help": "The plan that is searched: a format, or SENSITIVITY@BITS."})
    objectives: str = field(default=",".join(OBJECTIVES), metadata={"help": "Objectives to try, comma separated."})
    output: str = field(default="runs/router_ft_search", metadata={"help": "Folder of the results and the table."})
    split: str = field(default="validation", metadata={"help": "Split of the text that they are judged by."})
    lr: float = field(default=3e-3, metadata={"help": "Rate that is tried first; those around it follow."})
    objective: ObjectiveName = field(default="ce", init=False)  # each of `objectives` in its turn

    def __post_init__(self):
        super().__post_init__()
        parse_plan(self.plan)
        for name in split_names(self.objectives):
            if name not in OBJECTIVES:
                raise ValueError(f"There is no objective '{name}'. There are: {', '.join(OBJECTIVES)}.")


def search(options: SearchOptions) -> str:
    """Measure all settings, and write the table."""
    folder = RunFolder(options.output, "search_router_ft.py", asdict(options), free=FREE_OPTIONS, option="--output")
    study = prepare(options, folder)
    with folder:
        text = _search(study, options)
        write_text(Path(options.output) / TABLE, text)
    return text


def _search(study: Study, options: SearchOptions) -> str:
    plan = study.plan(options.plan)
    before = mean_loss(study.measure(f"{options.plan}.gptq", lambda: study.by_gptq(plan)))
    full = mean_loss(study.full)

    def control(rate: float) -> dict[str, np.ndarray]:
        return study.measure(f"control.{rate:g}", lambda: study.finetuned(study.model, objective="ce", lr=rate))

    rows, best = [], {}
    for objective in split_names(options.objectives):

        def finetuned(rate: float, objective: str = objective) -> float:
            losses = study.measure(
                f"{options.plan}.{objective}.{rate:g}",
                lambda: study.finetuned(study.by_gptq(plan), objective=objective, lr=rate),
            )
            logger.info("%s, rate %g: %+.4f nats over full precision", objective, rate, mean_loss(losses) - full)
            return mean_loss(losses)

        losses = bracket(finetuned, options.lr, score=float, factor=FACTOR)
        rate = lowest(losses, float)
        best[losses[rate]] = f"--objective {objective} --lr {rate:.2g}"
        rows += [
            f"| {objective} | {rate:.2g} | {loss - full:+.4f} | {(before - loss) / (before - full):.1%} | "
            f"{full - mean_loss(control(rate)):+.4f} |"
            for rate, loss in losses.items()
        ]
    return "\n".join(
        [
            f"{options.plan} by GPTQ: {before - full:+.4f} nats a token over full precision, on {options.split} text.",
            "",
            "| objective | rate | after finetuning | recovered | the control gains |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"best: {best[min(best)]}\n",
        ]
    )


def search_and_write(options: SearchOptions) -> str:
    return f"{search(options)}\ntable   {Path(options.output) / TABLE}"


def main(argv: list[str] | None = None) -> int:
    about, _, example = __doc__.splitlines()[:3]
    parser = OptionParser((SearchOptions,), description=about, epilog=f"example:\n{example.strip()}")
    keep_freed_memory()
    return run_command(parser, search_and_write, argv)


if __name__ == "__main__":
    sys.exit(main())
