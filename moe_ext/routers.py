"""Find the routers and the experts of a mixture-of-experts model, by structure and never by name.

    for layer in moe_layers(model):
        layer.router.weight          # [E, H]
        layer.experts.gate_up_proj   # [E, 2I, H]

transformers notes in each model class which modules its router logits are read from (`_can_record_outputs`), and
keeps the experts of a layer as 3-D parameters of one module beside the router. A name would mislead: 'gate' is in the
name of every SwiGLU matrix too.

Shape letters: E experts, H hidden size, I inner size of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

RECORDED = "router_logits"


@dataclass(frozen=True)
class MoeLayer:
    """One mixture-of-experts layer of a model.

    Args:
        index: number of the decoder layer it lies in, from 0; dense layers count.
        block_name, block: the module that holds router and experts.
        router_name, router: the module whose `weight` [E, H] scores the experts.
        experts_name, experts: the module that holds all experts as 3-D parameters.
    """

    index: int
    block_name: str
    block: nn.Module
    router_name: str
    router: nn.Module
    experts_name: str
    experts: nn.Module

    @property
    def num_experts(self) -> int:
        return self.router.weight.shape[0]

    @property
    def decoder_name(self) -> str:
        """The list of decoder layers that this one lies in."""
        return self.block_name.rsplit(f".{self.index}.", 1)[0]


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Every mixture-of-experts layer, first to last.

    Args:
        model: a transformers model of OLMoE, Mixtral, Qwen2/3-MoE, DeepSeek V2/V3, or of another family that keeps
            its routers and experts in the same way.

    Raises:
        ValueError: a dense model; a class that records its router logits from something that is no router (JetMoE,
            Doge, ERNIE-VL); a router without 3-D experts beside it.
    """
    recorders = list(_router_recorders(model))
    if not recorders:
        raise ValueError(
            f"{type(model).__name__} is a dense model: its class records no router logits. Give a "
            "mixture-of-experts model, such as OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE or (transformers 5.19) "
            "DeepSeek V2/V3."
        )
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        if any(isinstance(module, router_class) and part in name for router_class, part in recorders):
            _check_router(model, name, module)
            block_name = name.rpartition(".")[0]
            block = modules[block_name]
            child, experts = _experts_beside(model, block_name, block, num_experts=module.weight.shape[0])
            layers.append(
                MoeLayer(
                    index=_layer_number(name),
                    block_name=block_name,
                    block=block,
                    router_name=name,
                    router=module,
                    experts_name=f"{block_name}.{child}",
                    experts=experts,
                )
            )
    if not layers:
        classes = ", ".join(sorted({router_class.__name__ for router_class, _ in recorders}))
        raise ValueError(
            f"This {type(model).__name__} holds no router ({classes}): all its layers are dense. Give a model whose "
            "config has layers with experts."
        )
    return layers


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all routers by their full names; nothing else of the model is among them."""
    return {
        f"{layer.router_name}.{name}": parameter
        for layer in moe_layers(model)
        for name, parameter in layer.router.named_parameters()
    }


def _router_recorders(model: nn.Module) -> Iterator[tuple[type[nn.Module], str]]:
    """Which modules the router logits are read from, by class and by a part of the name ("" is part of any)."""
    seen = set()
    for module in model.modules():  # a model may be composed of several
        if isinstance(module, PreTrainedModel) and type(module) not in seen:
            seen.add(type(module))
            recorded = (module._can_record_outputs or {}).get(RECORDED)
            if isinstance(recorded, (list, tuple)):
                what = " and ".join(recorder.target_class.__name__ for recorder in recorded)
                raise ValueError(
                    f"{type(module).__name__} records router logits from {what}, not from one kind of router, and is "
                    "not supported. Give a model with one router beside its experts, such as OLMoE or Mixtral."
                )
            if recorded is not None:
                yield getattr(recorded, "target_class", recorded), getattr(recorded, "layer_name", None) or ""


def _check_router(model: nn.Module, name: str, module: nn.Module) -> None:
    own = {own_name: tuple(parameter.shape) for own_name, parameter in module.named_parameters(recurse=False)}
    if len(own.get("weight", ())) != 2:
        held = ", ".join(f"{own_name} {list(shape)}" for own_name, shape in own.items()) or "no parameters of its own"
        raise ValueError(
            f"{type(model).__name__} records router logits from {type(module).__name__} ({name}), which holds {held} "
            "and not one weight [experts, hidden size]: it is more than a router, and is not supported."
        )


def _experts_beside(model: nn.Module, block_name: str, block: nn.Module, *, num_experts: int) -> tuple[str, nn.Module]:
    for name, child in block.named_children():
        fused = [parameter for parameter in child.parameters(recurse=False) if parameter.ndim == 3]
        if fused and all(parameter.shape[0] == num_experts for parameter in fused):
            return name, child
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
    raise ValueError(
        f"{block_name} of {type(model).__name__} has a router of {num_experts} experts, but no module with 3-D "
        f"parameters for {num_experts} experts beside it; it holds {children}. This layout is not supported."
    )


def _layer_number(name: str) -> int:
    return next(int(part) for part in reversed(name.split(".")) if part.isdigit())
