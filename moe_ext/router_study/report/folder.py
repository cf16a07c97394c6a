"""The folder of a result: what it was made from, and its page with the pictures."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_common.runs.run_folder import RunFolder
from moe_ext.router_study.report.drawings import Drawing
from moe_ext.router_study.report.page import report_page
from moe_ext.router_study.report.pictures import write_pictures

PAGE, PICTURES = "report.html", "pictures"


def write_drawn(folder: Path, title: str, described: Mapping[str, str], drawings: list[Drawing], **held: Any) -> None:
    """The page and the pictures of some plots."""
    (folder / PAGE).write_text(report_page(title, described, drawings, **held), encoding="utf-8")
    (folder / PICTURES).mkdir()
    write_pictures(drawings, folder / PICTURES)


def about(model: str, tokens: Mapping[str, int], options: Any) -> dict[str, Any]:
    """What a result was made from; `options` is the dataclass of the command."""
    return {"model": model, "tokens": dict(tokens), "options": asdict(options), "versions": versions()}


def versions() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {_threads()}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def begin(out: str | Path, command: str, options: Any, **more: Any) -> RunFolder:
    """The run of a command, whose report appears whole; until then what it has found lies beside it."""
    settings = {**asdict(options), **more}
    return RunFolder.beside(out, f"router_study {command}", settings, free=("out", "device"), option="--out")
