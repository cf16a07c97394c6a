"""Passes of a backbone over a growing text, with its KV cache, from which the last tokens can be taken out again.

Shape letters: B rows, P tokens of the prompt, Q tokens of a pass, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_ext.multi_token.decoding.verification import prepare_cache, roll_back
from moe_ext.multi_token.model.backbone import CaughtStates, body_output, takes


class BackbonePasses:
    """Reads tokens into the cache.

    Args:
        backbone: any causal language model of transformers.
        caught: what its body returns.
        prompt_BP: the prompt; of what the cache holds already only the length counts.
        arguments: of the forward: `past_key_values`; `attention_mask` and `position_ids` of the prompt, or None where
            nothing is padded; whatever else goes to every pass.

    Raises:
        ValueError: the cache cannot forget single tokens.
    """

    def __init__(
        self, backbone: PreTrainedModel, caught: CaughtStates, prompt_BP: Tensor, arguments: dict[str, Any]
    ) -> None:
        self.backbone = backbone
        self.caught = caught
        self.prompt_BP = prompt_BP
        rest = dict(arguments)
        self.cache = rest.pop("past_key_values")
        prepare_cache(self.cache)
        self.mask_BP = rest.pop("attention_mask", None)
        self.position_BP = rest.pop("position_ids", None)
        if self.position_BP is None and takes(backbone, "position_ids"):
            counted_BP = torch.ones_like(prompt_BP) if self.mask_BP is None else self.mask_BP
            self.position_BP = (counted_BP.cumsum(dim=-1) - 1).clamp(min=0)
        rest.pop("logits_to_keep", None)
        self.prompt_only = {"logits_to_keep": 1} if takes(backbone, "logits_to_keep") else {}
        self.rest = {**rest, "use_cache": True}
        self.num_passes = 0

    def read_prompt(self) -> Tensor:
        """[B, V] scores of the first new token, from one pass over the prompt."""
        known = self.cache.get_seq_length()
        arguments = self.prompt_only | {"attention_mask": self.mask_BP}
        if self.position_BP is not None:
            arguments["position_ids"] = self.position_BP[:, known:]
        self.num_passes += 1
        logits_BQV = self.backbone(
            input_ids=self.prompt_BP[:, known:], past_key_values=self.cache, **arguments, **self.rest
        ).logits
        return logits_BQV[:, -1]

    def read(self, tokens_BQ: Tensor) -> Tensor:
        """[B, Q, V] scores of the token behind each of these, which follow all that was read before."""
        num_rows, num_tokens = tokens_BQ.shape
        before = self.cache.get_seq_length() - self.prompt_BP.shape[1]
        arguments: dict[str, Tensor | None] = {"attention_mask": None}
        if self.mask_BP is not None:
            seen_BQ = self.mask_BP.new_ones(num_rows, before + num_tokens)
            arguments["attention_mask"] = torch.cat([self.mask_BP, seen_BQ], dim=1)
        if self.position_BP is not None:
            offset_Q = torch.arange(before + 1, before + num_tokens + 1, device=tokens_BQ.device)
            arguments["position_ids"] = self.position_BP[:, -1:] + offset_Q
        self.num_passes += 1
        return self.backbone(input_ids=tokens_BQ, past_key_values=self.cache, **arguments, **self.rest).logits

    def states(self, num_tokens: int | None = None) -> Tensor:
        """[B, Q, D] the states behind the first tokens of the last pass; by default behind all of them."""
        return self.caught.state_BLD[:, :num_tokens]

    def forget(self, num_tokens: int) -> None:
        """Take the last tokens out of the cache."""
        roll_back(self.cache, num_tokens)


@contextmanager
def backbone_passes(
    backbone: PreTrainedModel, prompt_BP: Tensor, arguments: dict[str, Any]
) -> Iterator[BackbonePasses]:
    """`BackbonePasses` whose hook on the body is gone when the block ends."""
    with body_output(backbone) as caught:
        yield BackbonePasses(backbone, caught, prompt_BP, arguments)
