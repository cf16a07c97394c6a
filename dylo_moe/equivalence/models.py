"""The models that the equivalence checks run on: a base model with random experts, or a saved checkpoint.

source = open_model("base")              # random LoRA experts of unequal rank and alpha, a router of each scope
source = open_checkpoint("runs/mine")    # a saved mixture, or LoRA adapters with or without a saved router
"""

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, MoELoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.moe_mixin import ROUTER_CONFIG_NAME
from peft.tuners.lora.moe_router import SCOPES
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dylo_moe.equivalence.loop import lora_layers, scaling_of
from moe_common.models.base_model import default_device, resolve_model_name

# Unequal on purpose: rank, alpha, and how the rank scales. A fault that swaps or averages them cannot hide.
RANDOM_EXPERTS = {
    "one": {"r": 4, "lora_alpha": 8},
    "two": {"r": 8, "lora_alpha": 4},
    "three": {"r": 2, "lora_alpha": 3, "use_rslora": True},
}
# Size of a random expert's update against the base layer's output: enough to change every logit visibly, little enough
# that the model still computes with values of its usual size.
STRENGTH = 0.1
LINEAR = (torch.nn.Linear, Conv1D)
# Spread of the scores of a random gate: the tokens of a batch then choose different experts.
GATE_SPREAD = 1.5
TOP_K = 2
SEED = 0


@dataclass(kw_only=True)
class Source:
    """A base model and what to put on it.

    Args:
        name: as the user gave it.
        base: the bare base model, in float32 and eval mode.
        experts: folder of each expert, a plain LoRA adapter.
        routed: for each router, by its scope, how to put the experts and it on the bare base model.
        settings: what the results should say about the model.
        scratch: keeps the folders of `experts` alive.
    """

    name: str
    base: PreTrainedModel
    experts: dict[str, Path]
    routed: dict[str, Callable[[PreTrainedModel], PeftModel]]
    settings: dict = field(default_factory=dict)
    scratch: tempfile.TemporaryDirectory | None = None

    def plain(self) -> PeftModel:
        """The experts as LoRA adapters, all active, without a router."""
        return _with_adapters(self.base, self.experts)


def open_model(name: str) -> Source:
    """A base model with random experts; the tokenizer is not needed.

    Raises:
        ValueError, OSError: there is no such model, it is no causal language model, or it has no linear layers.
    """
    base = _load_base(resolve_model_name(name))
    scratch = tempfile.TemporaryDirectory(prefix="equivalence-")
    experts = _random_experts(base, Path(scratch.name))
    source = Source(
        name=name,
        base=base,
        experts=experts,
        routed={scope: _mixture_builder(experts, scope) for scope in SCOPES},
        settings={"experts": RANDOM_EXPERTS, "update_against_base": STRENGTH},
        scratch=scratch,
    )
    return _checked(source)


def open_checkpoint(folder: str | Path) -> Source:
    """A saved mixture with its router, or LoRA adapters as `save_pretrained` leaves them, with their router if saved.

    Args:
        folder: holds `adapter_config.json`, or subfolders that do.

    Raises:
        ValueError, OSError: no adapter there, one that cannot be routed, or a base model that is not to be had.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the folder that save_pretrained wrote.")
    configs = _read_configs(folder)
    bases = {config.base_model_name_or_path for config in configs.values()}
    if len(bases) > 1 or not all(bases):
        raise ValueError(
            f"The adapters in {folder} name {sorted(map(str, bases))} as their base model, but must name one and the "
            "same. Set base_model_name_or_path in their adapter_config.json."
        )
    base = _load_base(bases.pop())
    try:
        return _checked(_source_of_adapters(base, folder, configs))
    except (RuntimeError, SafetensorError, KeyError) as misfit:  # sizes that differ, a damaged file
        raise ValueError(
            f"What {folder} holds cannot be loaded onto its base model {base.name_or_path}: {misfit}. Give the folder "
            "as save_pretrained wrote it, with the base model it was trained for."
        ) from misfit


def load_adapters(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put what `save_pretrained` wrote on a bare base model: a mixture, or adapters and their router."""
    if _holds_mixture(_read_configs(folder)):
        ((name, place),) = _adapter_folders(folder).items()
        return PeftModel.from_pretrained(base, str(place), adapter_name=name).eval()
    model = _with_adapters(base, _adapter_folders(folder))
    if (folder / ROUTER_CONFIG_NAME).is_file():
        model.base_model.load_router(str(folder))
    return model.eval()


@contextmanager
def scaled(model: PeftModel, factor: float):
    """Multiply the update of every adapter by a factor."""
    layers = list(lora_layers(model).values())
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        for name in layer.scaling:
            layer.scaling[name] *= factor
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def randomize_adapter(layer, name: str, generator: torch.Generator) -> None:
    """Give a linear LoRA layer random A and B whose update is `STRENGTH` of the base layer's output in size."""
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    rank, in_features = A.shape
    base_size = layer.get_base_layer().weight.detach().float().square().mean().sqrt().item()
    spread = STRENGTH * base_size * math.sqrt(in_features / rank) / scaling_of(layer, name)
    with torch.no_grad():
        A.copy_(torch.randn(A.shape, generator=generator) / math.sqrt(in_features))
        B.copy_(torch.randn(B.shape, generator=generator) * spread)


def _load_base(where: str) -> PreTrainedModel:
    # float32 whatever the checkpoint is stored in: what is compared is the function, not the number format.
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    return model.to(default_device()).eval()


def _source_of_adapters(base: PreTrainedModel, folder: Path, configs: dict[str, PeftConfig]) -> Source:
    scratch = None
    if _holds_mixture(configs):
        scratch = tempfile.TemporaryDirectory(prefix="equivalence-")
        tuner = load_adapters(base, folder).base_model
        scope = tuner.moe_router.config.scope
        experts = {name: Path(scratch.name) / name for name in tuner.mixture_config.expert_names}
        for name, place in experts.items():
            tuner.export_expert(name, str(place))
        tuner.unload()
        routed = {scope: lambda base: load_adapters(base, folder)}
    else:
        experts = _adapter_folders(folder)
        if (folder / ROUTER_CONFIG_NAME).is_file():
            scope = json.loads((folder / ROUTER_CONFIG_NAME).read_text())["router"]["scope"]
            routed = {scope: lambda base: load_adapters(base, folder)}
        else:
            routed = {scope: _mixture_builder(experts, scope) for scope in SCOPES}
    return Source(
        name=str(folder),
        base=base,
        experts=experts,
        routed=routed,
        settings={"base": base.name_or_path, "experts": list(experts)},
        scratch=scratch,
    )


def _random_experts(base: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Save random experts on all linear layers but the head, as plain LoRA adapters; returns their folders."""
    targets, model = _linear_modules(base), None
    for name, settings in RANDOM_EXPERTS.items():
        config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(SEED)
    for layer in lora_layers(model).values():
        for name in RANDOM_EXPERTS:
            randomize_adapter(layer, name, generator)
    model.save_pretrained(folder)
    model.unload()
    return {name: folder / name for name in RANDOM_EXPERTS}


def _linear_modules(base: PreTrainedModel) -> list[str]:
    """Full names of the linear layers but the head, and so without experts that are fused into one parameter.

    "all-linear" of PEFT adapts those too (`target_parameters`), which cannot be routed.
    """
    head = base.get_output_embeddings()
    named = [name for name, module in base.named_modules() if isinstance(module, LINEAR) and module is not head]
    if not named:
        raise ValueError(f"{type(base).__name__} has no linear layer that could be adapted. Give another model.")
    return named


def _mixture_builder(experts: dict[str, Path], scope: str) -> Callable[[PreTrainedModel], PeftModel]:
    """Put a mixture of these experts with a random router of a scope on a base model."""

    def build(base: PreTrainedModel) -> PeftModel:
        config = MoELoraConfig(
            experts={name: str(folder) for name, folder in experts.items()},
            top_k=min(TOP_K, len(experts)),
            router_scope=scope,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, config, adapter_name=_free_name("mixture", experts))
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for gate in model.base_model.moe_router.gates.values():
                spread = GATE_SPREAD / math.sqrt(gate.weight.shape[1])
                gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * spread)
        return model.eval()

    return build


def _with_adapters(base: PreTrainedModel, folders: dict[str, Path]) -> PeftModel:
    first, *others = folders
    model = PeftModel.from_pretrained(base, str(folders[first]), adapter_name=first)
    for name in others:
        model.load_adapter(str(folders[name]), adapter_name=name)
    model.base_model.set_adapter(list(folders), inference_mode=True)
    return model.eval()


def _free_name(name: str, taken) -> str:
    while name in taken:
        name += "_"
    return name


def _adapter_folders(folder: Path) -> dict[str, Path]:
    """The adapters of a folder by name; `save_pretrained` puts the one called "default" at the top.

    The checkpoints that a Trainer leaves below what it trained are not adapters of their own.
    """
    top = {"default": folder} if (folder / CONFIG_NAME).is_file() else {}
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    return {**top, **{path.name: path for path in below if not path.name.startswith(PREFIX_CHECKPOINT_DIR + "-")}}


def _read_configs(folder: Path) -> dict[str, PeftConfig]:
    folders = _adapter_folders(folder)
    if not folders:
        raise ValueError(
            f"The folder {folder} has no {CONFIG_NAME}, nor has a folder in it, so it holds no adapter. Give the "
            "folder that save_pretrained wrote; for a base model use --model."
        )
    configs = {}
    for name, place in folders.items():
        try:
            configs[name] = PeftConfig.from_pretrained(str(place))
        except (ValueError, TypeError, KeyError) as damaged:
            raise ValueError(f"{place / CONFIG_NAME} cannot be read: {damaged}. Save the adapter anew.") from damaged
        if not isinstance(configs[name], LoraConfig):
            kind = str(configs[name].peft_type)
            raise ValueError(f"The adapter in {place} is of type {kind}, but must be LORA or MOE_LORA.")
    mixtures = [name for name, config in configs.items() if isinstance(config, MoELoraConfig)]
    if mixtures and len(configs) > 1:
        raise ValueError(
            f"The folder {folder} holds the adapters {list(configs)}, among them the mixtures {mixtures}. Give the "
            "folder of one mixture."
        )
    return configs


def _holds_mixture(configs: dict[str, PeftConfig]) -> bool:
    return any(isinstance(config, MoELoraConfig) for config in configs.values())


def _checked(source: Source) -> Source:
    """Route once, without and with a router, so that adapters that cannot be routed are refused before any check."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=source.base.device)
    for build in [lambda base: source.plain(), next(iter(source.routed.values()))]:
        model = build(source.base)
        try:
            weights = torch.ones(len(source.experts), device=ids.device)
            with torch.no_grad():
                model(input_ids=ids, routing_weights=weights)
        finally:
            model.unload()
    return source
