"""All steps in one command, for several plans, with the table that compares them.

For each plan: the model in full precision, rounded to nearest, quantised by GPTQ, and that with finetuned routers; and
what the same finetuning does to the routers of the unquantised model, which is the control. A plan is a uniform format
(`INT3`) or an allocation (`lower_alpha@3.125`: that sensitivity, that many bits a weight).

A measurement that a folder already holds is not made again: an interrupted run goes on with the same command.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_common.runs.options import split_names
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_text
from moe_ext.router_ft.evaluate import mean_loss
from moe_ext.router_ft.recovery import Recovery
from moe_ext.router_ft.study import StudyOptions, parse_plan, prepare

TABLE = "table.md"
# Options that change none of the measurements, so that a run may be continued with others.
FREE_OPTIONS = ("output", "device", "plans", "allocations")


@dataclass(kw_only=True)
class RunOptions(StudyOptions):
    plans: str = field(
        default="INT4,INT3,INT2,lower_alpha@2.625",
        metadata={"help": "Plans that are compared in full, comma separated: a format, or SENSITIVITY@BITS."},
    )
    allocations: str = field(
        default="", metadata={"help": "Further plans, of which only the quantised model is measured."}
    )

    def __post_init__(self):
        super().__post_init__()
        for spec in [*split_names(self.plans), *split_names(self.allocations)]:
            parse_plan(spec)


def run(options: RunOptions) -> str:
    """Measure every plan and write the table."""
    folder = RunFolder(options.output, "router_ft run", asdict(options), free=FREE_OPTIONS, option="--output")
    study = prepare(options, folder)
    with folder:
        full, control = study.full, study.control
        rows = [study.row(spec) for spec in split_names(options.plans)]
        allocations = [study.allocation_row(spec) for spec in split_names(options.allocations)]
        text = as_table(full, control, rows, allocations)
        write_text(Path(options.output) / TABLE, text)
    return f"{text}\nwritten to {Path(options.output) / TABLE}"


def as_table(
    full: dict[str, np.ndarray],
    control: dict[str, np.ndarray],
    rows: list[dict[str, Any]],
    allocations: list[dict[str, Any]],
) -> str:
    """The results as Markdown: losses in nats a token, what they add to full precision, and the recovery."""
    base, gained = mean_loss(full), mean_loss(full) - mean_loss(control)
    lines = [
        f"Full precision: {base:.4f} nats a token (perplexity {math.exp(base):.2f}). The control, the same finetuning "
        f"of its routers on the next token, gains {gained:+.4f}.",
        "",
        "| plan | bits a weight | round to nearest | GPTQ | GPTQ + routers | recovered | beyond the control, 95 % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        recovery: Recovery = row["recovery"]
        lines.append(
            f"| {row['plan']} | {row['bits']:.3f} | {row['rounded'] - base:+.4f} | {row['gptq'] - base:+.4f} | "
            f"{row['finetuned'] - base:+.4f} | {recovery.plain:.1%} | {recovery.beyond_control:.1%} "
            f"[{recovery.low:.1%}, {recovery.high:.1%}] |"
        )
    if allocations:
        lines += ["", "| plan | bits a weight | GPTQ |", "| --- | --- | --- |"]
        lines += [f"| {row['plan']} | {row['bits']:.3f} | {row['gptq'] - base:+.4f} |" for row in allocations]
    return "\n".join(lines) + "\n"
