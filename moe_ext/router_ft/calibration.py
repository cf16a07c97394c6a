"""Calibration text, and the inputs that each layer of a model gets on it.

Shape letters: N blocks, L tokens in a block, B blocks at once, H hidden size, T tokens, K chosen experts a token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_common.runs.options import split_names
from moe_common.text.documents import Part
from moe_common.text.reading import read_blocks

LONGEST_DEFAULT = 2048  # tokens; shorter where the model's context is


@dataclass(kw_only=True)
class CalibrationConfig:
    dataset: str = field(
        default="prose,code,math",
        metadata={"help": "Calibration text: built-in domains, files, folders or hub datasets, comma separated."},
    )
    nsamples: int = field(default=128, metadata={"help": "Blocks of calibration text."})
    seqlen: int | None = field(
        default=None, metadata={"help": "Tokens in a block; by default 2048, or the model's context where shorter."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the choice of blocks."})

    def __post_init__(self):
        if self.nsamples < 1:
            raise ValueError(f"nsamples is {self.nsamples}, but at least one block is needed.")
        if self.seqlen is not None and self.seqlen < 2:
            raise ValueError(
                f"seqlen is {self.seqlen}, but at least 2 tokens are needed: one to read, one to predict."
            )

    @property
    def sources(self) -> list[str]:
        return split_names(self.dataset)


def block_length(config: CalibrationConfig, context: int) -> int:
    """Tokens in a block for a model of this context.

    Raises:
        ValueError: the config asks for more than the context.
    """
    if config.seqlen is None:
        return min(LONGEST_DEFAULT, context)
    if config.seqlen > context:
        raise ValueError(f"seqlen is {config.seqlen}, but the model's context has {context} tokens. Lower seqlen.")
    return config.seqlen


def text_blocks(
    sources: Sequence[str],
    split: Part,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_blocks: int,
    block_size: int,
    seed: int,
    skip: int = 0,
) -> Tensor:
    """Blocks of text [N, L], the same number of each source (the first ones get the remainder), in random order.

    Args:
        sources: as `moe_common.text.documents.load_documents` takes them.
        split: of the sources.
        tokenizer: the model's own.
        num_blocks: in all (N).
        block_size: tokens in a block (L).
        seed: of the choice and the order.
        skip: leave out the blocks that a call with the same seed and this num_blocks returns.

    Raises:
        ValueError: a source has too little text.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for place, source in enumerate(sources):
        wanted, before = (_share(count, place, len(sources)) for count in (num_blocks, skip))
        blocks = read_blocks(source, split, tokenizer, block_size=block_size, at_least=wanted + before)
        order = torch.randperm(len(blocks), generator=generator)[before : before + wanted]
        if wanted:
            chosen.append(torch.tensor(blocks.select(order.tolist())["input_ids"]))
    blocks_NL = torch.cat(chosen)
    return blocks_NL[torch.randperm(len(blocks_NL), generator=generator)]


def _share(count: int, place: int, parts: int) -> int:
    return count // parts + (place < count % parts)


class LayerWalk:
    """Runs calibration blocks through a model one decoder layer after the other.

        walk = LayerWalk(model, decoder, blocks_NL)
        for layer in decoder:
            walk.run(layer)        # as often as wanted, with whatever hooks
            walk.advance(layer)    # its outputs become the inputs of the next

    Args:
        model: in eval mode.
        decoder: its decoder layers.
        blocks_NL: the blocks; they share their length, so every layer gets the same mask and positions for each.
        batch_size: blocks at once.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, decoder: nn.ModuleList, blocks_NL: Tensor, *, batch_size: int = 8):
        self.arguments = _arguments_of_layers(model, decoder, blocks_NL[:1])
        device = next(model.parameters()).device
        self.inputs: list[Tensor] = []
        for tokens_BL in blocks_NL.split(batch_size):
            with _stop_before(decoder[0]) as seen:
                model(tokens_BL.to(device), use_cache=False)
            self.inputs.append(seen["hidden_states"])

    @torch.no_grad()
    def run(self, layer: nn.Module) -> list[Tensor]:
        """The outputs of a layer on its inputs, a tensor [B, L, H] for each batch."""
        outputs = [layer(hidden_BLH, **self.arguments[layer]) for hidden_BLH in self.inputs]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    def advance(self, layer: nn.Module) -> None:
        """Take a layer's outputs as the next one's inputs."""
        self.inputs = self.run(layer)


@contextmanager
def recording(modules: dict[str, nn.Module], note: Callable[[str, tuple], Any]) -> Iterator[None]:
    """Call `note(name, inputs)` each time one of the modules runs."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Stopped(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def _stop_before(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def stop(_, inputs, arguments):
        seen["hidden_states"] = inputs[0] if inputs else arguments["hidden_states"]
        raise _Stopped

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield seen
    except _Stopped:
        pass
    finally:
        hook.remove()


def _arguments_of_layers(
    model: PreTrainedModel, decoder: nn.ModuleList, tokens_BL: Tensor
) -> dict[nn.Module, dict[str, Any]]:
    """The keyword arguments that each layer is called with, but for its hidden states."""
    noted: dict[nn.Module, dict[str, Any]] = {}

    def note(layer, _, arguments):
        noted[layer] = {name: value for name, value in arguments.items() if name != "hidden_states"}

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder]
    try:
        model(tokens_BL.to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return noted
