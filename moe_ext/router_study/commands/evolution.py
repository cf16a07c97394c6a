"""`evolution`: the saturation of the routing over revisions of a model."""

from dataclasses import asdict
from pathlib import Path

from moe_common.runs.whole_files import write_json
from moe_ext.router_study.analysis.evolution import saturations
from moe_ext.router_study.collect.data import parse_sources
from moe_ext.router_study.collect.revisions import in_order, resolve_revision
from moe_ext.router_study.options import EvolutionOptions
from moe_ext.router_study.report.extra import check_drawing
from moe_ext.router_study.report.folder import PAGE, about, begin, versions, write_drawn
from moe_ext.router_study.report.saturation import saturation_drawing


def evolution(options: EvolutionOptions) -> str:
    """Compare revisions with the last of them."""
    run = begin(options.out, "evolution", options)
    if run.is_done:
        return run.done
    check_drawing()
    parse_sources(options.data)
    names = [revision.name for revision in in_order(options.revisions)]
    for name in names:
        resolve_revision(options.model, name)  # before the first is read
    with run:
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
        drawing = saturation_drawing(found, labels, names[-1])
        with run.whole_result() as partial:
            results = {
                "about": about(options.model, tokens, options),
                "last": names[-1],
                "layers": labels,
                "sentence": drawing.sentence,
                "saturation": [asdict(one) for one in found],
            }
            write_json(partial / "saturation.json", results)
            described = {"model": options.model, "revisions": ", ".join(names), "made with": versions()}
            write_drawn(partial, f"How the routers of {options.model} came to be", described, [drawing])
    return f"{drawing.sentence}\nThe report lies in {Path(options.out) / PAGE}"
