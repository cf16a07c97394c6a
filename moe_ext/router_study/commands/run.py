"""`run`: collect, analyse, and write JSON, Parquet, the page and the pictures."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_json, write_text
from moe_ext.router_study.analysis.study import Study, run_study
from moe_ext.router_study.collect.collector import ActivationCollector, fingerprint
from moe_ext.router_study.collect.data import parse_sources
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.options import RunOptions
from moe_ext.router_study.report.drawings import Drawing
from moe_ext.router_study.report.extra import check_drawing
from moe_ext.router_study.report.figures import figures_of
from moe_ext.router_study.report.folder import PAGE, about, begin, versions, write_drawn
from moe_ext.router_study.report.passages import passages_of
from moe_ext.router_study.report.tables import as_json, write_favourites, write_figures
from moe_ext.router_study.report.track import check_installed, log_scalars, scalars_of

logger = logging.getLogger(__name__)

RESULTS, FINDINGS, LOGITS = "study.json", "findings.md", "logits"


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


def study_model(options: RunOptions, revision: str | None, run: RunFolder) -> None:
    """Study one model and write its folder."""
    wrapper = MoEModelWrapper.load(options.model, revision=revision, device=options.device, layers=options.layers)
    rows = options.rows(wrapper)
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


def as_list(title: str, described: Mapping[str, str], drawings: list[Drawing]) -> str:
    """What every plot shows, as Markdown."""
    facts = [f"- {name}: {value}" for name, value in described.items()]
    found = [f"- **{drawing.title}.** {drawing.sentence}" for drawing in drawings]
    return "\n".join([f"# {title}", "", *facts, "", "## Findings", "", *found, ""])
