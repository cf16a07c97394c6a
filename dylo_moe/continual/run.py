"""Skills arrive one after another and the mixture grows: the run behind `train.py --continual prose code math`.

For each skill that arrives, in this order:

1. A detector compares some blocks of it with the skills that are known, and decides: a known one, or a new one.
2. A new one gets an expert, which is seeded alone at a high rate: no other expert runs, so none can change.
3. The router is fitted anew, so that a few replayed blocks of each skill go to that skill's expert (`router_replay`).
4. All experts run, weighed by the router, and the new one is consolidated among them at a low rate; the others stay
   frozen. A known skill begins here, with its own expert. Then the router is fitted once more, less sure of itself.
5. Held-out perplexity is measured on all skills so far, and everything is written down.

    results = run(ContinualConfig(continual=["prose", "code", "math"], output_dir="runs/continual"))
"""

import logging
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from dylo_moe.continual.baselines import VISIT, train_in_sequence, train_joint
from dylo_moe.continual.data import HeldOut, SkillText, read_skill, spread
from dylo_moe.continual.lr_schedule import TwoPhaseLRScheduler
from dylo_moe.continual.novelty import BLOCKS_IN_A_BATCH, FEWEST_BATCHES, NoveltyDetector, Verdict
from dylo_moe.continual.report import PICTURE, RESULTS, TABLE, as_text, compare, draw
from dylo_moe.continual.router_replay import RouterReplay, refit_router
from dylo_moe.continual.steps import train_steps
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.model_card import describe_training, shown
from dylo_moe.skills import SkillLibrary, embed_blocks, measure_background
from dylo_moe.training.trainer import multiplies_bf16_fast
from moe_common.models.base_model import default_device, load_base_model
from moe_common.models.perplexity import measure_blocks
from moe_common.runs.drawing import load_pyplot, only_a_picture
from moe_common.runs.options import check_at_least
from moe_common.runs.processes import num_processes
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import read_json, whole_folder, write_json, write_text

__all__ = ["ContinualConfig", "as_text", "read_texts", "run"]

logger = logging.getLogger(__name__)

COMMAND = "train.py --continual"
# The router's weight decay while an expert is consolidated: one that is trained at a fraction of its weight grows too
# loud for the text of others, which gives it some weight too.
SURE = 1e-3


@dataclass(kw_only=True)
class ContinualConfig:
    """Everything `train.py --continual` lets a user choose; all fields are options of the same name."""

    continual: list[str] = field(
        default_factory=lambda: ["prose", "code", "math"],
        metadata={"help": "Skills as they arrive: domains, files, folders, hub ids; may repeat."},
    )
    model_name: str = field(
        default="base", metadata={"help": "Base model: base (committed), smollm2-135m, a folder or a hub id."}
    )
    output_dir: str = field(default="runs/continual", metadata={"help": "Folder of the models and the results."})
    lora_r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: int = field(default=16, metadata={"help": "Each expert's update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input in training."})
    top_k: int = field(default=2, metadata={"help": "Experts kept for each token at inference."})
    first_adapted_block: int = field(
        default=1,
        metadata={
            # What enters block 0 is one token without its context, by which no router can tell skills apart.
            "help": "Decoder block from which on there are experts."
        },
    )
    seed_steps: int = field(default=80, metadata={"help": "Optimiser steps that a new expert is seeded alone."})
    consolidate_steps: int = field(default=20, metadata={"help": "Optimiser steps among all experts, per skill."})
    train_batch_size: int = field(default=8, metadata={"help": "Blocks in a step."})
    max_seq_length: int = field(default=256, metadata={"help": "Tokens in a block."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate of a new expert."})
    consolidate_ratio: float = field(default=0.1, metadata={"help": "Rate of the second phase over the peak."})
    replay_blocks: int = field(default=16, metadata={"help": "Blocks kept of each skill, for the router alone."})
    router_weight_decay: float = field(
        default=0.05, metadata={"help": "Weight decay of the router's fit; larger mixes the experts more."}
    )
    probe_blocks: int = field(default=32, metadata={"help": "Blocks by which an arriving skill is recognised."})
    calibration_blocks: int = field(default=64, metadata={"help": "Held-out blocks behind a novelty threshold."})
    novelty_margin: float = field(
        default=1.0, metadata={"help": "Distance below its held-out text at which a skill ends."}
    )
    eval_blocks: int = field(default=48, metadata={"help": "Held-out blocks of each skill that are measured."})
    eval_split: HeldOut = field(
        default="test", metadata={"help": "Split they are from: validation to choose settings, test to report."}
    )
    baselines: bool = field(default=True, metadata={"help": "Train the two LoRAs that the mixture is compared with."})
    sequential_learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of the LoRA in sequence."}
    )
    joint_learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of the LoRA on all at once."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Train in bfloat16 autocast. By default: where that is fast."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all weights and of the order of the blocks."})

    def __post_init__(self) -> None:
        if not self.continual:
            raise ValueError("continual names no skill. Give at least one, e.g. --continual prose code math.")
        check_at_least(self, lora_r=1, top_k=1, train_batch_size=1, replay_blocks=1, eval_blocks=1, max_seq_length=2)
        check_at_least(self, seed_steps=0, consolidate_steps=0, first_adapted_block=0, seed=0)
        check_at_least(self, novelty_margin=0, router_weight_decay=0)
        check_at_least(self, probe_blocks=BLOCKS_IN_A_BATCH, calibration_blocks=FEWEST_BATCHES * BLOCKS_IN_A_BATCH)
        if self.seed_steps + self.consolidate_steps < 1:
            raise ValueError("seed_steps and consolidate_steps are both 0, so nothing would be learnt. Raise one.")
        for name in ("learning_rate", "sequential_learning_rate", "joint_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive.")
        if not 0 < self.consolidate_ratio <= 1:
            raise ValueError(f"consolidate_ratio is {self.consolidate_ratio}, but must lie in (0, 1].")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, but must lie in [0, 1).")
        if self.steps_a_visit * self.train_batch_size < BLOCKS_IN_A_BATCH:
            raise ValueError(
                f"A visit reads {self.steps_a_visit * self.train_batch_size} blocks (steps x train_batch_size), but a "
                f"skill is judged by {BLOCKS_IN_A_BATCH}. Raise seed_steps, consolidate_steps or train_batch_size."
            )

    @property
    def skills(self) -> list[str]:
        """Each skill once, in the order of its first visit."""
        return list(dict.fromkeys(self.continual))

    @property
    def steps_a_visit(self) -> int:
        return self.seed_steps + self.consolidate_steps

    @property
    def device(self) -> str:
        """Where all models are trained: on the GPU where there is one."""
        return default_device()

    @property
    def autocast_bf16(self) -> bool:
        """Whether training runs in bfloat16: as asked, else where it is fast."""
        return multiplies_bf16_fast() if self.bf16 is None else self.bf16


def run(config: ContinualConfig) -> dict:
    """Train the growing mixture and its baselines, measure after each skill, and write it all down.

    An interrupted run continues behind the last finished skill when called again with the same settings, and ends as
    if it had not been interrupted. Progress goes to the log; `as_text(results, output)` makes the table that a person
    reads and says where the files lie.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: unknown or too little data, an output folder with a run of other settings, or several processes.
    """
    if (processes := num_processes()) > 1:
        raise ValueError(
            f"{processes} processes were started, but skills are learnt in one. Start train.py --continual by python "
            "alone."
        )
    load_pyplot()  # a picture is drawn in the end
    started, on_cpu, output = time.monotonic(), time.process_time(), Path(config.output_dir)
    folder = RunFolder(output, COMMAND, asdict(config), free=("output_dir",))
    if (output / RESULTS).exists():
        logger.info("the run in %s is finished already", output)
        return read_json(output / RESULTS)
    base, tokenizer = load_base_model(config.model_name)
    if config.first_adapted_block >= base.config.get_text_config().num_hidden_layers:
        raise ValueError(
            f"first_adapted_block is {config.first_adapted_block}, but '{config.model_name}' has the blocks 0 to "
            f"{base.config.get_text_config().num_hidden_layers - 1}."
        )
    logger.info("reading %s", ", ".join(config.skills))
    texts = read_texts(config, tokenizer)
    with folder:
        results = _learn_and_compare(config, base, texts, output)
        results["seconds"] = time.monotonic() - started
        results["cpu_seconds"] = time.process_time() - on_cpu  # the time that counts where others use the cores too
        write_text(output / TABLE, as_text(results, output))
        write_json(output / RESULTS, results)
        with only_a_picture(output / PICTURE):
            draw(results, output / PICTURE)
    return results


def _learn_and_compare(config: ContinualConfig, base, texts: dict[str, SkillText], output: Path) -> dict:
    results = {"settings": asdict(config), "skills": config.skills, "visits": list(config.continual)}
    base.to(config.device)
    results["base"] = {skill: measure_blocks(base, text.measured).mean_nll for skill, text in texts.items()}
    mixture = _grow_mixture(config, texts, output, results["base"])
    results |= mixture
    if config.baselines:
        shared = {"texts": texts, "num_parameters": mixture["trained_parameters"]["mixture"]}
        sequential = train_in_sequence(config, output / "sequential", **shared)
        joint = train_joint(config, output / "joint", **shared)
        results["trained_parameters"] |= {"sequential": sequential["parameters"], "joint": joint["parameters"]}
        results["mean_nll"] |= {"sequential": sequential["mean_nll"], "joint": joint["mean_nll"]}
    results["comparison"] = compare(results)
    return results


def read_texts(config: ContinualConfig, tokenizer) -> dict[str, SkillText]:
    """The blocks of each skill.

    Raises:
        ValueError: unknown or too little data.
    """
    return {
        name: read_skill(
            name,
            tokenizer,
            num_visits=config.continual.count(name),
            blocks_a_visit=config.steps_a_visit * config.train_batch_size,
            calibration_blocks=config.calibration_blocks,
            measured_blocks=config.eval_blocks,
            block_size=config.max_seq_length,
            measured_split=config.eval_split,
            seed=config.seed,
        )
        for name in config.skills
    }


def _grow_mixture(
    config: ContinualConfig, texts: dict[str, SkillText], output: Path, base_nll: dict[str, float]
) -> dict:
    """All visits; those that are on disk are not made again."""
    done = []
    for number, skill in enumerate(config.continual):
        folder = output / "mixture" / f"{number + 1:02d}"
        if (folder / VISIT).exists():
            logger.info("skill %d of %d, %s, is learnt already: %s", number + 1, len(config.continual), skill, folder)
        else:
            _visit(config, texts, number, folder, base_nll)
        done.append(read_json(folder / VISIT))
    return {
        "decisions": [visit["decision"] for visit in done],
        "experts": done[-1]["experts"],
        "replay_bytes": done[-1]["replay_bytes"],
        "trained_parameters": {"mixture": done[-1]["trained_parameters"]},
        "mean_nll": {"mixture": [visit["mean_nll"] for visit in done]},
        "usage": done[-1]["usage"],
    }


def _start(config: ContinualConfig) -> tuple[DyLoRA_MoE, RouterReplay]:
    """A mixture that has met no skill."""
    set_seed(config.seed)
    base, _ = load_base_model(config.model_name)
    model = DyLoRA_MoE(
        base,
        1,
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        balance_coefficient=0.0,  # text of one skill must go to one expert: an even load is the wrong aim here
        top_k=config.top_k,
        adapted_blocks=range(config.first_adapted_block, base.config.get_text_config().num_hidden_layers),
        expert_names=["expert_0"],
        base_name=config.model_name,
    )
    model.skills = SkillLibrary(measure_background(model))
    return model.to(config.device), RouterReplay()


def _load(config: ContinualConfig, folder: Path) -> tuple[DyLoRA_MoE, RouterReplay]:
    """A mixture as a visit left it."""
    model = DyLoRA_MoE.from_pretrained(folder, is_trainable=True)
    return model.to(config.device), RouterReplay.load(folder)


def _visit(
    config: ContinualConfig, texts: dict[str, SkillText], number: int, folder: Path, base_nll: dict[str, float]
) -> None:
    """Learn a skill that arrives; leaves the mixture, the replay and what was measured in the folder, or nothing.

    Each visit begins with what the one before it left on disk, so that a run that was interrupted ends as a whole one.
    """
    started, skill = time.monotonic(), config.continual[number]
    if number == 0:
        model, replay = _start(config)
    else:
        model, replay = _load(config, folder.with_name(f"{number:02d}"))
    set_seed(config.seed + number)
    blocks = texts[skill].visits[config.continual[:number].count(skill)]
    detector = NoveltyDetector(model.skills, margin=config.novelty_margin)
    probe_NH = embed_blocks(model, spread(blocks, config.probe_blocks))
    verdict = detector.judge(probe_NH)
    learnt = _take_up(model, detector, verdict, skill, probe_NH, texts)
    expert = model.skills[learnt].expert
    logger.info("skill %d of %d, %s: %s", number + 1, len(config.continual), skill, _said(verdict, expert))
    replay.keep(learnt, torch.tensor(spread(blocks, config.replay_blocks)["input_ids"]))
    _learn(model, replay, config, blocks, expert, is_new=verdict.is_novel, number=number, folder=folder)

    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        replay.save(partial)
        model, _ = _load(config, partial)  # what is measured is what was saved
        so_far = [name for name in config.skills if name in config.continual[: number + 1]]
        names = model.experts.get_all_adapter_names()
        in_experts = sum(parameter.numel() for name in names for parameter in model.experts.parameters_of(name))
        visit = {
            "decision": {"skill": skill, "expert": expert, **asdict(verdict)},
            "experts": names,
            "trained_parameters": in_experts + sum(p.numel() for p in model.router.attached.parameters()),
            "replay_bytes": replay.num_bytes,
            "mean_nll": {name: measure_blocks(model, texts[name].measured).mean_nll for name in so_far},
            "usage": {name: _usage(model, texts[name]) for name in so_far},
            "seconds": time.monotonic() - started,
        }
        write_json(partial / VISIT, visit)
        _describe_training(partial, config, number, {"base": base_nll, "mixture (this)": visit["mean_nll"]})


def _describe_training(folder: Path, config: ContinualConfig, number: int, nll: dict[str, dict[str, float]]) -> None:
    """Add to a mixture's model card what it has learnt so far, and how it and its base do on that."""
    facts = {
        "skills, as they arrived": ", ".join(map(shown, config.continual[: number + 1])),
        "each": f"{config.steps_a_visit} steps of {config.train_batch_size} rows of {config.max_seq_length} tokens",
        "learning rate": f"{config.learning_rate:g}, then {config.consolidate_ratio:g} of it among all experts",
        "seed": config.seed,
    }
    so_far = nll["mixture (this)"]
    perplexity = {system: {skill: math.exp(found[skill]) for skill in so_far} for system, found in nll.items()}
    some = f"{config.eval_blocks} rows of the {config.eval_split} split of each skill"
    describe_training(folder, facts, perplexity, measured_on=some)


def _take_up(
    model: DyLoRA_MoE,
    detector: NoveltyDetector,
    verdict: Verdict,
    skill: str,
    probe_NH: torch.Tensor,
    texts: dict[str, SkillText],
) -> str:
    """Note what arrived in the library, and make an expert if it is new; returns its name in the library."""
    library = detector.library
    if not verdict.is_novel:
        library.update(verdict.nearest, probe_NH)
        return verdict.nearest
    if len(library):
        expert = model.experts.create_expert()
    else:
        (expert,) = model.experts.get_all_adapter_names()
    name = skill if skill not in library else f"{skill} ({expert})"
    library.add(name, probe_NH, expert=expert)
    detector.calibrate(name, embed_blocks(model, texts[skill].calibration))
    return name


def _learn(
    model: DyLoRA_MoE,
    replay: RouterReplay,
    config: ContinualConfig,
    blocks,
    expert: str,
    *,
    is_new: bool,
    number: int,
    folder: Path,
) -> None:
    """Seed and consolidate one expert; every other one is frozen throughout, and all are in the end."""
    experts, name = model.experts, config.continual[number]
    experts.freeze(experts.get_all_adapter_names())
    experts.unfreeze(expert)
    seed_steps = config.seed_steps if is_new else 0
    consolidate_steps = config.steps_a_visit - seed_steps
    peak = config.learning_rate if is_new else config.learning_rate * config.consolidate_ratio
    optimizer = torch.optim.AdamW(experts.parameters_of(expert), lr=peak, weight_decay=0.0)
    scheduler = TwoPhaseLRScheduler(
        optimizer,
        seed_steps=seed_steps,
        consolidate_steps=consolidate_steps,
        warmup_steps=seed_steps // 20,
        ratio=config.consolidate_ratio if is_new else 1.0,
    )

    def consolidate() -> None:
        experts.activate_all_experts()
        model.router.attached.requires_grad_(False)
        refit_router(model, replay, weight_decay=SURE)

    if seed_steps:
        experts.set_active_expert(expert)
    else:
        consolidate()
    train_steps(
        model,
        blocks,
        optimizer=optimizer,
        scheduler=scheduler,
        num_steps=config.steps_a_visit,
        batch_size=config.train_batch_size,
        seed=config.seed + number,
        bf16=config.autocast_bf16,
        scratch=folder.with_name(folder.name + ".scratch"),
        name=name,
        at_step={seed_steps: consolidate} if seed_steps else None,
    )
    shutil.rmtree(folder.with_name(folder.name + ".scratch"), ignore_errors=True)
    experts.freeze(expert)
    share = refit_router(model, replay, weight_decay=config.router_weight_decay)
    logger.info("%s: the router sends %.1f %% of the replayed tokens to their skills' experts", name, 100 * share)


@torch.no_grad()
def _usage(model: DyLoRA_MoE, text: SkillText) -> dict[str, float]:
    """Each expert's mean weight on a skill's held-out tokens."""
    rows = spread(text.measured, 8).with_format("torch")
    model.eval()
    model(input_ids=rows["input_ids"][:].to(model.device), logits_to_keep=1)
    means = model.last_routing_weights.flatten(0, 1).mean(dim=0).tolist()
    return dict(zip(model.experts.get_all_adapter_names(), means, strict=True))


def _said(verdict: Verdict, expert: str) -> str:
    if verdict.nearest is None:
        return f"the first skill, learnt by {expert}"
    near = f"similarity {verdict.similarity:.3f} to {verdict.nearest}, threshold {verdict.threshold:.3f}"
    return f"new ({near}): {expert} is added" if verdict.is_novel else f"known ({near}): {expert} learns on"
