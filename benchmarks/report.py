"""The results as one Markdown page, one JSON file and the plots."""

import json
import statistics
from pathlib import Path

from benchmarks.engine import held_parts
from benchmarks.measure import ratio
from benchmarks.operators import as_text
from benchmarks.plots import draw
from benchmarks.targets import targets
from moe_common.runs.whole_files import whole_file

MiB = 2**20


def write_report(output: Path, command: str) -> list[Path]:
    """Write `results.json`, `README.md` and the plots of all parts that lie in a folder.

    Args:
        output: folder with the parts' files.
        command: what repeats the run, for the head of the page.

    Returns:
        The files written.
    """
    results = held_parts(output)
    pictures = draw(results)
    files = {f"{name}.svg": content for name, content in pictures.items()}
    files["results.json"] = json.dumps(results) + "\n"
    files["README.md"] = as_markdown(results, command, list(pictures))
    for name, content in files.items():
        with whole_file(output / name) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return [output / name for name in files]


def as_markdown(results: dict[str, dict], command: str, pictures: list[str]) -> str:
    """The page: what it ran on, targets, a table for each group, checks.

    Args:
        results: the parts' results by name, at least one.
        command: as for `write_report`.
        pictures: names of the plots, without their ending.
    """
    rank = next(iter(results.values()))["made_with"]["setting"]["size"]["rank"]
    lines = [*_head(results, command), *_targets(results, rank)]
    lines += [f"![{name}]({name}.svg)\n" for name in pictures]
    for result in results.values():
        for group in result["groups"]:
            lines += [f"## {group['title']}", "", _table(result["part"], group), ""]
    checks = [check for result in results.values() for check in result["checks"]]
    if checks:
        lines += ["## Checked in these runs", "", "| what | largest difference | tolerance |", "| --- | --- | --- |"]
        lines += [f"| {c['check']} | {c['difference']:.1e} | {c['tolerance']:.0e} |" for c in checks]
        lines += ["", "A difference of logits is a share of what the experts add to them.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _head(results: dict[str, dict], command: str) -> list[str]:
    made_with = next(iter(results.values()))["made_with"]
    setting, facts = made_with["setting"], made_with["machine"]
    size = setting["size"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "transformers", "peft"))
    codes = {result["made_with"]["code"] for result in results.values()}
    took = sum(result["took"] for result in results.values())
    lines = [
        f"# Benchmarks: {setting['dtype']} on {setting['device'].upper()}",
        "",
        f"- {facts['processor']}, {facts['system']}; {versions}; commit {facts['commit']}",
        f"- Command: `{command}`, {took / 60:.0f} minutes",
        f"- Base: Llama-type, random weights, hidden {size['hidden']}, {size['layers']} blocks, intermediate "
        f"{size['intermediate']}, {size['heads']} heads, vocabulary {size['vocab']}. One sequence of {size['tokens']} "
        f"tokens. Adapters of rank {size['rank']} on all 7 linear layers of a block; all of them train.",
        f"- Ratios: median of {made_with['rounds']} rounds in one process, all ways of a table in turns; in brackets "
        "the quartiles. Beside each, the ratio of the operations of its matrix products, as torch counts them.",
    ]
    if setting["dtype"] == "bfloat16":
        lines.append(
            "- bfloat16: without gradients the adapters are bfloat16 too (`autocast_adapter_dtype=False`); a training "
            "step keeps them in float32 under `torch.autocast`, as PEFT and the Trainer do. Arrow raises there."
        )
    if len(codes) > 1:
        lines.append("- The parts were measured with **different versions of the code**; run them with `--again`.")
    return [*lines, ""]


def _targets(results: dict[str, dict], rank: int) -> list[str]:
    found = targets(results, rank)
    if not found:
        return []
    lines = ["## Targets", "", "| what | target | measured | |", "| --- | --- | --- | --- |"]
    lines += [f"| {t.what} | {t.wanted} | {t.measured} | {'met' if t.met else '**missed**'} |" for t in found]
    return [*lines, ""]


def _table(part: str, group: dict) -> str:
    if part == "operators":
        return as_text(group)
    if part == "memory":
        return _memory_table(group)
    return _speed_table(group)


def _speed_table(group: dict) -> str:
    rows = group["rows"]
    has_limit = any(_limit_of(row, rows) for row in rows)
    tokens = any("tokens" in row for row in rows)
    head = ["", "tokens/s" if tokens else "ms", "time, ratio", "operations, ratio"]
    head += ["time over one LoRA of the same arithmetic"] * has_limit
    if any(row.get("x") is not None for row in rows) and not group["name"].startswith("experts"):
        head.insert(1, group["name"].partition("-")[0])
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        reference = reference_of(row, group)
        median = statistics.median(row["seconds"])
        cells = [row["label"], f"{row['tokens'] / median:.1f}" if tokens else f"{median * 1e3:.1f}"]
        if len(head) - has_limit == 5:
            cells.insert(1, str(row["x"]))
        cells += [str(ratio(row["seconds"], reference["seconds"])), f"{row['flops'] / reference['flops']:.2f}"]
        if has_limit:
            limit = _limit_of(row, rows)
            cells.append(str(ratio(row["seconds"], limit["seconds"])) if limit else "")
        lines.append(_line(cells))
    return "\n".join(lines)


def reference_of(row: dict, group: dict) -> dict:
    """The row that this one is divided by: the group's reference, at the same tokens or rank where it has those."""
    same = [other for other in group["rows"] if other["way"] == group["reference"]]
    return next((other for other in same if other.get("x") == row.get("x")), same[0])


def _limit_of(row: dict, rows: list[dict]) -> dict | None:
    same_size = [other for other in rows if other["way"] == row["limit"] and other.get("x") == row.get("x")]
    return same_size[0] if same_size else None


def _memory_table(group: dict) -> str:
    rows = {row["way"]: row for row in group["rows"]}
    head = ["", "forward, peak MiB", "training step, peak MiB", "ratio", "over one LoRA of the same arithmetic"]
    head.append("kept for backward, MiB")
    lines = [_line(head), _line(["---"] * len(head))]
    reference = rows[group["reference"]]["training_peak"]
    for row in group["rows"]:
        limit = rows.get(row["limit"])
        peak, saved = row.get("training_peak"), row.get("saved")
        cells = [
            row["label"],
            f"{row['forward_peak'] / MiB:.1f}",
            "" if peak is None else f"{peak / MiB:.1f}",
            "" if peak is None else f"{peak / reference:.2f}",
            "" if peak is None or limit is None else f"{peak / limit['training_peak']:.3f}",
            "" if saved is None else f"{saved / MiB:.1f}",
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
