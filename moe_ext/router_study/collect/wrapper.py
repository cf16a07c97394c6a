"""A mixture ready to be studied: the model, its tokenizer and its gates."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from moe_ext.moe_models import SMALL_MOE, context_of, load_moe
from moe_ext.router_study.collect.revisions import resolve_revision
from moe_ext.router_study.gates.base import Gates, Routing
from moe_ext.router_study.gates.find import find_gates

ADAPTER_CONFIG = "adapter_config.json"


class MoEModelWrapper:
    """A mixture, its tokenizer and its gates.

    Args:
        model: a mixture of transformers, or a PEFT model with routed LoRA experts; put into eval mode.
        tokenizer: its tokenizer; None where only tokens are given to the model.
        name: what to call it in tables.
        layers: study these gates alone, by number from 0.

    Raises:
        ValueError: no router was found, or there is no such layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer=None,
        *,
        name: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name = name or type(model).__name__
        self.gates: Gates = find_gates(model, layers)

    @classmethod
    def load(
        cls,
        name: str | Path = SMALL_MOE,
        *,
        revision: str | None = None,
        device: str = "cpu",
        layers: Sequence[int] | None = None,
    ) -> "MoEModelWrapper":
        """Load a mixture by name.

        Args:
            name: `small-moe`, a folder of a mixture or of a routed LoRA mixture, or a hub model as `owner/name`.
            revision: a branch or tag of the hub, or a folder below `name`.
            device: where to compute.
            layers: as for the class.

        Raises:
            FileNotFoundError: a folder that is not there.
            ValueError: an unknown name, a model without routers, a revision that does not exist (which do is said).
        """
        folder, branch = resolve_revision(name, revision)
        label = str(name) if revision is None else f"{name}@{revision}"
        if (Path(folder) / ADAPTER_CONFIG).is_file():
            model = AutoPeftModelForCausalLM.from_pretrained(folder)
            tokenizer = _tokenizer_of_adapter(Path(folder), model)
        else:
            model, tokenizer = load_moe(folder, revision=branch)
        return cls(model.to(device), tokenizer, name=label, layers=layers)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def num_ids(self) -> int:
        """Rows of the embedding, V."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def context(self) -> int | None:
        """Tokens that the model can read at once, where its config says so."""
        return context_of(self.model)

    @torch.no_grad()
    def run(self, ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Routing]:
        """One forward pass: next-token logits [B, S, V], and what the gates decided.

        Args:
            ids_BS, mask_BS: token ids and a mask, true for tokens; padding of any kind.
        """
        with self.gates.listening() as heard:
            logits_BSV = self.forward(ids_BS, mask_BS)
        return logits_BSV, self.gates.routing(heard)

    @torch.no_grad()
    def forward(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Next-token logits [B, S, V] of a plain pass."""
        mask = None if bool(mask_BS.all()) else mask_BS.long()  # without a mask attention takes its fast path
        return self.model(input_ids=ids_BS, attention_mask=mask, use_cache=False).logits


def _tokenizer_of_adapter(folder: Path, model):
    where = folder
    if not (folder / "tokenizer_config.json").is_file():
        where = model.peft_config[model.active_adapters[0]].base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(where)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
