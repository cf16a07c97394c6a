"""The plots of a study, each with one sentence: what is seen, and what chance would give."""

import math

import torch
from torch import Tensor

from moe_ext.router_study.analysis.measure import Measured
from moe_ext.router_study.analysis.study import Study
from moe_ext.router_study.report.drawings import Bars, Drawing, Flow, Heat, Lines, PerLayer, Series

WIDEST_SIMILARITY = 512  # rows of the routers; above, the map is a blur and the page heavy
STREAMS_OF_A_STEP = 40
ANGLE = 180 / math.pi


def figures_of(study: Study) -> list[Drawing]:
    """All plots that this study has results for, in the order of the page."""
    many_domains = len(study.activations.domains) > 1
    many_layers = len(study.activations.gates) > 1
    drawings = [_usage(study), _evenness(study), _entropy(study), _confidence(study)]
    drawings += [_domains(study)]
    if many_domains:
        drawings += [_divergence(study)]
    if study.activations.gates.num_chosen > 1:
        drawings += [_coactivation(study), _pairs(study)]
    if bool(torch.isfinite(study.measured["vocabulary.input"].value).all()):
        drawings += [_vocabulary(study)]
    drawings += [_repetition(study)]
    if many_layers:
        drawings += [_across(study), _flow(study), _paths(study)]
    return drawings + _weights(study)


def _usage(study: Study) -> Drawing:
    share, E = study.measured["load.share"], study.activations.gates.num_experts
    times_LE = share.value * E
    layer, expert = divmod(int(times_LE.argmax()), E)
    return Drawing(
        "usage",
        "Use of the experts",
        f"The busiest expert, {expert} of layer {_labels(study)[layer]}, gets {times_LE.max():.2f} times an "
        f"even share and the idlest {times_LE.min():.2f} times; by chance all get 1, and a shuffle of the experts' "
        f"names gives {(share.shuffled * E).min():.2f} to {(share.shuffled * E).max():.2f}.",
        Heat(_rows(times_LE), _numbers(E), _labels(study), "expert", "layer", "share / even share", centre=1.0),
    )


def _evenness(study: Study) -> Drawing:
    found = study.measured["load.variation"]
    return Drawing(
        "load",
        "Unevenness of the loads",
        f"The coefficient of variation of the experts' loads is {_range(found.value)}; tokens that choose at random "
        f"would give {_range(found.chance)}.",
        _by_layer(study, [("measured", found)], "coefficient of variation"),
    )


def _entropy(study: Study) -> Drawing:
    found = study.measured["confidence.entropy"]
    return Drawing(
        "entropy",
        "Entropy of a token's scores",
        f"The entropy of a token's probabilities is {_percent(found.value)} of the largest; by chance, of a gate "
        f"without preference, it is 100%, and of shuffled scores {_percent(found.shuffled)}.",
        _by_layer(study, [("measured", found)], "entropy / log E"),
    )


def _confidence(study: Study) -> Drawing:
    top1, mass, margin = (study.measured[f"confidence.{name}"] for name in ("top1", "mass", "margin"))
    return Drawing(
        "confidence",
        "Confidence of the gates",
        f"The first choice has a probability of {_percent(top1.value)} (by chance {_percent(top1.chance)}), "
        f"all chosen experts together {_percent(mass.value)} (by chance {_percent(mass.chance)}), and the last one "
        f"chosen leads the next by {_range(margin.value)} (by chance 0).",
        _by_layer(study, [("top-1", top1), ("all chosen", mass), ("margin k to k + 1", margin)], "probability"),
    )


def _domains(study: Study) -> Drawing:
    rate, domains = study.measured["domains.rate"], study.activations.domains
    E = study.activations.gates.num_experts
    chance_L = rate.chance[0, :, 0]
    place = int((rate.value / rate.chance).argmax())
    domain, layer, expert = place // (E * len(chance_L)), place // E % len(chance_L), place % E
    plots = [
        Bars(
            _numbers(E),
            [
                Series(
                    name,
                    rate.value[d, gate].tolist(),
                    rate.low[d, gate].tolist(),
                    rate.high[d, gate].tolist(),
                    group=d,
                )
                for d, name in enumerate(domains)
            ],
            "expert",
            "part of the domain's tokens",
            float(chance_L[gate]),
        )
        for gate in range(len(chance_L))
    ]
    return Drawing(
        "domains",
        "Experts by domain",
        f"Expert {expert} of layer {_labels(study)[layer]} is chosen by {rate.value[domain, layer, expert]:.0%} of "
        f"the tokens of {domains[domain]}, where chance, the dashed line, gives {chance_L[layer]:.1%}.",
        PerLayer(_labels(study), plots),
    )


def _divergence(study: Study) -> Drawing:
    found = study.measured["domains.divergence"]
    most = math.log(len(study.activations.domains))
    return Drawing(
        "divergence",
        "How far domains lie apart",
        f"The Jensen-Shannon divergence of the domains is {_range(found.value)} nats of at most {most:.2f}; with the "
        f"tokens shuffled among the domains it is {_range(found.shuffled)}, and chance gives 0.",
        _by_layer(study, [("measured", found)], "Jensen-Shannon divergence, nats"),
    )


def _coactivation(study: Study) -> Drawing:
    found, E = study.measured["coactivation.conditional"], study.activations.gates.num_experts
    place = int((found.value - found.chance).argmax())
    layer, one, other = place // (E * E), place // E % E, place % E
    plots = [
        Heat(_rows(table), _numbers(E), _numbers(E), "expert j", "expert i", "P(j | i) less chance", centre=0.0)
        for table in found.value - found.chance
    ]
    return Drawing(
        "coactivation",
        "Experts chosen together",
        f"Of the tokens of expert {one} in layer {_labels(study)[layer]}, {found.value[layer, one, other]:.0%} choose "
        f"expert {other} as well, where drawing by load gives {found.chance[layer, one, other]:.0%}; white is chance.",
        PerLayer(_labels(study), plots),
    )


def _pairs(study: Study) -> Drawing:
    found = study.measured["coactivation.strongest"]
    series = [("all pairs", found)]
    if (in_script := study.measured.get("coactivation.strongest_as_in_script")) is not None:
        series.append(("neighbours in rank", in_script))
    return Drawing(
        "pairs",
        "The strongest pair",
        f"The pair that is chosen together most has P(j | i) = {_percent(found.value)}; drawing by load gives "
        f"{_percent(found.chance)}, and shuffled scores {_percent(found.shuffled)}.",
        _by_layer(study, series, "max P(j | i)"),
    )


def _vocabulary(study: Study) -> Drawing:
    kinds = [("input token", "input"), ("next token", "next"), ("predicted token", "predicted")]
    series = [(title, study.measured[f"vocabulary.{name}"]) for title, name in kinds]
    first = series[0][1]
    way = "falls" if first.value[-1] < first.value[0] else "rises"
    return Drawing(
        "vocabulary",
        "Vocabulary specialisation",
        f"The favourite expert of an input id is the first choice of {first.value[0]:.0%} of its tokens in the first "
        f"layer and {way} to {first.value[-1]:.0%} in the last; evenly drawn choices give {first.chance[0]:.0%}, "
        f"shuffled ones {_percent(first.shuffled)}.",
        _by_layer(study, series, "mean over ids of max N(x,e) / N(x)"),
    )


def _repetition(study: Study) -> Drawing:
    first, either = study.measured["repetition.first"], study.measured["repetition.either"]
    series = [("same first choice", first)]
    if study.activations.gates.num_chosen > 1:
        series.append(("any expert shared", either))
    shared = (
        f", and {_percent(either.value)} share an expert (by chance {_percent(either.chance)})"
        if len(series) > 1
        else ""
    )
    return Drawing(
        "repetition",
        "Repetition from token to token",
        f"{_percent(first.value)} of the tokens have the first choice of the token before (by chance "
        f"{_percent(first.chance)}, shuffled {_percent(first.shuffled)}){shared}.",
        _by_layer(study, series, "part of neighbouring tokens"),
    )


def _across(study: Study) -> Drawing:
    found, labels = study.measured["coactivation.across_layers"], _labels(study)
    apart = ~torch.eye(len(labels), dtype=torch.bool)
    return Drawing(
        "across",
        "Correlation across layers",
        f"An expert's choice correlates with that of its best partner in another layer by "
        f"{_range(found.value[apart])}; with each layer's tokens shuffled it is {_range(found.shuffled[apart])}.",
        Heat(
            _rows(found.value.masked_fill(~apart, float("nan"))),
            labels,
            labels,
            "partner in layer",
            "layer",
            "mean of the largest |phi|",
        ),
    )


def _flow(study: Study) -> Drawing:
    found, E = study.measured["transitions.probability"], study.activations.gates.num_experts
    share = study.measured["load.share"].value
    streams = []
    for step, table in enumerate(found.value):
        width_EE = table * share[step][:, None]
        kept = width_EE.flatten().argsort(descending=True)[:STREAMS_OF_A_STEP].tolist()
        streams += [(step, cell // E, cell % E, float(width_EE.flatten()[cell])) for cell in kept]
    information = study.measured["transitions.information"]
    place = int((found.value - found.chance).argmax())
    step, one, other = place // (E * E), place // E % E, place % E
    return Drawing(
        "flow",
        "From layer to layer",
        f"From expert {one} of layer {_labels(study)[step]} {found.value[step, one, other]:.0%} of the choices go to "
        f"expert {other} of the next, by chance {found.chance[step, one, other]:.0%}; a choice tells "
        f"{_range(information.value)} nats of the next one (shuffled {_range(information.shuffled)}). The "
        f"{min(STREAMS_OF_A_STEP, E * E)} widest streams of each step are drawn.",
        Flow([[f"{label}.{expert}" for expert in range(E)] for label in _labels(study)], streams),
    )


def _paths(study: Study) -> Drawing:
    found, labels = study.measured["paths.entropy"], _labels(study)
    length = min(3, len(labels))
    windows = [f"{labels[start]}-{labels[start + length - 1]}" for start in range(len(found.value))]
    distinct = study.measured["paths.distinct"]
    return Drawing(
        "paths",
        f"Paths through {length} layers",
        f"{_range(distinct.value, 0)} different paths of first choices are taken, with an entropy of "
        f"{_range(found.value)} nats; shuffled tokens take {_range(distinct.shuffled, 0)}, with "
        f"{_range(found.shuffled)}.",
        Lines(windows, _series([("measured", found)])[:1] + _series([("measured", found)])[2:], "layers", "nats"),
    )


def _weights(study: Study) -> list[Drawing]:
    held, labels, drawings = study.weights, _labels(study), []
    compared = {found.name: found for found in held.compared}
    E = study.activations.gates.num_experts
    if held.similarity is not None and len(held.similarity) <= WIDEST_SIMILARITY:
        names = [f"{label}.{expert}" for label in labels for expert in range(E)]
        cosine = compared["weights.cosine"]
        drawings.append(
            Drawing(
                "similarity",
                "Similarity of the routers' rows",
                f"Two rows of a router have a mean |cosine| of {cosine.mean:.3f}; random directions have "
                f"{cosine.chance:.3f}.",
                Heat(_rows(held.similarity), names, names, "layer.expert", "layer.expert", "cosine", centre=0.0),
            )
        )
    if held.spectra is not None:
        rank = compared["weights.effective_rank"]
        longest = max(len(spectrum) for spectrum in held.spectra) - 1  # centred on the mean row, the last one is 0
        series = [
            Series(f"layer {label}", (spectrum / spectrum[0]).tolist()[:longest], group=number)
            for number, (label, spectrum) in enumerate(zip(labels, held.spectra, strict=True))
        ]
        random = held.random_spectrum / held.random_spectrum[0]
        series.append(Series("random", random.tolist()[:longest], role="chance"))
        drawings.append(
            Drawing(
                "spectra",
                "Spectra of the routers",
                f"The routers' rows have an effective rank of {rank.mean:.1f} of {E}; random rows have "
                f"{rank.chance:.1f}.",
                Lines(_numbers(longest), series, "singular value", "size / largest"),
            )
        )
    if held.subspaces is not None and len(held.subspaces["pairs"]):
        pairs, angles = held.subspaces["pairs"].tolist(), held.subspaces["angles"] * ANGLE
        near = [number for number, (one, other) in enumerate(pairs) if other == one + 1]
        series = [
            Series(
                f"layers {labels[pairs[number][0]]}, {labels[pairs[number][1]]}", angles[number].tolist(), group=place
            )
            for place, number in enumerate(near)
        ]
        series.append(Series("random", (held.subspaces["random"] * ANGLE).tolist(), role="chance"))
        drawings.append(
            Drawing(
                "angles",
                "Angles between router subspaces",
                f"The closest directions of two layers' routers are {_range(angles[:, 0], 0)} degrees apart; those of "
                f"random subspaces {float(held.subspaces['random'][0]) * ANGLE:.0f}.",
                Lines(_numbers(angles.shape[1]), series, "principal angle", "degrees"),
            )
        )
    if held.alignment_LEE is not None:
        found = compared["experts.alignment"]
        plots = [
            Heat(_rows(table), _numbers(E), _numbers(E), "expert", "router row", "alignment", centre=1.0)
            for table in held.alignment_LEE
        ]
        drawings.append(
            Drawing(
                "alignment",
                "Routers and their experts",
                f"An expert answers its own router row {found.mean:.2f} times as strongly as a random direction and "
                f"those of others {found.shuffled:.2f} times; chance gives 1.",
                PerLayer(labels, plots),
            )
        )
    if held.norm_ranks_LEE is not None:
        found = compared["experts.norm_rank"]
        plots = [
            Heat(_rows(table), _numbers(E), _numbers(E), "rank by output norm", "rank by gate", "P", centre=1 / E)
            for table in held.norm_ranks_LEE
        ]
        drawings.append(
            Drawing(
                "norms",
                "Gate and output norm",
                f"The ranks of an expert by gate and by the length of its output correlate by {found.mean:.2f} (by "
                f"chance 0, shuffled {found.shuffled:.2f}); white is 1 / E.",
                PerLayer(labels, plots),
            )
        )
    if "experts.agreement" in compared:
        found = compared["experts.agreement"]
        drawings.append(
            Drawing(
                "agreement",
                "Alike rows, alike experts",
                f"Similarity of router rows and similarity of experts' weights correlate by {_range(found.values)}; "
                f"renamed experts give {found.shuffled:.2f}, chance 0.",
                Lines(
                    labels,
                    [
                        Series("measured", found.values.tolist()),
                        Series("chance", [found.chance] * len(labels), role="chance"),
                        Series("renamed", [found.shuffled] * len(labels), role="shuffled"),
                    ],
                    "layer",
                    "correlation",
                ),
            )
        )
    return drawings


def _by_layer(study: Study, found: list[tuple[str, Measured]], y_title: str) -> Lines:
    return Lines(_labels(study), _series(found), "layer", y_title)


def _series(found: list[tuple[str, Measured]]) -> list[Series]:
    """Each figure with its band, then chance and control; of several with one chance, chance is drawn once."""
    series = []
    for group, (name, measured) in enumerate(found):
        series.append(
            Series(name, measured.value.tolist(), measured.low.tolist(), measured.high.tolist(), group=group)
        )
        repeated = group and torch.allclose(measured.chance, found[0][1].chance, atol=5e-3)
        if not repeated:
            series.append(Series("chance", measured.chance.tolist(), role="chance", group=group))
        series.append(Series("shuffled", measured.shuffled.tolist(), role="shuffled", group=group))
    return series


def _labels(study: Study) -> list[str]:
    return study.activations.gates.labels


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _rows(table: Tensor) -> list[list[float]]:
    return table.tolist()


def _range(values: Tensor, digits: int = 3) -> str:
    low, high = (f"{float(bound):.{digits}f}" for bound in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _percent(values: Tensor) -> str:
    low, high = (f"{100 * float(bound):.3g}" for bound in (values.min(), values.max()))
    return f"{low}%" if low == high else f"{low} to {high}%"
