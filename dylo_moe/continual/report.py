"""What a continual run came to: forgetting, the comparison with the baselines, a table and a picture.

Forgetting after a visit is the mean, over the skills met before and not just visited, of how much worse each is than
it was at its best before: in nats a token of log-perplexity, and in perplexity (Chaudhry et al. 2018,
arXiv:1801.10112, section 3, with log-perplexity in place of accuracy). Negative means that earlier skills gained.
"""

import math
from pathlib import Path

from moe_common.runs.drawing import load_pyplot
from moe_common.runs.whole_files import whole_file

RESULTS, TABLE, PICTURE = "results.json", "table.md", "forgetting.png"
NAMES = {"mixture": "growing mixture", "sequential": "one LoRA in sequence", "joint": "one LoRA on all at once"}


def forgetting(mean_nll: list[dict[str, float]], visits: list[str]) -> list[dict[str, float] | None]:
    """Forgetting after each visit.

    Args:
        mean_nll: for each visit, the nats a token of every skill met so far.
        visits: the skill of each visit.

    Returns:
        For each visit `nats` and `perplexity`; None where there is no earlier skill.
    """
    measured: list[dict[str, float] | None] = []
    for number, now in enumerate(mean_nll):
        old = [skill for skill in now if skill in visits[:number] and skill != visits[number]]
        if not old:
            measured.append(None)
            continue
        best = {skill: min(before[skill] for before in mean_nll[:number] if skill in before) for skill in old}
        measured.append(
            {
                "nats": sum(now[skill] - best[skill] for skill in old) / len(old),
                "perplexity": sum(math.exp(now[skill]) - math.exp(best[skill]) for skill in old) / len(old),
            }
        )
    return measured


def mean_perplexity(mean_nll: dict[str, float]) -> float:
    """Mean over the skills of the perplexity, each from its nats a token."""
    return sum(math.exp(nll) for nll in mean_nll.values()) / len(mean_nll)


def compare(results: dict) -> dict:
    """Forgetting of the mixture and of the sequential LoRA, the mean perplexities in the end, and the ratios."""
    visits, mean_nll = results["visits"], results["mean_nll"]
    compared: dict = {"forgetting": {"mixture": forgetting(mean_nll["mixture"], visits)}}
    compared["mean_perplexity"] = {"base": mean_perplexity(results["base"])}
    compared["mean_perplexity"]["mixture"] = mean_perplexity(mean_nll["mixture"][-1])
    if "sequential" in mean_nll:
        compared["forgetting"]["sequential"] = forgetting(mean_nll["sequential"], visits)
        compared["mean_perplexity"]["sequential"] = mean_perplexity(mean_nll["sequential"][-1])
        compared["mean_perplexity"]["joint"] = mean_perplexity(mean_nll["joint"])
        ours, theirs = (compared["forgetting"][name][-1] for name in ("mixture", "sequential"))
        if ours is not None and theirs["nats"] > 0:
            compared["forgetting_over_sequential"] = ours["nats"] / theirs["nats"]
        compared["mean_perplexity_over_joint"] = (
            compared["mean_perplexity"]["mixture"] / compared["mean_perplexity"]["joint"]
        )
    return compared


def as_text(results: dict, output: Path) -> str:
    """The results as Markdown tables, what the detector decided, and where everything lies."""
    skills, compared = results["skills"], results["comparison"]
    shown = {skill: Path(skill).name for skill in skills}
    split = results["settings"]["eval_split"]
    lines = [f"Held-out perplexity after each skill ({split} documents; lower is better)", ""]
    lines += _header(["", "after", *shown.values(), "mean", "forgetting, nats", "in perplexity", "parameters"])
    lines.append(_perplexity_row("base", "", results["base"], skills, None, 0))
    for system in ("mixture", "sequential"):
        if system not in results["mean_nll"]:
            continue
        for number, nll in enumerate(results["mean_nll"][system]):
            after = Path(results["visits"][number]).name
            lost = compared["forgetting"][system][number]
            size = results["trained_parameters"][system] if number == len(results["visits"]) - 1 else None
            lines.append(_perplexity_row(NAMES[system], after, nll, skills, lost, size))
    if "joint" in results["mean_nll"]:
        size = results["trained_parameters"]["joint"]
        lines.append(_perplexity_row(NAMES["joint"], "all", results["mean_nll"]["joint"], skills, None, size))
    lines += ["", "What the detector decided", ""]
    lines += _header(["skill", "nearest known", "similarity", "threshold", "decision", "expert"])
    for decision in results["decisions"]:
        near = decision["nearest"] is not None
        cells = [
            Path(decision["skill"]).name,
            Path(decision["nearest"]).name if near else "none",
            f"{decision['similarity']:.3f}" if near else "",
            f"{decision['threshold']:.3f}" if near else "",
            "new" if decision["is_novel"] else "known",
            decision["expert"],
        ]
        lines.append(_line(cells))
    lines += ["", "Mean weight of each expert on each skill's held-out tokens", ""]
    lines += _header(["", *results["experts"]])
    for skill, usage in results["usage"].items():
        lines.append(_line([shown[skill], *(f"{100 * share:.1f} %" for share in usage.values())]))
    lines.append("")
    if "forgetting_over_sequential" in compared:
        lines.append(f"forgetting over that of one LoRA in sequence: {compared['forgetting_over_sequential']:.3f}")
    if "mean_perplexity_over_joint" in compared:
        lines.append(f"mean perplexity over that of one LoRA on all: {compared['mean_perplexity_over_joint']:.3f}")
    lines.append(f"kept for the router's replay: {results['replay_bytes']:,} bytes of token ids")
    lines.append(f"seconds of this call: {results['seconds']:.0f}, processor time {results['cpu_seconds']:.0f}")
    last = f"{len(results['visits']):02d}"
    lines += ["", f"mixture   {output / 'mixture' / last}"]
    lines += [f"results   {output / RESULTS}", f"table     {output / TABLE}", f"picture   {output / PICTURE}"]
    return "\n".join(lines) + "\n"


def draw(results: dict, path: Path) -> None:
    """Write a picture (PNG): each skill's perplexity over the visits, and the forgetting; whole or not at all.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    plt = load_pyplot()
    from matplotlib.ticker import ScalarFormatter

    skills, visits, mean_nll = results["skills"], results["visits"], results["mean_nll"]
    labels = [Path(skill).name for skill in visits]
    panels = len(skills) + 1
    figure, axes = plt.subplots(1, panels, figsize=(1 + 3 * panels, 3.4), layout="constrained")
    looks = {"mixture": ("tab:blue", "o"), "sequential": ("tab:orange", "s")}
    for axis, skill in zip(axes, skills, strict=False):
        for system, (colour, marker) in looks.items():
            met = [(i, math.exp(nll[skill])) for i, nll in enumerate(mean_nll.get(system, [])) if skill in nll]
            if met:
                axis.plot(*zip(*met, strict=True), color=colour, marker=marker, label=NAMES[system])
        axis.axhline(math.exp(results["base"][skill]), color="grey", linestyle=":", label="base")
        if "joint" in mean_nll:
            axis.axhline(math.exp(mean_nll["joint"][skill]), color="black", linestyle="--", label=NAMES["joint"])
        axis.set_title(Path(skill).name)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.set_xticks(range(len(visits)), labels)
        axis.set_xlim(-0.3, len(visits) - 0.7)
    axes[0].set_ylabel("held-out perplexity")
    for system, (colour, marker) in looks.items():
        measured = results["comparison"]["forgetting"].get(system, [])
        points = [(i, lost["nats"]) for i, lost in enumerate(measured) if lost is not None]
        if points:
            axes[-1].plot(*zip(*points, strict=True), color=colour, marker=marker, label=NAMES[system])
    axes[-1].axhline(0, color="grey", linewidth=0.8)
    axes[-1].set_title("forgetting")
    axes[-1].set_ylabel("nats a token")
    axes[-1].set_xticks(range(len(visits)), labels)
    axes[-1].set_xlim(-0.3, len(visits) - 0.7)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    for axis in axes:
        axis.set_xlabel("after training on", fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)


def _perplexity_row(
    system: str,
    after: str,
    nll: dict[str, float],
    skills: list[str],
    lost: dict[str, float] | None,
    size: int | None,
) -> str:
    cells = [f"{math.exp(nll[skill]):.2f}" if skill in nll else "" for skill in skills]
    whole = len(nll) == len(skills)
    return _line(
        [
            system,
            after,
            *cells,
            f"{mean_perplexity(nll):.2f}" if whole else "",
            "" if lost is None else f"{lost['nats']:+.3f}",
            "" if lost is None else f"{lost['perplexity']:+.2f}",
            "" if size is None else f"{size:,}",
        ]
    )


def _header(cells: list[str]) -> list[str]:
    return [_line(cells), "|" + " --- |" * len(cells)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
