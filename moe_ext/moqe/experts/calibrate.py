"""Round a model's linear layers, layer by layer: to nearest, or by GPTQ on a text of one's choice.

Experts that were calibrated on different texts err differently, and a mixture can gain from that.

Shape letters: N blocks, L tokens in a block, T tokens, O rows, C columns.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_ext.gptq import gptq
from moe_ext.moqe.experts.group_quant import GroupFormat, PackedLinear, choose_scales, round_to_codes, spread

logger = logging.getLogger(__name__)

BLOCKS_AT_ONCE = 16


def pack_linear_layers(model: PreTrainedModel, form: GroupFormat, blocks_NL: Tensor | None = None) -> None:
    """Replace the linear layers of a model's body by packed ones, in place; embedding and head stay as they are.

    Args:
        model: a causal language model.
        form: of the weights.
        blocks_NL: calibration text for GPTQ; None rounds to nearest.
    """
    with tqdm(total=len(list(body_linears(model))), desc=f"{form.bits} bits", unit="matrix") as bar:
        for block in decoder_blocks(model):
            layers = dict(body_linears(block))
            hessians = {} if blocks_NL is None else hessians_of(model, layers, block, blocks_NL)
            for name, layer in layers.items():
                rounded = by_gptq(layer.weight, hessians[name], form) if hessians else None
                block.set_submodule(name, PackedLinear.of(layer, form, rounded))
                bar.update()


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model's decoder.

    Raises:
        ValueError: it has none where transformers' decoders keep them.
    """
    decoder = model.get_decoder()
    for name in ("layers", "h", "blocks"):
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return getattr(decoder, name)
    raise ValueError(
        f"{type(decoder).__name__} keeps its blocks neither in 'layers' nor in 'h' nor in 'blocks', so they cannot be "
        "found. Quantise this model with another tool and give its folder as an expert."
    )


def body_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers below a module with their names; of a model, those of its blocks."""
    if isinstance(module, PreTrainedModel):
        for block in decoder_blocks(module):
            yield from body_linears(block)
        return
    yield from ((name, layer) for name, layer in module.named_modules() if type(layer) is nn.Linear)


def by_gptq(weight_OC: Tensor, hessian_CC: Tensor, form: GroupFormat) -> tuple[Tensor, Tensor]:
    """Codes [O, C] and scales [O, G] of a matrix that change its outputs on the calibration text little."""
    scale_OG = choose_scales(weight_OC, form)
    scale_OC = spread(scale_OG.double(), weight_OC.shape[1])

    def round_column(values_O: Tensor, column: int) -> Tensor:
        scale_O = scale_OC[:, column]
        return (round_to_codes(values_O, scale_O, form) - form.highest) * scale_O

    rounded_OC = gptq(weight_OC, hessian_CC, round_column)
    return round_to_codes(rounded_OC, scale_OC, form), scale_OG


@torch.no_grad()
def hessians_of(
    model: PreTrainedModel, layers: dict[str, nn.Linear], block: nn.Module, blocks_NL: Tensor
) -> dict[str, Tensor]:
    """The Hessian [C, C] of what each of some layers of a block reads, the blocks before it being as they are by now.

    The model runs from its beginning to this block: D blocks cost D / 2 whole passes over the text, and no knowledge
    of what a model hands from block to block is needed. Layers that read the same tensor share its Hessian.
    """
    device = model.get_input_embeddings().weight.device
    read: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: read.__setitem__(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        for some_BL in blocks_NL.split(BLOCKS_AT_ONCE):
            read.clear()
            with _stopped_behind(block):
                model(some_BL.to(device), use_cache=False)
            made: dict[int, Tensor] = {}
            for name, inputs in read.items():
                if id(inputs) not in made:
                    made[id(inputs)] = _hessian(inputs.flatten(0, -2).float()) * (len(some_BL) / len(blocks_NL))
                sums[name] = sums.get(name, 0.0) + made[id(inputs)]
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _hessian(inputs_TC: Tensor) -> Tensor:
    """2 X^T X / T in float64, multiplied in float32: three times as fast, and a batch has few enough tokens for it."""
    return (inputs_TC.T @ inputs_TC).double().mul_(2 / len(inputs_TC))


class _Stopped(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def _stopped_behind(block: nn.Module) -> Iterator[None]:
    def stop(*_):
        raise _Stopped

    hook = block.register_forward_hook(stop)
    try:
        yield
    except _Stopped:
        pass
    finally:
        hook.remove()
