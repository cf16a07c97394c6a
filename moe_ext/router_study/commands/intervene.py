"""`intervene`: the loss of each domain without an expert, or with its tokens sent elsewhere."""

from dataclasses import asdict
from pathlib import Path

from moe_common.runs.whole_files import write_json
from moe_ext.router_study.analysis.causal import Effect, intervene, overrule_for
from moe_ext.router_study.collect.collector import ActivationCollector, fingerprint
from moe_ext.router_study.collect.data import parse_sources
from moe_ext.router_study.collect.totals import totals_of
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.options import InterveneOptions
from moe_ext.router_study.report.drawings import Bars, Drawing, PerLayer, Series
from moe_ext.router_study.report.extra import check_drawing
from moe_ext.router_study.report.folder import PAGE, about, begin, versions, write_drawn


def intervene_on(options: InterveneOptions) -> str:
    """Change one expert at a time."""
    run = begin(options.out, "intervene", options)
    if run.is_done:
        return run.done
    check_drawing()
    parse_sources(options.data)
    wrapper = MoEModelWrapper.load(options.model, device=options.device, layers=options.layers)
    overrule_for(options.to, 0, wrapper.gates.num_experts)
    rows = options.rows(wrapper)
    run.know(**fingerprint(wrapper, rows))
    with run:
        activations = ActivationCollector(wrapper).collect_router_activations(rows, batch_size=options.batch_size)
        chosen_DLE = totals_of(activations.counts, len(rows)).chosen_DLE
        share_DLE = chosen_DLE / chosen_DLE.sum(dim=-1, keepdim=True)
        domains = list(rows)
        effects = intervene(
            wrapper,
            rows,
            lambda place, expert, domain: float(share_DLE[domains.index(domain), place, expert]),
            to=options.to,
            experts=options.experts,
            batch_size=options.batch_size,
            seed=options.seed,
            measured=run.measured,
        )
        drawing = effects_drawing(effects, domains, options.to)
        with run.whole_result() as partial:
            results = {
                "about": about(options.model, activations.tokens_by_domain, options),
                "sentence": drawing.sentence,
                "effects": [asdict(effect) for effect in effects],
            }
            write_json(partial / "effects.json", results)
            described = {"model": options.model, "experts' tokens go": options.to, "made with": versions()}
            write_drawn(partial, f"What the experts of {options.model} are for", described, [drawing])
    return f"{drawing.sentence}\nThe report lies in {Path(options.out) / PAGE}"


def effects_drawing(effects: list[Effect], domains: list[str], to: str) -> Drawing:
    """Bars of the change of loss by expert and domain, one plot a layer."""
    layers = sorted({(effect.layer, effect.label) for effect in effects})
    plots = []
    for layer, _ in layers:
        here = [effect for effect in effects if effect.layer == layer]
        experts = sorted({effect.expert for effect in here})
        series = []
        for group, domain in enumerate(domains):
            of_domain = [effect for effect in here if effect.domain == domain]
            series.append(
                Series(
                    domain,
                    [effect.change for effect in of_domain],
                    [effect.low for effect in of_domain],
                    [effect.high for effect in of_domain],
                    group=group,
                )
            )
        for group, domain in enumerate(domains):
            controls = [effect.control for effect in here if effect.domain == domain]
            series.append(Series(f"{domain}, at random", controls, role="shuffled", group=group))
        plots.append(Bars([str(expert) for expert in experts], series, "expert", "change of loss, nats", 0.0))
    worst = max(effects, key=lambda effect: effect.change)
    mean = sum(effect.change for effect in effects) / len(effects)
    control = sum(effect.control for effect in effects) / len(effects)
    where = {"nowhere": "Without", "next": "With the next best in place of"}.get(to, f"With expert {to} in place of")
    return Drawing(
        "effects",
        "What an expert is for",
        f"{where} expert {worst.expert} of layer {worst.label} the loss of {worst.domain} rises by {worst.change:.3f} "
        f"nats [{worst.low:.3f}, {worst.high:.3f}]; as many choices taken away at random cost {worst.control:.3f}. "
        f"Over all experts the mean is {mean:.3f}, at random {control:.3f}; an expert that does nothing gives 0.",
        PerLayer([label for _, label in layers], plots),
    )
