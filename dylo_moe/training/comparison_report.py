"""What a run of a mixture beside one LoRA found: the tables that are printed, and what its model cards tell."""

from pathlib import Path

from dylo_moe.model_card import describe_training, shown
from moe_common.runs.options import split_names

RESULTS, PICTURE = "results.json", "usage.png"
MIXTURE, LORA = "mixture", "lora"
NAMES = {"base": "base", LORA: "one LoRA", MIXTURE: "mixture"}


def as_text(results: dict, output: Path) -> str:
    """The results as tables a person reads."""
    perplexity, speed = results["perplexity"], results["tokens_per_second"]
    sizes = {"base": 0, **results["trained_parameters"]}
    domains = list(perplexity["base"])
    lines = ["", "Held-out perplexity (lower is better) and trained parameters", ""]
    lines.append(_row("", [*(Path(domain).name for domain in domains), "parameters"]))
    for key, name in NAMES.items():
        if key not in perplexity:
            continue
        lines.append(_row(name, [f"{perplexity[key][domain]:.2f}" for domain in domains] + [f"{sizes[key]:,}"]))
    experts = len(next(iter(results["usage"].values()))[0])
    lines += ["", "Share of each domain's tokens by expert, mean over the blocks", ""]
    lines.append(_row("", [f"expert {i}" for i in range(experts)]))
    for domain, usage_LE in results["usage"].items():
        shares = [sum(row[i] for row in usage_LE) / len(usage_LE) for i in range(experts)]
        lines.append(_row(Path(domain).name, [f"{100 * share:.0f} %" for share in shares]))
    lines += ["", "Tokens/s in one forward pass, measured in turns", ""]
    lines.append(_row("", ["tokens/s", "against base"]))
    separate = f"{experts} separate passes"
    for key, name in {"base": "base", "routed": "one routed pass", "separate": separate}.items():
        lines.append(_row(name, [f"{speed[key]:,.0f}", f"{speed[key] / speed['base']:.2f}"]))
    gain = speed["routed"] / speed["separate"]
    lines.append(f"one routed pass does the work of {experts} separate passes {gain:.2f} times as fast")
    lines += ["", "Continuations by the saved mixture, reloaded", ""]
    for domain, (prompt, continuation) in results["continuations"].items():
        lines.append(f"{Path(domain).name}:{_one_line(prompt)} ->{_one_line(continuation)}")
    lines += ["", f"adapter   {output / MIXTURE}", f"results   {output / RESULTS}", f"picture   {output / PICTURE}"]
    return "\n".join(lines)


def describe_adapter(folder: Path, results: dict, adapter: str) -> None:
    """Add to an adapter's model card what it was trained on, and how it and the others did."""
    data, training = results["settings"]["data"], results["settings"]["training"]
    quant = results["settings"]["run"]["quant"]
    names = split_names(data["datasets"])
    length = f"{training['num_steps']} steps" if training["num_steps"] else f"{training['num_epochs']:g} epochs"
    rows = f"{training['train_batch_size']} x {training['gradient_accumulation_steps']}"
    facts = {
        "data": f"{', '.join(map(shown, names))}; {data['training_subset']:g} % of the training documents",
        "length": f"{length}; {rows} rows of {data['max_seq_length']} tokens on each device",
        "learning rate": f"{training['learning_rate']:g}, {training['lr_strategy']}",
        "quantised base": {"none": "no"}.get(quant, quant),
        "seed": training["seed"],
    }
    perplexity = {
        f"{NAMES[name]} (this)" if name == adapter else NAMES[name]: found
        for name, found in results["perplexity"].items()
    }
    some = f"the first {data['eval_blocks']} rows of " if data["eval_blocks"] else ""
    describe_training(folder, facts, perplexity, measured_on=f"{some}the test split of each dataset")


def _one_line(text: str) -> str:
    return " " + " ".join(text.split())


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells)
