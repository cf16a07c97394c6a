"""A mixture against one LoRA of the same size, on several domains: train both, measure, draw, and say where it lies.

    results = run(MixtureConfig(), TrainingConfig(), RunConfig(output_dir="runs/first"))

What is on disk is not made again: a run that was broken off continues where it was when started with the same
settings.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import set_seed

from dylo_moe.adapters import MixtureConfig, add_lora_of_size, add_mixture, num_trained
from dylo_moe.base_model import load_base_model
from dylo_moe.data import load_documents
from dylo_moe.expert_usage import draw_usage, usage_by_block
from dylo_moe.packing import pack_documents
from dylo_moe.perplexity import measure_blocks
from dylo_moe.throughput import tokens_per_second
from dylo_moe.training import TrainingConfig, is_trained, train_adapter

logger = logging.getLogger(__name__)

SETTINGS, RESULTS, PICTURE = "settings.json", "results.json", "usage.png"


@dataclass(kw_only=True)
class RunConfig:
    """What the run is about and where it goes."""

    model_name: str = field(
        default="base", metadata={"help": "Base model: base (committed), smollm2-135m, a folder, or a hub name."}
    )
    datasets: str = field(
        default="prose,code,math",
        metadata={"help": "Domains, comma separated: prose, code, math, files, folders or hub datasets."},
    )
    output_dir: str = field(default="runs/first", metadata={"help": "Folder of the adapters and the results."})
    eval_blocks: int = field(default=64, metadata={"help": "Held-out blocks of each domain that are measured."})

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("datasets names no dataset. Give at least one, e.g. --datasets prose,code.")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"datasets names one twice: {self.datasets}. Give each once.")
        if self.eval_blocks < 1:
            raise ValueError(f"eval_blocks is {self.eval_blocks}, but must be at least 1.")

    @property
    def domains(self) -> list[str]:
        return [name.strip() for name in self.datasets.split(",") if name.strip()]


def run(mixture: MixtureConfig, training: TrainingConfig, config: RunConfig) -> dict:
    """Train, measure and draw; returns what `results.json` holds.

    Raises:
        ValueError: the output folder holds a run with other settings.
    """
    output = Path(config.output_dir)
    settings = {"mixture": asdict(mixture), "training": asdict(training), "run": asdict(config)}
    _refuse_other_settings(output, settings)
    base, tokenizer = load_base_model(config.model_name)
    logger.info("reading %s", ", ".join(config.domains))
    train_blocks, held_out = _read(config, training, tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    _write(output / SETTINGS, settings)

    mixture_folder, lora_folder = output / "mixture", output / "lora"
    set_seed(training.seed)
    model = add_mixture(base, mixture)
    size = num_trained(model)
    if is_trained(mixture_folder):
        logger.info("the mixture in %s is trained already", mixture_folder)
    else:
        logger.info("training a mixture of %d experts (%s parameters)", mixture.num_experts, f"{size:,}")
        train_adapter(model, train_blocks, training, mixture_folder)

    base, _ = load_base_model(config.model_name)
    set_seed(training.seed)
    lora = add_lora_of_size(base, size, mixture)
    lora_size = num_trained(lora)
    if is_trained(lora_folder):
        logger.info("the LoRA in %s is trained already", lora_folder)
    else:
        logger.info("training one LoRA of rank %d (%s parameters)", lora.peft_config["default"].r, f"{lora_size:,}")
        train_adapter(lora, train_blocks, training, lora_folder)

    logger.info("measuring what was saved, on held-out text")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = PeftModel.from_pretrained(load_base_model(config.model_name)[0], lora_folder).to(device)
    model = AutoPeftModelForCausalLM.from_pretrained(mixture_folder, dtype=base.dtype).to(device)
    results = {
        "settings": settings,
        "trained_parameters": {"lora": lora_size, "mixture": size},
        "perplexity": _perplexities(model, lora, held_out, training),
        "tokens_per_second": _speeds(model, next(iter(held_out.values())), training),
    }
    usage = {domain: usage_by_block(model, blocks) for domain, blocks in held_out.items()}
    results["usage"] = {domain: usage_LE.tolist() for domain, usage_LE in usage.items()}
    results["continuations"] = _continuations(model, tokenizer, config)
    draw_usage(usage, model.mixture_config.expert_names, output / PICTURE)
    _write(output / RESULTS, results)
    return results


def as_text(results: dict, output: Path) -> str:
    """The results as tables a person reads."""
    perplexity, speed = results["perplexity"], results["tokens_per_second"]
    sizes = {"base": 0, **results["trained_parameters"]}
    domains = list(perplexity["base"])
    lines = ["", "Held-out perplexity (lower is better) and trained parameters", ""]
    lines.append(_row("", [*(Path(domain).name for domain in domains), "parameters"]))
    names = {"base": "base", "lora": "one LoRA", "mixture": "mixture"}
    for key, name in names.items():
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
        lines.append(f"{Path(domain).name}:{prompt} ->{_one_line(continuation)}")
    lines += ["", f"adapter   {output / 'mixture'}", f"results   {output / RESULTS}", f"picture   {output / PICTURE}"]
    return "\n".join(lines)


def _refuse_other_settings(output: Path, settings: dict) -> None:
    file = output / SETTINGS
    if not file.exists():
        return
    held = json.loads(file.read_text())
    differs = [
        f"{name} ({held[part].get(name)} there, {value} asked for)"
        for part, values in settings.items()
        for name, value in values.items()
        if held[part].get(name) != value
    ]
    if differs:
        raise ValueError(
            f"{output} holds a run with other settings: {'; '.join(differs)}. Choose another --output_dir, or remove "
            "that folder."
        )


def _read(config: RunConfig, training: TrainingConfig, tokenizer) -> tuple[Dataset, dict[str, Dataset]]:
    """Training blocks, the same number of each domain and shuffled, and the held-out blocks of each domain."""
    needed = -(-training.num_steps * training.train_batch_size // len(config.domains))
    parts, held_out = [], {}
    for domain in config.domains:
        parts.append(_blocks(domain, "train", tokenizer, training, needed))
        held_out[domain] = _blocks(domain, "test", tokenizer, training, config.eval_blocks)
    return concatenate_datasets(parts).shuffle(seed=training.seed), held_out


def _blocks(domain: str, split: str, tokenizer, training: TrainingConfig, count: int) -> Dataset:
    documents = load_documents(domain, split)
    order = sorted(range(len(documents)), key=lambda i: hashlib.sha256(f"{training.seed} {i}".encode()).digest())
    texts, characters = [], 0
    for index in order:  # reading on until there is surely enough: a token is at most so many characters on average
        texts.append(documents[index]["text"])
        characters += len(texts[-1])
        if characters > count * training.max_seq_length * 8:
            break
    blocks = pack_documents(texts, tokenizer, block_size=training.max_seq_length, keep_remainder=len(texts) < 2)
    return blocks.select(range(min(count, len(blocks))))


def _perplexities(model, lora, held_out: dict[str, Dataset], training: TrainingConfig) -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = {"base": {}, "lora": {}, "mixture": {}}
    for domain, blocks in held_out.items():
        with model.disable_adapter():
            measured["base"][domain] = measure_blocks(model, blocks).perplexity
        measured["lora"][domain] = measure_blocks(lora, blocks).perplexity
        measured["mixture"][domain] = measure_blocks(model, blocks).perplexity
    return measured


def _speeds(model, blocks: Dataset, training: TrainingConfig) -> dict[str, float]:
    rows = blocks.select(range(min(8, len(blocks)))).with_format("torch")
    return tokens_per_second(model, model.mixture_config.expert_names, rows["input_ids"][:].to(model.device))


def _continuations(model, tokenizer, config: RunConfig) -> dict[str, tuple[str, str]]:
    continued = {}
    for domain in config.domains:
        words = load_documents(domain, "test")[0]["text"].split(" ")
        prompt = tokenizer(" ".join(words[:16]), return_tensors="pt", add_special_tokens=False)["input_ids"][:, :48]
        prompt = prompt.to(model.device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=40,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        continuation = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
        continued[domain] = (_one_line(tokenizer.decode(prompt[0])), continuation)
    return continued


def _one_line(text: str) -> str:
    return " " + " ".join(text.split())


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells)


def _write(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2))
    os.replace(partial, path)
