"""E separate passes: each adapter runs alone through the whole model, and the logits are mixed.

What one does without a router in the layers. It is another function than mixing in the layers, with other logits; it
is here for its cost.
"""

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel


class SeparatePasses:
    """Adapters set one after another over one base; the mean of their logits.

    Args:
        base: the frozen base model.
        config: of every adapter.
        num_experts: how many adapters.
        autocast_adapter_dtype: keep the adapters in float32 over a bfloat16 base, as for `get_peft_model`.
    """

    def __init__(
        self, base: PreTrainedModel, config: LoraConfig, *, num_experts: int, autocast_adapter_dtype: bool
    ) -> None:
        self.names = [f"expert_{expert}" for expert in range(num_experts)]
        cast = {"autocast_adapter_dtype": autocast_adapter_dtype}
        self.model = PeftModel(base, config, adapter_name=self.names[0], **cast)
        for name in self.names[1:]:
            self.model.add_adapter(name, config, **cast)
        self.adapters = [tensor for name, tensor in self.model.named_parameters() if "lora_" in name]
        for tensor in self.adapters:
            tensor.requires_grad_(True)

    def parameters(self) -> list[torch.nn.Parameter]:
        return self.adapters

    def logits(self, input_ids: Tensor) -> Tensor:
        """[batch, seq, vocab], the mean over the passes."""
        total = None
        for name in self.names:
            self._activate(name)
            logits = self.model(input_ids=input_ids, use_cache=False).logits
            total = logits if total is None else total + logits
        return total / len(self.names)

    def loss(self, input_ids: Tensor) -> Tensor:
        logits = self.logits(input_ids)
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        """Greedy, with a cache for each adapter; [1, prompt + new]."""
        caches, new = dict.fromkeys(self.names), input_ids
        for _ in range(new_tokens):
            total = None
            for name in self.names:
                self._activate(name)
                out = self.model(input_ids=new, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
                caches[name] = out.past_key_values
                total = out.logits if total is None else total + out.logits
            new = total[:, -1].argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], dim=1)
        return input_ids

    def _activate(self, name: str) -> None:
        self.model.set_adapter(name)
        # set_adapter freezes the others; here all of them train
        for tensor in self.adapters:
            tensor.requires_grad_(True)
