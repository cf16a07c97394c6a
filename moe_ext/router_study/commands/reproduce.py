"""`reproduce olmoe`: the figures of the OLMoE paper, measured again and held against what it reports.

Muennighoff et al. 2024, "OLMoE: Open Mixture-of-Experts Language Models", arXiv:2409.02060, section 5.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_json, write_text
from moe_ext.router_study.analysis.evolution import Saturation, saturations
from moe_ext.router_study.analysis.study import Study, run_study
from moe_ext.router_study.collect.collector import ActivationCollector
from moe_ext.router_study.collect.data import parse_sources
from moe_ext.router_study.collect.revisions import in_order, resolve_revision
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.options import ReproduceOptions
from moe_ext.router_study.report.extra import check_drawing
from moe_ext.router_study.report.figures import figures_of
from moe_ext.router_study.report.folder import PAGE, about, begin, versions, write_drawn
from moe_ext.router_study.report.saturation import saturation_drawing
from moe_ext.router_study.report.tables import as_json

DOMAIN_LAYER = 7
# At about 1, 10, 20, 40 and 100 % of training.
OLMOE_REVISIONS = (
    "step5000-tokens20B",
    "step120000-tokens503B",
    "step245000-tokens1027B",
    "step490000-tokens2055B",
    "main",
)
# Of the paper's figures: how far a measured value may lie off and still be called the same. The text is another one.
NEAR = 0.08


@dataclass(frozen=True)
class Check:
    """One statement of the paper.

    Args:
        what: the statement.
        paper, measured: its value there and here, in words.
        holds: whether they agree; None where it cannot be told of this model.
    """

    what: str
    paper: str
    measured: str
    holds: bool | None


def reproduce_olmoe(options: ReproduceOptions) -> str:
    """Measure what the paper reports, and write a table of both."""
    run = begin(options.out, "reproduce olmoe", options)
    if run.is_done:
        return run.done
    check_drawing()
    parse_sources(options.data)
    names = [revision.name for revision in in_order(options.revisions or OLMOE_REVISIONS)]
    for name in names:
        resolve_revision(options.model, name)
    with run:
        table = _reproduce(options, names, run)
    return f"{table}The report lies in {Path(options.out) / PAGE}"


def _reproduce(options: ReproduceOptions, names: list[str], run: RunFolder) -> str:
    """Measure, write the report and give its table."""
    last = MoEModelWrapper.load(options.model, revision=names[-1], device=options.device, layers=options.layers)
    rows = options.rows(last)
    collector = ActivationCollector(last, in_rank=True)
    study = run_study(
        last,
        rows,
        collector=collector,
        batch_size=options.batch_size,
        seed=options.seed,
        least_seen=1,
        resume_folder=run.folder,
    )
    del last, collector
    found, labels, tokens = saturations(
        options.model,
        names,
        options.rows,
        device=options.device,
        layers=options.layers,
        batch_size=options.batch_size,
        seed=options.seed,
        measured=run.measured,
    )
    checks = checks_of(study, found)
    drawings = [saturation_drawing(found, labels, names[-1]), *figures_of(study)]
    with run.whole_result() as partial:
        results = {
            "about": about(options.model, tokens, options),
            "checks": [asdict(check) for check in checks],
            "saturation": [asdict(one) for one in found],
            **as_json(study.measured, study.weights.compared),
        }
        write_json(partial / "reproduction.json", results)
        write_text(partial / "table.md", as_table(checks))
        described = {"model": options.model, "revisions": ", ".join(names), "made with": versions()}
        write_drawn(partial, f"{options.model} beside the OLMoE paper", described, drawings)
    return as_table(checks)


def checks_of(study: Study, found: list[Saturation]) -> list[Check]:
    """The paper's statements about this study's figures."""
    measured, gates = study.measured, study.activations.gates
    checks = []
    for percent, value in ((1, 0.60), (40, 0.80)):
        one = _at(found, percent)
        mean = sum(one.chosen) / len(one.chosen) if one else float("nan")
        checks.append(
            Check(
                f"top-{gates.num_chosen} saturation at {percent}% of training",
                f"about {value:.0%} (chance 12.5%)",
                f"{mean:.1%} at {one.revision} (chance {one.chance:.1%})" if one else "no such revision",
                abs(mean - value) <= NEAR if one else None,
            )
        )
    strongest = measured["coactivation.strongest_as_in_script"].value
    checks.append(
        Check(
            "no strong co-activation: pairs as in the script, median over layers of the strongest",
            "a few pairs at 60%, most below 30%",
            f"{float(strongest.median()):.0%}",
            bool(strongest.median() <= 0.6),
        )
    )
    vocabulary = measured["vocabulary.input"].value
    third = max(1, len(vocabulary) // 3)
    early, late = float(vocabulary[:third].mean()), float(vocabulary[-third:].mean())
    checks.append(
        Check(
            "vocabulary specialisation rises with depth",
            "later layers are higher",
            f"{early:.0%} in the first third of the layers, {late:.0%} in the last",
            late > early if len(vocabulary) > 2 else None,
        )
    )
    rate = measured["domains.rate"]
    layer = min(DOMAIN_LAYER, rate.value.shape[1] - 1)
    most = float(rate.value[:, layer].max())
    chance = float(rate.chance[0, layer, 0])
    checks.append(
        Check(
            f"layer {gates.labels[layer]}: some experts are chosen far above chance in a domain",
            "experts up to several times the 12.5% of chance",
            f"up to {most:.0%} (chance {chance:.1%})",
            most >= 2 * chance,
        )
    )
    return checks


def _at(found: list[Saturation], percent: int) -> Saturation | None:
    """The revision that is nearest to this part of training, by steps; None where that is not known or far off."""
    # The last step is in no name of the hub's (main): 490,000 steps are 40 % (the authors' script says so).
    steps = {one.step: one for one in found if one.step}
    total = 490_000 / 0.40
    near = min(steps, key=lambda step: abs(100 * step / total - percent), default=None)
    if near is None or abs(100 * near / total - percent) > max(1, percent / 10):
        return None
    return steps[near]


def as_table(checks: list[Check]) -> str:
    """Markdown."""
    words = {True: "yes", False: "no", None: "cannot be told"}
    lines = ["| statement | paper | here | holds |", "| --- | --- | --- | --- |"]
    lines += [f"| {check.what} | {check.paper} | {check.measured} | {words[check.holds]} |" for check in checks]
    return "\n".join(lines) + "\n"
