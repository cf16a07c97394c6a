"""Take over a model trained with X-LoRA (Buehler & Buehler 2024, arXiv:2402.07148) from the folder that PEFT saved.

    model = load_xlora(base, "folder")                               # the same function: two passes, no KV cache
    config = MoELoraConfig(experts=xlora_experts("folder"), ...)     # its experts exactly; a router to be trained

X-LoRA's classifier reads the last hidden state of a pass without adapters. A router of scope `two_pass` does so too,
so the classifier itself becomes its gate. No router of one base pass can compute the same: it knows no such state.
"""

import json
import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora.moe_router import RouterConfig
from safetensors.torch import load_file
from torch import Tensor, nn

CLASSIFIER = re.compile(r"\.internal_xlora_classifier\.layers\.((?P<layer>\d+)\.)?(?P<part>weight|bias)$")
WEIGHTS = "adapter_model.safetensors"


def xlora_experts(folder: str | Path) -> dict[str, str]:
    """The LoRA adapters of an X-LoRA by name, as `MoELoraConfig(experts=...)` takes them: folders or hub ids.

    PEFT saves the classifier and where the adapters came from, so these must still be there. X-LoRA numbers them; here
    they are `expert_0` and so on.

    Raises:
        ValueError: the folder holds no X-LoRA, or one that changed its adapters by training.
    """
    config = _read_config(Path(folder))
    if config["use_trainable_adapters"]:
        raise ValueError(
            f"The X-LoRA in {folder} changed its adapters (use_trainable_adapters); they are not those it names. "
            "Save each adapter from the running model, and pass those to MoELoraConfig(experts=...)."
        )
    return {f"expert_{name}": source for name, source in config["adapters"].items()}


def load_xlora(base: nn.Module, folder: str | Path) -> PeftModel:
    """Put an X-LoRA on a base model as LoRA experts with a router of scope `two_pass`; the function is the same.

    What `save_pretrained` writes of it needs the gate to load again; keep the X-LoRA folder and load that.

    Args:
        base: the causal language model it was trained on; changed in place.
        folder: what PEFT's `save_pretrained` wrote of the X-LoRA.

    Returns:
        A model in eval mode. Call it with `use_cache=False`.

    Raises:
        ValueError: the folder holds no X-LoRA, or one whose weights no softmax of one score an expert gives.
    """
    config, experts = _read_config(Path(folder)), xlora_experts(folder)
    router = RouterConfig(scope="two_pass", balance_coef=0.0, **_selection(config))
    names = list(experts)
    model = PeftModel.from_pretrained(base, experts[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(experts[name], adapter_name=name)
    model.base_model.attach_router(_read_classifier(Path(folder)), experts=names, config=router)
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("peft_type") != "XLORA":
        raise ValueError(f"{folder} holds {config.get('peft_type', 'no adapter')}, but must hold an X-LoRA of PEFT.")
    return config


def _selection(config: dict[str, Any]) -> dict[str, Any]:
    """How a router of ours selects what this X-LoRA selects.

    Raises:
        ValueError: there is no such way, and why.
    """
    if config["layerwise_scalings"]:
        refusal = "layerwise_scalings: it weighs each layer otherwise, a two_pass router all alike"
    elif config["global_scaling_weight"] != 1:
        refusal = f"global_scaling_weight is {config['global_scaling_weight']}: its weights do not sum to one"
    elif config["enable_softmax"] and config["top_k_lora"] is None and not config["enable_softmax_topk"]:
        return {"selection": "dense", "temperature": config["softmax_temperature"]}
    elif config["enable_softmax_topk"] and config["top_k_lora"] is not None and not config["enable_softmax"]:
        return {"selection": "top_k", "top_k": config["top_k_lora"]}
    else:
        refusal = (
            f"enable_softmax={config['enable_softmax']}, enable_softmax_topk={config['enable_softmax_topk']}, "
            f"top_k_lora={config['top_k_lora']}: its weights are no softmax over the experts kept"
        )
    raise ValueError(
        f"This X-LoRA cannot be taken over exactly ({refusal}). Take its experts with xlora_experts and train a "
        "router over them."
    )


def _read_classifier(folder: Path) -> nn.Sequential:
    """The classifier, without its dropout, which does nothing in eval mode."""
    layers: dict[int, dict[str, Tensor]] = {}
    # PEFT 0.21.2 takes layer n of the classifier for a part of the adapter called n, and writes it to the folder n,
    # without the number.
    for file in (folder / WEIGHTS, *folder.glob(f"[0-9]*/{WEIGHTS}")):
        for key, tensor in load_file(file).items():
            found = CLASSIFIER.search(key)
            if found and (found["layer"] or file.parent != folder):
                layers.setdefault(int(found["layer"] or file.parent.name), {})[found["part"]] = tensor
    modules: list[nn.Module] = []
    for _, held in sorted(layers.items()):
        linear = nn.Linear(held["weight"].shape[1], held["weight"].shape[0], dtype=held["weight"].dtype)
        linear.load_state_dict(held)
        modules += [nn.ReLU(), linear] if modules else [linear]
    return nn.Sequential(*modules)
