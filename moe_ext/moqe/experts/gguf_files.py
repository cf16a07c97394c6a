"""GGUF files of Llama-type models: written with the package gguf, read by transformers.

transformers 5.23 keeps GGUF weights packed only where a matmul kernel for the device is published, which for a CPU is
not the case; here it is always asked to unpack them while it loads, so such an expert has the memory of its
unpacked weights and the numbers of its packed ones.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_common.runs.whole_files import whole_file

NEEDS_GGUF = "GGUF files are read and written by the package gguf, which is not installed: pip install '.[moqe]'"
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3  # gguf's token types


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, number_type: str) -> None:
    """Write a Llama-type model, whole or not at all.

    Args:
        path: of the file.
        model: with plain weights; vectors (norms) are kept in float32, matrices get the type.
        tokenizer: a byte-level BPE. Its tokenizer.json goes into the file too, in the field that the GGUF format
            has for it, since a GGUF vocabulary does not say how text is cut before the merges.
        number_type: `f16`, or a block type of gguf, in lower case (`q8_0`, `q4_1`, ...).

    Raises:
        ModuleNotFoundError: gguf is not installed.
        ValueError: another architecture, or a matrix whose rows are no whole blocks.
    """
    gguf = _gguf()
    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"The model is a {config.model_type}, but GGUF files are written here of llama models alone.")
    types = gguf.GGMLQuantizationType[number_type.upper()]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with whole_file(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        writer.add_name(path.stem)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{number_type.upper()}"])
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        for name, tensor in model.state_dict().items():
            if name in tied:
                continue
            array = _in_gguf_order(name, tensor.detach().float(), config).numpy()
            kind = types if array.ndim > 1 else gguf.GGMLQuantizationType.F32
            try:
                array = gguf.quants.quantize(array, kind)
            except (gguf.quants.QuantError, ValueError) as wrong:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} cannot be written as {number_type}: {wrong}"
                ) from wrong
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file; its weights are unpacked.

    Raises:
        ModuleNotFoundError: gguf is not installed.
        ValueError: it is no GGUF file, or of an architecture that transformers cannot read; names those it can.
    """
    fields = _fields_of(path)
    architecture = fields["general.architecture"].contents()
    supported = supported_architectures()
    if architecture not in supported:
        raise ValueError(
            f"{path.name} is of the architecture '{architecture}', which transformers cannot read from GGUF. It can "
            f"read {', '.join(supported)}. Give such a file, or the model as safetensors."
        )
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model, loading = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=dtype, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):  # transformers warns and fills them with random numbers
        raise ValueError(f"{path} lacks {len(missing)} weights, among them {missing[0]}. Copy it again.")
    return model, _tokenizer_of(fields, where)


def tokenizer_of_file(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: its tokenizer.json where it carries one, else what transformers makes of it."""
    return _tokenizer_of(_fields_of(path), {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name})


def supported_architectures() -> list[str]:
    """The architectures that transformers reads from GGUF."""
    from transformers.integrations.gguf.utils import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    sections = {"general", "tokenizer"}  # of the file's metadata, listed beside the architectures
    return sorted({*GGUF_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - sections)


def _gguf():
    try:
        import gguf
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(NEEDS_GGUF) from missing
    return gguf


def _fields_of(path: Path) -> dict:
    gguf = _gguf()
    try:
        fields = gguf.GGUFReader(path).fields
        assert "general.architecture" in fields
    except (AssertionError, ValueError, IndexError) as wrong:
        raise ValueError(f"{path} is no GGUF file, or was cut off: {wrong} Copy or write it again.") from wrong
    return fields


def _tokenizer_of(fields: dict, where: dict[str, str]) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(**where)
    field = _gguf().Keys.Tokenizer.HF_JSON
    if field not in fields:
        return tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        (Path(scratch) / "tokenizer.json").write_text(fields[field].contents(), encoding="utf-8")
        return AutoTokenizer.from_pretrained(scratch)


def _add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    if whole["model"]["type"] != "BPE":
        raise ValueError(f"The tokenizer is a {whole['model']['type']}, but byte-level BPE alone is written to GGUF.")
    by_id = {place: token for token, place in tokenizer.get_vocab().items()}
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokens = [by_id.get(place, f"[PAD{place}]") for place in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # digits one by one, then GPT-2's pattern
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL_TOKEN if token in special else NORMAL_TOKEN for token in tokens])
    merges = whole["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for kind in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_string(_gguf().Keys.Tokenizer.HF_JSON, json.dumps(whole))


def _in_gguf_order(name: str, tensor: Tensor, config) -> Tensor:
    """Queries and keys with the two halves of each rotary pair side by side, as GGUF's Llama has them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, num_heads in heads.items():
        if f"{projection}.weight" in name:
            return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
    return tensor
