"""The model card of a saved adapter: a README.md that says what lies in the folder, and what was measured of it.

PEFT writes a card whenever it saves (metadata, tags, its version) and keeps the text of one that is there. The text is
ours: a part on the adapter, written anew at each save, and a part on its training and its figures. Each stands between
two marks; whatever else a user writes into the file stays as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel

from dylo_moe.experts import lora_weights
from dylo_moe.skills import SkillLibrary
from moe_common.models.perplexity import measure_texts
from moe_common.runs.whole_files import write_text

CARD = "README.md"
HEADER = "---\nlibrary_name: peft\n---\n"  # PEFT adds the base model, tags and what the model is for
MARKS = "<!-- {part}: written by the program, lines up to the next mark are replaced -->", "<!-- end of {part} -->"

LOAD = "## Load it"
BY_PEFT = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this/folder")
```"""
BY_DYLORA = """```python
from dylo_moe import DyLoRA_MoE

model = DyLoRA_MoE.from_pretrained("this/folder")
```

or, without its skills and settings (the base in the precision it is stored in, unless `dtype` says another):"""
HELD = """Experts and router are in `adapter_model.safetensors`, the base is not; it needs the PEFT that has
`MoELoraConfig`."""


def describe_mixture(
    model: PeftModel, folder: str | Path, *, base_name: str, skills: SkillLibrary | None = None
) -> None:
    """Write the card's part on a mixture; before it is saved, so that PEFT adds to it rather than a form to fill in.

    Args:
        model: made of a `MoELoraConfig`, or a `DyLoRA_MoE`.
        folder: where it is saved.
        base_name: how its base is found.
        skills: those of a `DyLoRA_MoE`, which is loaded as one; None for a mixture of the fork alone.
    """
    config, gates = model.base_model.mixture_config, model.base_model.moe_router
    router = config.router_config()
    kept = f"top-{router.top_k} of {config.num_experts}"
    weighed = f"all experts in training, {kept} at inference" if router.selection == "hybrid" else kept
    losses = {"balance": router.balance_coef, "z": router.z_coef, "entropy": router.entropy_coef}
    facts = {
        "base model": _named(base_name, model.get_base_model().config),
        "router": f"scope `{router.scope}`, {len(gates.gates)} gates; {weighed}",
        "temperature": f"{router.temperature:g}",
        "router's losses": ", ".join(f"{name} {weight:g}" for name, weight in losses.items() if weight) or "none",
        "parameters": f"{sum(_num_parameters(model, name) for name in config.expert_names):,} in the experts, "
        f"{sum(parameter.numel() for parameter in gates.parameters()):,} in the router",
    }
    experts = [_expert_row(model, name) for name in config.expert_names]
    lines = [f"# Mixture of {len(experts)} LoRA experts", "", *_table(("", ""), facts.items()), ""]
    lines += _table(("expert", "rank", "alpha", "adapted layers", "parameters"), experts)
    if skills:
        rows = [(shown(skill.name), skill.expert or "", skill.num_blocks) for skill in skills]
        lines += ["", *_table(("skill", "expert", "blocks in its embedding"), rows)]
    load = [LOAD, "", BY_PEFT] if skills is None else [LOAD, "", BY_DYLORA, "", BY_PEFT]
    _write_part(Path(folder), "adapter", [*lines, "", *load, "", HELD])


def describe_lora(model: PeftModel, folder: str | Path, *, base_name: str) -> None:
    """Write the card's part on one LoRA, the only adapter of a model; `base_name` is how its base is found."""
    config = model.peft_config[model.active_adapter]
    facts = {
        "base model": _named(base_name, model.get_base_model().config),
        "alpha": f"{config.lora_alpha:g}",
        "adapted layers": _targets(config),
        "parameters": f"{_num_parameters(model, model.active_adapter):,}",
    }
    lines = [f"# LoRA of rank {config.r}", "", *_table(("", ""), facts.items())]
    _write_part(Path(folder), "adapter", [*lines, "", LOAD, "", BY_PEFT])


def describe_training(
    folder: str | Path, facts: Mapping[str, Any], perplexity: Mapping[str, Mapping[str, float]], *, measured_on: str
) -> None:
    """Write the card's part on how an adapter was trained and what was measured of it.

    Args:
        folder: where the adapter is saved.
        facts: what to know of the training, by name: data, steps, rates.
        perplexity: of each system (this adapter, its base, others), by dataset.
        measured_on: which text that was.
    """
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = ["## Training", "", *_table(("", ""), {**facts, "software": versions}.items()), ""]
    if perplexity:
        datasets = list(next(iter(perplexity.values())))
        rows = [(system, *(f"{found[name]:.2f}" for name in datasets)) for system, found in perplexity.items()]
        lines += ["## Measured", "", f"Perplexity (lower is better) on {measured_on}.", ""]
        lines += _table(("", *map(shown, datasets)), rows)
    _write_part(Path(folder), "training", lines)


def measure_and_describe(
    model: PeftModel, tokenizer, folder: str | Path, held_out: Mapping[str, Iterable[str]], facts: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Measure an adapter and its base on the first 16 blocks of 256 tokens of held-out text; write it into the card.

    Args:
        model: with the adapter active.
        tokenizer: the base's.
        folder: where the adapter is saved.
        held_out: documents of each dataset.
        facts: as in `describe_training`.

    Returns:
        Perplexity of `base` and `this adapter` by dataset.
    """

    def measure() -> dict[str, float]:
        few = {"block_size": 256, "max_blocks": 16}
        return {name: measure_texts(model, tokenizer, texts, **few).perplexity for name, texts in held_out.items()}

    with model.disable_adapter():
        base = measure()
    perplexity = {"base": base, "this adapter": measure()}
    describe_training(folder, facts, perplexity, measured_on="the first 16 blocks of 256 tokens of each test split")
    return perplexity


def shown(dataset: str) -> str:
    """A dataset's name for readers elsewhere: of a path on this machine, its last part."""
    return Path(dataset).name if Path(dataset).exists() else dataset


def _write_part(folder: Path, part: str, lines: Sequence[str]) -> None:
    begin, end = (mark.format(part=part) for mark in MARKS)
    written = "\n".join([begin, "", *lines, "", end])
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else HEADER
    before, there, rest = text.partition(begin)
    write_text(path, before + written + rest.partition(end)[2] if there else f"{text.rstrip()}\n\n{written}\n")


def _expert_row(model: PeftModel, name: str) -> tuple:
    config = model.peft_config[name]
    return name, config.r, f"{config.lora_alpha:g}", _targets(config), f"{_num_parameters(model, name):,}"


def _named(name: str, config: transformers.PretrainedConfig) -> str:
    text = config.get_text_config()
    size = f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.vocab_size:,} tokens"
    return f"`{name or 'without a name'}` ({config.model_type}, {size})"


def _targets(config: LoraConfig) -> str:
    targets = config.target_modules
    return f"`{targets}`" if isinstance(targets, str) else ", ".join(sorted(targets))


def _num_parameters(model: PeftModel, adapter: str) -> int:
    return sum(parameter.numel() for parameter in lora_weights(model, adapter))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
