"""`run`: collect, analyse, and write JSON, Parquet, the page and the pictures."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_json, write_text
from moe_ext.router_study.analysis.study import Study, run_study
from moe_ext.router_study.collect.collector import ActivationCollector, fingerprint
from moe_ext.router_study.collect.data import DatasetLoader, TokenRows, parse_sources
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.options import RunOptions, TextOptions
from moe_ext.router_study.report.drawings import Drawing
from moe_ext.router_study.report.extra import check_drawing
from moe_ext.router_study.report.figures import figures_of
from moe_ext.router_study.report.page import report_page
from moe_ext.router_study.report.passages import passages_of
from moe_ext.router_study.report.pictures import write_pictures
from moe_ext.router_study.report.tables import as_json, write_favourites, write_figures
from moe_ext.router_study.report.track import check_installed, log_scalars, scalars_of

logger = logging.getLogger(__name__)

PAGE, RESULTS, FINDINGS, PICTURES, LOGITS = "report.html", "study.json", "findings.md", "pictures", "logits"


def run(options: RunOptions) -> str:
    """Study a model, or several revisions of it."""
    check_installed(options.report_to)
    check_drawing()
    parse_sources(options.data)
    out, revisions = Path(options.out), options.revision or [None]
    folders = [out / Path(revision).name if revision else out for revision in revisions]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"Two revisions would be written to {folder}. Give one of them a command of its own.")
    runs = [
        begin(folder, "run", options, revision=revision) for folder, revision in zip(folders, revisions, strict=True)
    ]
    for one, revision in zip(runs, revisions, strict=True):
        if not one.is_done:
            study_model(options, revision, one)
    pages = ", ".join(str(folder / PAGE) for folder in folders)
    return f"{'The report lies' if len(folders) == 1 else 'The reports lie'} in {pages}"


def begin(out: str | Path, command: str, options: TextOptions, **more: Any) -> RunFolder:
    """The run of a command, whose report appears whole; until then what it has found lies beside it."""
    settings = {**asdict(options), **more}
    return RunFolder.beside(out, f"router_study {command}", settings, free=("out", "device"), option="--out")


def study_model(options: RunOptions, revision: str | None, run: RunFolder) -> None:
    """Study one model and write its folder."""
    wrapper = MoEModelWrapper.load(options.model, revision=revision, device=options.device, layers=options.layers)
    rows = rows_for(options, wrapper)
    run.know(**fingerprint(wrapper, rows))
    collector = ActivationCollector(
        wrapper, counts_mb=options.counts_mb, sample_mb=options.sample_mb, in_rank=options.as_in_script
    )
    with run:
        study = run_study(
            wrapper,
            rows,
            collector=collector,
            batch_size=options.batch_size,
            replicates=options.replicates,
            seed=options.seed,
            least_seen=options.least_seen,
            resume_folder=run.folder,
            save_logits=options.save_logits,
        )
        with run.whole_result() as partial:
            write_study(study, partial, options)
            if options.save_logits:
                (partial / LOGITS).mkdir()
                for file in sorted(run.folder.glob("logits-*.safetensors")):
                    shutil.copyfile(file, partial / LOGITS / file.name)
            scalars = scalars_of(study.measured, wrapper.gates.labels)
            log_scalars(options.report_to, scalars, name=wrapper.name, folder=partial / "tensorboard")


def write_study(study: Study, folder: Path, options: RunOptions) -> None:
    """Write the files of a study into a folder that is there."""
    activations, drawings = study.activations, figures_of(study)
    results = {
        "about": about(study.model, activations.tokens_by_domain, options),
        "layers": activations.gates.labels,
        "experts": activations.gates.num_experts,
        "chosen": activations.gates.num_chosen,
        "left_out": study.weights.left_out,
        "sentences": {drawing.name: drawing.sentence for drawing in drawings},
        **as_json(study.measured, study.weights.compared),
    }
    write_json(folder / RESULTS, results)
    write_figures(study.measured, activations, folder / "figures.parquet")
    write_favourites(activations, study.tokenizer, folder / "favourites.parquet", least_seen=options.least_seen)
    described = {
        "model": study.model,
        "mixture": f"{len(activations.gates)} routers, {activations.gates.num_experts} experts, "
        f"{activations.gates.num_chosen} a token",
        "text": ", ".join(f"{name} {count:,} tokens" for name, count in activations.tokens_by_domain.items())
        + f" ({options.split} split)",
        "controls": f"of {activations.sample.num_tokens:,} tokens; bootstrap of {options.replicates} draws, seed "
        f"{options.seed}",
        "made with": versions(),
    }
    title = f"What the routers of {study.model} do"
    write_text(folder / FINDINGS, as_list(title, described, drawings))
    write_drawn(
        folder,
        title,
        described,
        drawings,
        passages=passages_of(activations, study.tokenizer),
        num_experts=activations.gates.num_experts,
        notes=study.weights.left_out,
    )


def write_drawn(folder: Path, title: str, described: Mapping[str, str], drawings: list[Drawing], **held: Any) -> None:
    """The page and the pictures of some plots."""
    (folder / PAGE).write_text(report_page(title, described, drawings, **held), encoding="utf-8")
    (folder / PICTURES).mkdir()
    write_pictures(drawings, folder / PICTURES)


def as_list(title: str, described: Mapping[str, str], drawings: list[Drawing]) -> str:
    """What every plot shows, as Markdown."""
    facts = [f"- {name}: {value}" for name, value in described.items()]
    found = [f"- **{drawing.title}.** {drawing.sentence}" for drawing in drawings]
    return "\n".join([f"# {title}", "", *facts, "", "## Findings", "", *found, ""])


def rows_for(options: TextOptions, wrapper: MoEModelWrapper) -> dict[str, TokenRows]:
    """The text of the options, as tokens of this model.

    Raises:
        ValueError: rows longer than the model's context; all that the loader raises.
    """
    if wrapper.context is not None and options.row_tokens > wrapper.context:
        raise ValueError(
            f"row_tokens is {options.row_tokens}, but the model's context has {wrapper.context} tokens. "
            "Lower row_tokens."
        )
    loader = DatasetLoader(
        wrapper.tokenizer,
        split=options.split,
        max_tokens=options.max_tokens,
        row_tokens=options.row_tokens,
        seed=options.seed,
    )
    return loader.rows(parse_sources(options.data))


def about(model: str, tokens: Mapping[str, int], options: TextOptions) -> dict[str, Any]:
    """What a result was made from."""
    return {"model": model, "tokens": dict(tokens), "options": asdict(options), "versions": versions()}


def versions() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {_threads()}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
