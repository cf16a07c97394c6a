"""What a growing mixture is measured against: one LoRA of as many parameters, in sequence, or on all at once.

In sequence, the LoRA learns each skill as it arrives, with the steps and the text that the mixture has for it: what it
forgets is what continual learning is about. All at once, it sees every skill's text mixed for as many steps as all
visits together: the bound, which needs all text at the same time.
"""

import logging
import shutil
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed

from dylo_moe.continual.data import SkillText
from dylo_moe.continual.lr_schedule import two_phase_factor
from dylo_moe.continual.steps import train_steps
from dylo_moe.target_modules import find_target_modules, has_transposed_weights
from moe_common.models.base_model import load_base_model
from moe_common.models.perplexity import measure_blocks
from moe_common.runs.whole_files import read_json, whole_folder, write_json

logger = logging.getLogger(__name__)

VISIT = "visit.json"


def train_in_sequence(config, folder: Path, *, texts: dict[str, SkillText], num_parameters: int) -> dict:
    """One LoRA, skill after skill; a visit that is on disk is not made again.

    Args:
        config: the run's `ContinualConfig`.
        folder: receives a folder for each visit.
        texts: of each skill.
        num_parameters: that the LoRA should have.

    Returns:
        `parameters`, and `mean_nll`: for each visit, of all skills so far, in nats a token.
    """
    done = []
    for number, skill in enumerate(config.continual):
        visit_folder = folder / f"{number + 1:02d}"
        if not (visit_folder / VISIT).exists():
            model = _start(config, num_parameters, folder / f"{number:02d}" if number else None)
            _train(
                model,
                texts[skill].visits[config.continual[:number].count(skill)],
                config,
                rate=config.sequential_learning_rate,
                num_steps=config.steps_a_visit,
                number=number,
                folder=visit_folder,
                name=f"one LoRA in sequence, {skill}",
            )
            so_far = [other for other in config.skills if other in config.continual[: number + 1]]
            _write(model, config, visit_folder, {other: texts[other].measured for other in so_far})
        done.append(read_json(visit_folder / VISIT))
    return {"parameters": done[-1]["parameters"], "mean_nll": [visit["mean_nll"] for visit in done]}


def train_joint(config, folder: Path, *, texts: dict[str, SkillText], num_parameters: int) -> dict:
    """One LoRA on the text of all visits at once; arguments and result as `train_in_sequence`, with one `mean_nll`."""
    if not (folder / VISIT).exists():
        model = _start(config, num_parameters, None)
        blocks = concatenate_datasets([part for text in texts.values() for part in text.visits])
        _train(
            model,
            blocks,
            config,
            rate=config.joint_learning_rate,
            num_steps=config.steps_a_visit * len(config.continual),
            number=0,
            folder=folder,
            name="one LoRA on all at once",
        )
        _write(model, config, folder, {name: text.measured for name, text in texts.items()})
    return read_json(folder / VISIT)


def add_lora_of(base: nn.Module, num_parameters: int, *, alpha_over_r: float, dropout: float) -> PeftModel:
    """Put one LoRA on a base, of the ranks that together come closest to a number of trained parameters.

    One rank for all layers would miss the number by up to half a rank's parameters; so the lower blocks may have one
    rank more than the upper ones.

    Args:
        base: a causal language model of transformers; changed in place.
        num_parameters: to come close to.
        alpha_over_r: the scaling of the update.
        dropout: on the LoRA's input in training.
    """
    targets = find_target_modules(base)
    output = base.get_output_embeddings()
    layers = {
        name: sum(module.weight.shape)
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in targets and module is not output
    }
    rank = max(1, num_parameters // sum(layers.values()))
    left, higher = num_parameters - rank * sum(layers.values()), []
    for name, size in layers.items():
        if size > left:
            break
        higher.append(name)
        left -= size
    return get_peft_model(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=alpha_over_r * rank,
            rank_pattern=dict.fromkeys(higher, rank + 1),
            alpha_pattern=dict.fromkeys(higher, alpha_over_r * (rank + 1)),
            lora_dropout=dropout,
            target_modules=targets,
            fan_in_fan_out=has_transposed_weights(base),
            task_type="CAUSAL_LM",
        ),
    )


def _start(config, num_parameters: int, folder: Path | None) -> PeftModel:
    set_seed(config.seed)
    base, _ = load_base_model(config.model_name)
    if folder is not None:
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    else:
        alpha_over_r = config.lora_alpha / config.lora_r
        model = add_lora_of(base, num_parameters, alpha_over_r=alpha_over_r, dropout=config.lora_dropout)
    return model.to(config.device)


def _train(model, blocks, config, *, rate: float, num_steps: int, number: int, folder: Path, name: str) -> None:
    """A warmup over a twentieth of the steps and a cosine to zero."""
    set_seed(config.seed + number)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    scheduler = LambdaLR(
        optimizer,
        lambda step: two_phase_factor(
            step, seed_steps=num_steps, consolidate_steps=0, warmup_steps=num_steps // 20, ratio=0.0
        ),
    )
    scratch = folder.with_name(folder.name + ".scratch")
    train_steps(
        model,
        blocks,
        optimizer=optimizer,
        scheduler=scheduler,
        num_steps=num_steps,
        batch_size=config.train_batch_size,
        seed=config.seed + number,
        bf16=config.autocast_bf16,
        scratch=scratch,
        name=name,
    )
    shutil.rmtree(scratch, ignore_errors=True)


def _write(model, config, folder: Path, tests: dict[str, Dataset]) -> None:
    """Save the LoRA and measure what was saved; the whole folder or nothing."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        saved = PeftModel.from_pretrained(load_base_model(config.model_name)[0], partial).to(model.device)
        mean_nll = {name: measure_blocks(saved, blocks).mean_nll for name, blocks in tests.items()}
        write_json(partial / VISIT, {"parameters": parameters, "mean_nll": mean_nll})
