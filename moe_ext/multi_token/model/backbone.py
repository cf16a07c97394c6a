"""What the heads need of a frozen backbone: the state that its lm_head reads, the lm_head and the embedding.

Any causal language model of transformers serves, unchanged: its state is caught where its body returns it, which must
be what enters the lm_head, and its logits are its own, with whatever it does to them after the lm_head.

Shape letters: B rows, L tokens, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

PROBE_TOKENS = 4


class CaughtStates:
    """Where the states of the last pass are kept; none as long as nothing is caught."""

    state_BLD: Tensor = torch.empty(0)

    def entering(self, lm_head, inputs: tuple[Tensor, ...]) -> None:
        self.state_BLD = inputs[0]

    def returned(self, body, inputs: tuple, outputs) -> None:
        self.state_BLD = outputs[0]


@contextmanager
def lm_head_input(backbone: PreTrainedModel) -> Iterator[CaughtStates]:
    """Catch what enters the lm_head, pass by pass, until the block ends."""
    caught = CaughtStates()
    handle = backbone.get_output_embeddings().register_forward_pre_hook(caught.entering)
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def body_output(backbone: PreTrainedModel) -> Iterator[CaughtStates]:
    """Catch what the body returns, pass by pass, until the block ends; of each token, also where few have logits."""
    caught = CaughtStates()
    handle = backbone.base_model.register_forward_hook(caught.returned)
    try:
        yield caught
    finally:
        handle.remove()


@torch.no_grad()
def states_of(backbone: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """[B, L, D] states that the lm_head would read, without the cost of its logits."""
    return backbone.base_model(
        input_ids=input_ids_BL, attention_mask=attention_mask_BL, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def check_backbone(backbone: PreTrainedModel) -> None:
    """Refuse a model whose lm_head does not read what its body returns.

    Raises:
        ValueError: no causal decoder with an lm_head, or another state enters the lm_head than the body returns.
    """
    name = type(backbone).__name__
    if backbone.config.is_encoder_decoder or backbone.get_output_embeddings() is None:
        raise ValueError(
            f"{name} is not a decoder with an lm_head, which token heads stand in front of. Load the model with "
            "AutoModelForCausalLM."
        )
    device = backbone.get_input_embeddings().weight.device
    probe_BL = torch.arange(PROBE_TOKENS, device=device)[None]
    with lm_head_input(backbone) as read, body_output(backbone) as returned:
        backbone(input_ids=probe_BL, attention_mask=torch.ones_like(probe_BL), use_cache=False)
    read_BLD, returned_BLD = read.state_BLD, returned.state_BLD
    if read_BLD.shape != returned_BLD.shape or not torch.equal(read_BLD, returned_BLD):
        raise ValueError(
            f"The lm_head of {name} reads {tuple(read_BLD.shape)} numbers that are not those its body returns "
            f"({tuple(returned_BLD.shape)}), so heads trained on the body's states could not use it. Take another "
            "backbone."
        )


def takes(backbone: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(backbone.forward).parameters
