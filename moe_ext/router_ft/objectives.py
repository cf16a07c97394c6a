"""What router finetuning minimises: the loss of a quantised model on a batch of text.

- `ce`: cross-entropy of the next token.
- `kl`: the full-precision model's distribution of the next token, at a temperature (Hinton et al. 2015,
  arXiv:1503.02531): T^2 KL(teacher || student).
- `align`: the full-precision model's routing: KL(teacher || student) of the softmax of each layer's router logits.
- `blocks`: each mixture layer's output: |student - teacher|^2 / |teacher|^2, both on the student's own input, summed
  over the layers.

Shape letters: B blocks, L tokens in a block, T tokens, E experts, V vocabulary.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from moe_ext.routers import moe_layers

ObjectiveName = Literal["ce", "kl", "align", "blocks"]
Objective = Callable[[Tensor], Tensor]

NEED_TEACHER = ("kl", "align", "blocks")


def make_objective(
    name: ObjectiveName, student: PreTrainedModel, teacher: PreTrainedModel | None, *, temperature: float = 1.0
) -> Objective:
    """The loss of the student as a function of a batch of tokens [B, L].

    Args:
        name: which of the four.
        student: the model whose routers are trained.
        teacher: the same model in full precision; not needed for `ce`.
        temperature: of `kl`.

    Raises:
        ValueError: an unknown name, or no teacher where one is needed.
    """
    if name not in get_args(ObjectiveName):
        raise ValueError(f"objective is '{name}', but must be one of {', '.join(get_args(ObjectiveName))}.")
    if name in NEED_TEACHER and teacher is None:
        raise ValueError(f"The objective '{name}' compares with the full-precision model. Give it, or take 'ce'.")
    return {
        "ce": lambda tokens_BL: next_token_loss(student, tokens_BL),
        "kl": lambda tokens_BL: distillation_loss(student, teacher, tokens_BL, temperature=temperature),
        "align": lambda tokens_BL: alignment_loss(student, teacher, tokens_BL),
        "blocks": lambda tokens_BL: block_loss(student, teacher, tokens_BL),
    }[name]


def next_token_loss(student: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    """Nats a token; from the logits, because `outputs.loss` may hold a balance loss as well."""
    # The last token is left out of what is read: out of the logits, it would cost a copy of their gradient.
    logits_BLV = student(tokens_BL[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BLV.float().flatten(0, 1), tokens_BL[:, 1:].flatten())


def distillation_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens_BL: Tensor, *, temperature: float
) -> Tensor:
    """T^2 KL(teacher || student) of the next token, mean over the tokens."""
    with torch.no_grad():
        wanted_TV = teacher(tokens_BL, use_cache=False).logits.float().flatten(0, 1) / temperature
    found_TV = student(tokens_BL, use_cache=False).logits.float().flatten(0, 1) / temperature
    return temperature**2 * _kl(wanted_TV, found_TV)


def alignment_loss(student: PreTrainedModel, teacher: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax of the router logits, mean over tokens and layers."""
    with torch.no_grad():
        wanted = _router_logits(teacher, tokens_BL)
    found = _router_logits(student, tokens_BL)
    return torch.stack([_kl(*pair) for pair in zip(wanted, found, strict=True)]).mean()


def block_loss(student: PreTrainedModel, teacher: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 of each mixture layer's output, both on the student's input, summed."""
    seen: list[tuple[Tensor, Tensor]] = []
    layers, wanted_layers = moe_layers(student), moe_layers(teacher)
    hooks = [
        layer.block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        for layer in layers
    ]
    try:
        student.base_model(tokens_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    losses = []
    for (hidden, found), layer in zip(seen, wanted_layers, strict=True):
        with torch.no_grad():
            wanted = layer.block(hidden.detach()).float()
        losses.append((found.float() - wanted).square().sum() / wanted.square().sum())
    return torch.stack(losses).sum()


def _kl(wanted_TV: Tensor, found_TV: Tensor) -> Tensor:
    return kl_div(found_TV.log_softmax(dim=-1), wanted_TV.log_softmax(dim=-1), log_target=True, reduction="batchmean")


def _router_logits(model: PreTrainedModel, tokens_BL: Tensor) -> list[Tensor]:
    """The logits [T, E] of every router, in float32; the first of what a router returns, in every family."""
    logits: list[Tensor] = []
    layers = moe_layers(model)
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, output, width=layer.num_experts: logits.append(output[0].float().reshape(-1, width))
        )
        for layer in layers
    ]
    try:
        model.base_model(tokens_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return logits
