"""DyLoRA-MoE: a base model with LoRA experts that can be added one by one, and a router that weighs them per token.

    model = DyLoRA_MoE("base", num_experts=4)                      # or a hub model, a folder, a loaded model
    loss = model(input_ids, attention_mask, labels=labels).loss    # the router decides; balance loss included
    loss = model(input_ids, attention_mask, labels=labels, expert_id="math").loss       # one expert, no router
    model.experts.create_expert("law", r=8)                        # the mixture grows; the others stay as they are
    model.save_pretrained("out"); model = DyLoRA_MoE.from_pretrained("out")

It is a PeftModel: Trainer, TRL and `generate` take it as they take any, and what it saves is a mixture of the fork
that `AutoPeftModelForCausalLM` loads too. Routing, caching and the losses are the fork's (`MoELoraConfig`); here are
the parts that change over a mixture's life: its experts, its router's width, the skills it has met.

Shape letters: B sequences, L tokens, E experts.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import MoELoraConfig, PeftModelForCausalLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dylo_moe.experts import ExpertManager
from dylo_moe.model_card import describe_mixture
from dylo_moe.router import DynamicHybridRouter, HybridRouterConfig
from dylo_moe.skills import SkillLibrary
from dylo_moe.target_modules import find_target_modules, has_transposed_weights
from moe_common.models.base_identity import BaseIdentity
from moe_common.models.base_model import resolve_model_name
from moe_common.runs.whole_files import write_json

SETTINGS = "dylora.json"
FORMAT = 1
MIXTURE = "default"  # the adapter that save_pretrained writes to the folder itself and not to one below it


class DyLoRA_MoE(PeftModelForCausalLM):
    """A mixture of LoRA experts that grows.

    Args:
        model_name: a hub id, a local folder, `base` or `smollm2-135m`; or a loaded causal language model of
            transformers, which is changed in place.
        num_experts: experts to begin with.
        lora_r: rank of each expert.
        lora_alpha: the update of an expert is scaled by lora_alpha / lora_r.
        lora_dropout: dropout on the experts' input in training.
        token: of the Hugging Face hub, for a gated or private model.
        balance_coefficient: weight of the load-balancing loss in `outputs.loss` while training.
        top_k: experts kept for each token at inference; while there are fewer experts, all.
        dense_training: weigh all experts while training; otherwise top_k of them there too.
        router_scope: where the router looks: `layer`, `block`, `model` or `two_pass` (see the fork's RouterConfig).
        router_temperature: divides the router's scores before the softmax.
        router_jitter: relative noise on a gate's input in training.
        router_z_coefficient, router_entropy_coefficient: weights of the router's other losses.
        target_modules: layers to adapt, for architectures that `find_target_modules` does not know.
        adapted_blocks: numbers of the decoder blocks that get experts; by default all.
        expert_names: names of the first experts; by default `expert_0`, `expert_1`, ...
        base_name: by which a saved mixture finds its base again; by default `model_name`, or a loaded model's own.
        dtype: of the base's weights, where `model_name` is loaded here: by default float32 without a GPU and what the
            checkpoint is stored in with one.

    Attributes:
        experts: the `ExpertManager`.
        router: the `DynamicHybridRouter`.
        skills: the `SkillLibrary`, empty at first.

    Raises:
        ValueError: a setting out of range, an unknown model or architecture, experts that share a name.
        FileNotFoundError: a model folder that is not there.
    """

    def __init__(
        self,
        model_name: str | Path | nn.Module = "base",
        num_experts: int = 4,
        lora_r: int = 16,
        lora_alpha: int = 32,
        lora_dropout: float = 0.05,
        token: str | None = None,
        balance_coefficient: float = 0.01,
        *,
        top_k: int = 2,
        dense_training: bool = True,
        router_scope: str = "block",
        router_temperature: float = 1.0,
        router_jitter: float = 0.0,
        router_z_coefficient: float = 0.0,
        router_entropy_coefficient: float = 0.0,
        target_modules: Sequence[str] | str | None = None,
        adapted_blocks: Sequence[int] | None = None,
        expert_names: Sequence[str] | None = None,
        base_name: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}, but must be at least 1.")
        if lora_r < 1:
            raise ValueError(f"lora_r is {lora_r}, but must be at least 1.")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout}, but must lie in [0, 1).")
        if expert_names is not None and len(expert_names) != num_experts:
            raise ValueError(
                f"num_experts is {num_experts}, but expert_names holds {len(expert_names)} "
                f"({', '.join(expert_names)}). Make the two agree."
            )
        router = HybridRouterConfig(
            top_k=top_k,
            dense_training=dense_training,
            router_scope=router_scope,
            router_temperature=router_temperature,
            router_jitter=router_jitter,
            balance_coefficient=balance_coefficient,
            router_z_coefficient=router_z_coefficient,
            router_entropy_coefficient=router_entropy_coefficient,
        )
        shared = {"r": lora_r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "task_type": "CAUSAL_LM"}
        shared |= router.as_peft_arguments(num_experts)
        if adapted_blocks is not None:
            shared["layers_to_transform"] = list(adapted_blocks)
        if expert_names is not None:
            shared["experts"] = list(expert_names)
        MoELoraConfig(num_experts=num_experts, **shared)  # refuses a bad value before a model is loaded
        base, name = _load_base(model_name, token=token, dtype=dtype)
        config = MoELoraConfig(
            num_experts=num_experts,
            target_modules=target_modules if target_modules is not None else find_target_modules(base),
            fan_in_fan_out=has_transposed_weights(base),
            **shared,
        )
        self._set_up(
            base, config, BaseIdentity.of(base, base_name or name), top_k=top_k, frozen=(), skills=SkillLibrary()
        )

    def _set_up(
        self,
        base: nn.Module,
        config: MoELoraConfig,
        identity: BaseIdentity,
        *,
        top_k: int,
        frozen: Sequence[str],
        skills: SkillLibrary,
    ) -> None:
        super().__init__(base, config, MIXTURE)
        self.base_identity = identity
        self.router = DynamicHybridRouter(self, top_k=top_k)
        self.experts = ExpertManager(self, frozen=frozen)
        self.skills = skills
        self._routing: list[Tensor] | None = None

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        expert_id: str | int | Sequence[str | int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, each token weighed by the router or each sequence given to one expert.

        Args:
            input_ids, attention_mask, labels: [B, L], as the base model takes them.
            expert_id: an expert's name or column, for all sequences; or one for each (a list, or integers [B]). The
                router is then not asked, and its losses are not added.
            kwargs: whatever else the base model's forward takes, and `routing_weights`.

        Returns:
            What the base model returns. In training, `loss` includes the router's losses.

        Raises:
            ValueError: an unknown expert, another number of experts than of sequences, `expert_id` beside
                `routing_weights` or while one expert is active alone.
        """
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        kwargs = self._with_expert(expert_id, tokens, kwargs)
        with self._recording(kwargs.get("routing_weights"), tokens):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def generate(self, *args: Any, expert_id: str | int | Sequence[str | int] | Tensor | None = None, **kwargs: Any):
        """transformers' `generate`, with the KV cache; every token is routed as in `forward`."""
        given = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
        tokens = next((tensor for tensor in given if tensor is not None), None)
        kwargs = self._with_expert(expert_id, tokens, kwargs)
        with self._recording(kwargs.get("routing_weights"), tokens):
            return super().generate(*args, **kwargs)

    @property
    def last_routing_weights(self) -> Tensor | None:
        """What each token's experts weighed in the last call, [B, L, E]: the mean over the router's gates.

        After `generate`, the tokens of the prompt and those generated, except the last, which no pass has read yet. A
        sequence given to one expert has a one there, after `generate` for its prompt alone. None before the first
        call, with adapters disabled, and while somebody else records the routing (`record_routing`).
        """
        if not self._routing:
            return None
        return torch.stack([weights.to(self._routing[0].device) for weights in self._routing]).mean(dim=0)

    @contextmanager
    def _recording(self, explicit: Tensor | None, tokens: Tensor | None) -> Iterator[None]:
        """Keep what the gates decide inside, for `last_routing_weights`."""
        self._routing = None
        if self.base_model._routing_context().records is not None:
            yield
            return
        with self.base_model.record_routing() as records:
            yield
        if records:
            by_gate = [_joined(weights) for weights in records.values()]
            # a base that flattens or drops tokens before a gate leaves it without rows and columns to compare
            self._routing = [weights for weights in by_gate if weights.shape == by_gate[0].shape]
        elif tokens is not None and not self._adapters_disabled:
            alone = self.experts.active_expert
            if explicit is None and alone is not None:
                explicit = self._one_hot(alone, tokens)
            if explicit is not None:
                weights = explicit if explicit.dim() == 3 else explicit.reshape(-1, 1, explicit.shape[-1])
                self._routing = [weights.detach().expand(*tokens.shape[:2], -1)]

    def _with_expert(self, expert_id: Any, tokens: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        if expert_id is None:
            return kwargs
        if kwargs.get("routing_weights") is not None:
            raise ValueError("expert_id and routing_weights both say what to route. Pass one of them.")
        if self.experts.active_expert is not None:
            raise ValueError(
                f"The expert '{self.experts.active_expert}' is active alone, so expert_id cannot choose. Call "
                "experts.activate_all_experts() first."
            )
        if tokens is None:
            raise ValueError("expert_id needs the sequences it is for. Pass input_ids or inputs_embeds.")
        return {**kwargs, "routing_weights": self._one_hot(expert_id, tokens)}

    def _one_hot(self, expert_id: Any, tokens: Tensor) -> Tensor:
        names, batch = self.experts.get_all_adapter_names(), len(tokens)
        asked = expert_id.tolist() if isinstance(expert_id, Tensor) else expert_id
        asked = list(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked] * batch
        if len(asked) != batch:
            raise ValueError(
                f"expert_id names {len(asked)} experts, but the batch has {batch} sequences. Give one, or one for "
                "each."
            )
        columns = torch.tensor([names.index(self.experts.name_of(expert)) for expert in asked])
        return nn.functional.one_hot(columns, len(names)).to(tokens.device, torch.float32)

    # -- training ----------------------------------------------------------------------------------------------------

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each block in the backward pass rather than keep it; the losses and gradients stay the same."""
        base = self.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        # The reentrant kind gives no gradients to a block none of whose inputs has one; the base is frozen.
        base.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        base = self.get_base_model()
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()

    # -- saving and loading ------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any):
        """Write experts, router, skill library and settings to a folder; the base model is not copied.

        `adapter_config.json` and `adapter_model.safetensors` are what the fork reads; `dylora.json` and, where there
        are skills, `skills.json` and `skills.safetensors` are what `from_pretrained` adds. `README.md` is the card.
        """
        super().save_pretrained(str(save_directory), *args, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        settings = {
            "format": FORMAT,
            "base": self.base_identity.to_dict(),
            "top_k": self.router.wanted_top_k,
            "frozen": self.experts.frozen,
        }
        write_json(folder / SETTINGS, settings)
        self.skills.save(folder)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Called by PEFT when it saves: our text first, then PEFT's metadata above it."""
        describe_mixture(self, output_dir, base_name=self.base_identity.name, skills=self.skills)
        super().create_or_update_model_card(output_dir)

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | Path,
        model: nn.Module | None = None,
        *,
        token: str | None = None,
        dtype: torch.dtype | str | None = None,
        is_trainable: bool = False,
    ) -> "DyLoRA_MoE":
        """Load what `save_pretrained` wrote; the logits are bit-equal to those of the model that was saved.

        Args:
            save_directory: the folder, or a hub repository that holds its files.
            model: a loaded base to put the mixture on; by default the one it was trained for is loaded by its name.
            token: of the Hugging Face hub.
            dtype: of the base's weights, where it is loaded here; see the constructor.
            is_trainable: let experts (but those that were frozen) and router train on.

        Returns:
            The model in eval mode, all experts active.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no DyLoRA-MoE, or one for another base.
        """
        if isinstance(save_directory, nn.Module):
            raise ValueError("The folder comes first: DyLoRA_MoE.from_pretrained(folder, model=base).")
        folder = _local_folder(save_directory, token)
        settings = _read_settings(folder)
        wanted = BaseIdentity.from_dict(settings["base"])
        if model is None and not wanted.name:
            raise ValueError(
                f"The base of the mixture in {folder} came without a name. Load it yourself and pass it as model."
            )
        base, name = _load_base(wanted.name if model is None else model, token=token, dtype=dtype)
        found = BaseIdentity.of(base, name)
        wanted.check_is(found)
        config = MoELoraConfig.from_pretrained(str(folder))
        config.inference_mode = not is_trainable
        skills = SkillLibrary.load(folder)
        loaded = cls.__new__(cls)
        loaded._set_up(
            base,
            config,
            found,
            top_k=settings["top_k"],
            frozen=settings["frozen"],
            skills=skills,
        )
        loaded.load_adapter(str(folder), MIXTURE, is_trainable=is_trainable, torch_device=str(base.device))
        if is_trainable:
            loaded.experts.activate_all_experts()
        return loaded.eval()


def _load_base(
    model: str | Path | nn.Module, *, token: str | None, dtype: torch.dtype | str | None
) -> tuple[nn.Module, str]:
    """The base model, and the name to find it by again."""
    if isinstance(model, nn.Module):
        if isinstance(model, PeftModelForCausalLM) or not hasattr(model, "generate"):
            raise ValueError(
                f"model_name is a {type(model).__name__}, but must be a name or a causal language model of "
                "transformers without adapters."
            )
        return model, str(getattr(model, "name_or_path", "") or "")
    if dtype is None:
        dtype = "auto" if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(resolve_model_name(model), dtype=dtype, token=token), str(model)


def _local_folder(name: str | Path, token: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "~", "/")):
        raise FileNotFoundError(f"There is no folder {name}. Give one that save_pretrained wrote.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(text, token=token, allow_patterns=["*.json", "*.safetensors"]))


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {SETTINGS}, so no DyLoRA-MoE was saved there. A mixture of the fork alone is loaded "
            "with AutoPeftModelForCausalLM."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as wrong:
        raise ValueError(f"{file} is not JSON ({wrong.msg}, line {wrong.lineno}). Save the mixture again.") from wrong
    if settings.get("format") != FORMAT:
        raise ValueError(f"{file} has format {settings.get('format')}, but this version reads format {FORMAT}.")
    return settings


def _joined(passes: list[Tensor]) -> Tensor:
    """The weights of all tokens from those of each pass: a pass of one token continues, a longer one starts anew."""
    start = max((i for i, weights in enumerate(passes) if weights.dim() < 3 or weights.shape[1] > 1), default=0)
    return torch.cat(passes[start:], dim=1) if passes[start].dim() == 3 else passes[-1]
