"""`evolution`: the saturation of the routing over revisions of a model."""

from dataclasses import asdict
from pathlib import Path

import torch

from moe_common.runs.run_folder import Measured
from moe_common.runs.whole_files import write_json
from moe_ext.router_study.analysis.evolution import Saturation, follow
from moe_ext.router_study.collect.data import TokenRows, parse_sources
from moe_ext.router_study.collect.revisions import in_order, resolve_revision
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.commands.run import PAGE, about, begin, rows_for, versions, write_drawn
from moe_ext.router_study.options import EvolutionOptions
from moe_ext.router_study.report.drawings import Drawing, Lines, Series
from moe_ext.router_study.report.extra import check_drawing


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
        found, labels, tokens = saturations(options, names, run.measured)
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


def saturations(
    options: EvolutionOptions, names: list[str], measured: Measured
) -> tuple[list[Saturation], list[str], dict[str, int]]:
    """The comparisons, the labels of the gates, and the tokens of each domain."""
    tokens: dict[str, int] = {}

    def load(name: str) -> MoEModelWrapper:
        return MoEModelWrapper.load(options.model, revision=name, device=options.device, layers=options.layers)

    def joined_rows(wrapper: MoEModelWrapper) -> TokenRows:
        rows = rows_for(options, wrapper)
        tokens.update({domain: held.num_tokens for domain, held in rows.items()})
        return TokenRows(
            torch.cat([held.ids_NS for held in rows.values()]), torch.cat([held.mask_NS for held in rows.values()])
        )

    found, labels = follow(
        names, load, joined_rows, batch_size=options.batch_size, seed=options.seed, measured=measured
    )
    return found, labels, tokens


def saturation_drawing(found: list[Saturation], labels: list[str], last: str) -> Drawing:
    """Curves of all layers over the revisions."""
    series = [
        Series(
            f"layer {label}",
            [one.chosen[layer] for one in found],
            [one.low[layer] for one in found],
            [one.high[layer] for one in found],
            group=layer,
        )
        for layer, label in enumerate(labels)
    ]
    series.append(Series("chance", [one.chance for one in found], role="chance"))
    shuffled = [sum(one.shuffled) / len(one.shuffled) for one in found]
    series.append(Series("shuffled", shuffled, role="shuffled", group=6))
    first, mean = found[0], sum(found[0].chosen) / len(labels)
    latest = found[-1]
    more = f", at {_short(latest.revision)} {sum(latest.chosen) / len(labels):.0%}" if len(found) > 1 else ""
    return Drawing(
        "saturation",
        "Router saturation",
        f"At {_short(first.revision)} tokens choose {mean:.0%} of the experts that they choose at {_short(last)}"
        f"{more}; by chance {first.chance:.1%}, shuffled tokens {shuffled[0]:.0%}.",
        Lines([_short(one.revision) for one in found], series, "revision", "part of the final experts"),
    )


def _short(revision: str) -> str:
    return Path(revision).name
