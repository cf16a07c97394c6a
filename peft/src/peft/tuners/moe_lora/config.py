# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Optional, Union

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.moe_adapter_names import refuse_unusable_names
from peft.tuners.lora.moe_router import RouterConfig
from peft.utils import PeftType


ROUTER_FIELDS = {
    "router_scope": "scope",
    "router_selection": "selection",
    "top_k": "top_k",
    "top_p": "top_p",
    "router_temperature": "temperature",
    "router_jitter": "jitter",
    "router_block": "block",
    "router_init": "init",
    "router_balance_coef": "balance_coef",
    "router_z_coef": "z_coef",
    "router_entropy_coef": "entropy_coef",
}
# What belongs to the mixture as a whole and not to one of its experts.
MIXTURE_ONLY = {"peft_type", "auto_mapping", "peft_version", "bias", "modules_to_save", "trainable_token_indices"}
DEFAULT_NUM_EXPERTS = 4
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
VARIANTS = ("use_dora", "use_qalora", "alora_invocation_tokens", "target_parameters", "layer_replication")


@dataclass
class MoELoraConfig(LoraConfig):
    """
    Configuration of a mixture of LoRA experts with a learned router, computed in one pass of the base model.

    All arguments of [`LoraConfig`] apply to every expert that is made from nothing. What the mixture adds:

    Args:
        num_experts (`int`, *optional*):
            Number of experts; they are named `expert_0`, `expert_1`, ... By default 4, or as many as `experts` names.
        experts (`Union[list[str], dict[str, str]]`, *optional*):
            Names of experts to make from nothing, or a dict from each expert's name to the folder or Hub id of a
            trained LoRA adapter. Trained experts keep their own rank, alpha and target modules.
        train_experts (`bool`, defaults to `True`):
            Train the experts together with the router; otherwise the router alone.
        top_k (`int`, *optional*):
            Experts kept for each token.
        top_p (`float`, *optional*):
            Keep the smallest set of experts whose probability reaches this.
        router_scope (`str`, defaults to `"layer"`):
            `"layer"`, `"block"`, `"model"` or `"two_pass"`; see [`~peft.tuners.lora.moe_router.RouterConfig`].
        router_selection (`str`, *optional*):
            `"dense"`, `"top_k"`, `"top_p"` or `"hybrid"` (dense in training, top-k in eval); by default what `top_k`
            or `top_p` imply, else dense.
        router_temperature (`float`, defaults to 1.0):
            Divides the scores before the softmax.
        router_jitter (`float`, defaults to 0.0):
            Relative noise on a gate's input in training.
        router_block (`int`, *optional*):
            Decoder block at which a router of scope `"model"` looks.
        router_init (`str`, defaults to `"normal"`):
            `"normal"`, `"zeros"`, or `"experts"` to start from the directions of trained experts.
        router_balance_coef, router_z_coef, router_entropy_coef (`float`, default to 0.01, 0.0 and 0.0):
            Weights of the router's losses, which are added to the model's loss in training.
        expert_configs (`dict[str, dict]`, *optional*):
            The config of each expert, as a saved mixture records it. Filled in by the model; leave it empty.
    """

    num_experts: Optional[int] = field(default=None, metadata={"help": "Number of experts."})
    experts: Optional[Union[list[str], dict[str, str]]] = field(
        default=None, metadata={"help": "Names of new experts, or names and folders of trained LoRA adapters."}
    )
    train_experts: bool = field(default=True, metadata={"help": "Train the experts, not the router alone."})
    top_k: Optional[int] = field(default=None, metadata={"help": "Experts kept for each token."})
    top_p: Optional[float] = field(default=None, metadata={"help": "Probability the kept experts must reach."})
    router_scope: str = field(default="layer", metadata={"help": "Where the router looks."})
    router_selection: Optional[str] = field(default=None, metadata={"help": "How the router selects experts."})
    router_temperature: float = field(default=1.0, metadata={"help": "Divides the scores before the softmax."})
    router_jitter: float = field(default=0.0, metadata={"help": "Relative noise on a gate's input in training."})
    router_block: Optional[int] = field(default=None, metadata={"help": "Block at which a model-scope router looks."})
    router_init: str = field(default="normal", metadata={"help": "Initialisation of the gates."})
    router_balance_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    router_z_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss."})
    router_entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy loss."})
    expert_configs: Optional[dict[str, dict]] = field(
        default=None, metadata={"help": "The config of each expert; filled in by the model."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MOE_LORA
        for name in VARIANTS:
            if getattr(self, name):
                raise ValueError(
                    f"{name} cannot be combined with routing per token. Use plain LoRA (or rsLoRA) experts."
                )
        for name in ("arrow_config", "kasa_config", "velora_config", "monteclora_config", "use_bdlora"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} cannot be combined with routing per token. Use plain LoRA experts.")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(CHANGE_THE_BASE):
            raise ValueError(
                f"init_lora_weights='{self.init_lora_weights}' changes the base weights for one adapter, and again for "
                "each further expert. Use True, 'gaussian' or 'orthogonal'."
            )
        if isinstance(self.experts, str):
            raise ValueError(  # noqa: TRY004 as for the other wrong values
                f"experts is the string {self.experts!r}, but must be a list of names or a dict. Write ['{self.experts}']."
            )
        if isinstance(self.experts, (list, tuple)):
            self.experts = list(self.experts)
        if self.experts is not None and not self.experts and self.expert_configs is None:
            raise ValueError("experts is empty. Name the experts, or leave it out and set num_experts.")
        if self.expert_configs is None and self.experts is None and self.num_experts is None:
            self.num_experts = DEFAULT_NUM_EXPERTS
        if self.num_experts is not None and self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}, but must be at least 1.")
        names = self.expert_names
        if self.num_experts is not None and self.num_experts != len(names):
            raise ValueError(
                f"num_experts is {self.num_experts} but experts names {len(names)} ({names}). Leave num_experts "
                "out or make the two agree."
            )
        if len(set(names)) != len(names):
            raise ValueError(f"Each expert needs a name of its own, got {names}.")
        refuse_unusable_names(names)
        if isinstance(self.experts, list) and not self.train_experts and self.expert_configs is None:
            raise ValueError(
                f"experts lists the names of new experts {names}, but with train_experts=False they would never learn. "
                "Pass a dict of names and folders or Hub ids of trained adapters."
            )
        if self.expert_configs is not None and set(self.expert_configs) != set(names):
            raise ValueError(
                f"experts names {names} but expert_configs holds {list(self.expert_configs)}. Leave expert_configs "
                "empty; in a saved mixture, the two belong together."
            )
        self.num_experts = len(names)
        self.router_config().check_num_experts(self.num_experts)

    @property
    def expert_names(self) -> list[str]:
        if self.experts:
            return list(self.experts)
        return [f"expert_{i}" for i in range(self.num_experts)]

    def router_config(self) -> RouterConfig:
        return RouterConfig(**{name: getattr(self, source) for source, name in ROUTER_FIELDS.items()})

    def new_expert_config(self, **changes) -> LoraConfig:
        """The config of an expert made from nothing, as this mixture's LoRA arguments say, with `changes`."""
        arguments = {f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.name not in MIXTURE_ONLY}
        arguments.update(changes)
        excluded = arguments["exclude_modules"]
        if self.modules_to_save and not isinstance(excluded, str):
            arguments["exclude_modules"] = set(excluded or ()) | set(self.modules_to_save)
        return LoraConfig(**arguments)

    def record_expert(self, name: str, config: LoraConfig) -> None:
        """Note an expert: its name, because the keys of a JSON file do not keep the order of the router's columns, and
        what differs from LoraConfig's defaults."""
        default = LoraConfig()
        differs = {}
        for f in fields(LoraConfig):
            value = getattr(config, f.name)
            if f.name not in MIXTURE_ONLY | {"runtime_config", "inference_mode"} and value != getattr(default, f.name):
                differs[f.name] = sorted(value) if isinstance(value, set) else value
        self.expert_configs = {**(self.expert_configs or {}), name: differs}
        self.experts = [*self.experts, name]
        self.num_experts = len(self.experts)

    def forget_expert(self, name: str) -> None:
        self.expert_configs = {key: value for key, value in self.expert_configs.items() if key != name}
        self.experts = [expert for expert in self.experts if expert != name]
        self.num_experts = len(self.experts)
