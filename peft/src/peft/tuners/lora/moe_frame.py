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
"""What is known while a routed model runs: weights that were decided, which tokens are real, what the gates measured.

Every reading of a forward's arguments that tells tokens from padding stands here.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Optional

import torch


class Frame:
    """What is known while the model, or a checkpointed block of it, runs.

    Args:
        given: the arguments of the forward by name, from which the tokens are told; none between two forwards.
        expand: whether rows of `[batch, num_experts]` may be repeated, as `generate` repeats its inputs over beams.
        encoder_decoder: whether the model has two sequences of tokens, of an encoder and of a decoder.
    """

    def __init__(
        self, given: Optional[dict[str, Any]] = None, *, expand: bool = False, encoder_decoder: bool = False
    ) -> None:
        given = {} if given is None else given
        tokens = input_shape(given)
        # Weights decided outside of the layers, by site; under `EXPLICIT` those that the caller passed.
        self.weights: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, torch.Tensor] = {}
        # Where nothing trains: site, logits and mask of each gate that ran, not measured yet.
        self.kept_logits: list[tuple[str, torch.Tensor, Optional[torch.Tensor]]] = []
        self.expand = expand
        self.num_tokens = None if tokens is None or encoder_decoder else math.prod(tokens)
        self.token_mask = _token_mask(given, tokens)
        self.logits_to_keep = given.get("logits_to_keep")
        self.encoder_decoder = encoder_decoder
        self.decoder_mask = _decoder_mask(given) if encoder_decoder else None
        # None while the encoder runs: until it returns, all tokens are its own.
        outputs = given.get("encoder_outputs")
        self.encoder_states: Optional[torch.Tensor] = None if outputs is None else outputs[0]

    def again(self, weights: dict[str, torch.Tensor]) -> Frame:
        """A frame for running a part of the same forward again."""
        frame = copy.copy(self)
        frame.weights, frame.statistics, frame.kept_logits = weights, {}, []
        return frame

    def count(self, site: str, vector: torch.Tensor) -> None:
        held = self.statistics.get(site)
        self.statistics[site] = vector if held is None else held + vector

    def reads_encoder(self, x: torch.Tensor) -> bool:
        """Whether a layer's input is what the encoder put out, as that of keys and values in cross-attention is."""
        states = self.encoder_states
        return states is not None and x.shape == states.shape and x.data_ptr() == states.data_ptr()

    def kept(self, per_token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Pick from `[batch, seq, ...]` the tokens that `logits_to_keep` lets through to the head with input `x`."""
        keep = self.logits_to_keep
        if keep is None or x.dim() != 3 or x.shape[1] >= per_token.shape[1]:
            return per_token
        return per_token[:, slice(-keep, None) if isinstance(keep, int) else keep.to(per_token.device)]

    def mask_for(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Which tokens of a gate's input are real; None if all are, or if the model shuffled its tokens."""
        mask = self.token_mask
        if self.encoder_decoder and self.encoder_states is not None and not self.reads_encoder(x):
            mask = self.decoder_mask if x.dim() == 3 else None
            mask = None if mask is None else mask[:, -x.shape[1] :]  # with a KV cache, it covers earlier tokens too
        if mask is None:
            return None
        mask = self.kept(mask, x)
        return mask.to(x.device) if mask.numel() == x.shape[:-1].numel() else None


def input_shape(given: dict[str, Any]) -> Optional[tuple[int, ...]]:
    """`(batch, seq)` of the tokens that enter the model in this call, or None if they cannot be told."""
    if isinstance(given.get("input_ids"), torch.Tensor):
        return tuple(given["input_ids"].shape)
    if isinstance(given.get("inputs_embeds"), torch.Tensor):
        return tuple(given["inputs_embeds"].shape[:2])
    return None


def _token_mask(given: dict[str, Any], tokens: Optional[tuple[int, ...]]) -> Optional[torch.Tensor]:
    """Which tokens of this call are real; with a KV cache, the attention mask also covers the tokens before them."""
    mask = given.get("attention_mask")
    if tokens is None or len(tokens) != 2 or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    if mask.shape[0] != tokens[0] or mask.shape[1] < tokens[1]:
        return None
    return mask[:, mask.shape[1] - tokens[1] :].bool()


def _decoder_mask(given: dict[str, Any]) -> Optional[torch.Tensor]:
    """Which tokens of a decoder are real, `[batch, seq]`; where only labels are given, those that predict one."""
    mask, labels = given.get("decoder_attention_mask"), given.get("labels")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.bool()
    return labels != -100 if isinstance(labels, torch.Tensor) and labels.dim() == 2 else None
