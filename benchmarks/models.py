"""The base model that every way is built over: Llama-type, random weights, large enough to outweigh the adapters."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Dimensions of the base model, the rank of an expert, and the tokens of one pass.

    Args:
        hidden, intermediate: widths of a decoder block.
        layers, heads, vocab: number of decoder blocks, attention heads, entries of the vocabulary.
        rank: rank of each expert.
        tokens: length of the one sequence of a pass.
        prompt, new_tokens: lengths for generation.
    """

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 2
    heads: int = 16
    vocab: int = 1024
    rank: int = 16
    tokens: int = 512
    prompt: int = 128
    new_tokens: int = 32


SIZES = {
    "small": Size(),
    "large": Size(hidden=4096, intermediate=11008, heads=32, vocab=4096, tokens=4096, prompt=1024, new_tokens=64),
    "tiny": Size(hidden=32, intermediate=48, heads=4, vocab=64, rank=4, tokens=24, prompt=4, new_tokens=3),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and in which number format everything runs.

    bfloat16 runs as users run it. Without gradients all of the model is bfloat16 (`autocast_adapter_dtype=False`); a
    training step keeps the adapters in float32, as PEFT does by default, over a bfloat16 base under autocast.

    Args:
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        size: the dimensions.
    """

    device: str = "cpu"
    dtype: str = "float32"
    size: Size = SIZES["small"]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def autocast(self) -> torch.autocast:
        """The context of a training step."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def to_dict(self) -> dict:
        return asdict(self)


def make_base(setting: Setting) -> LlamaForCausalLM:
    """A frozen base model with random weights, the same on every call."""
    size = setting.size
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocab,
        max_position_embeddings=max(4096, size.tokens),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config).to(setting.device, setting.torch_dtype).requires_grad_(False).eval()


def share(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules over the same parameters, so that many ways hold the frozen weights once.

    It is also fairer: no way finds the weights of the base in the cache that the one before it had to load.
    """
    held = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, held)


def random_tokens(vocab: int, tokens: int, device: str | torch.device) -> Tensor:
    """`input_ids`, [1, tokens], the same on every call."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocab, (1, tokens), generator=generator).to(device)
