"""`quantize`: a set of experts from one model."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_common.models.base_model import FOUR_BIT_BLOCK, load_base_model, resolve_model_name
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import whole_folder
from moe_common.text.documents import load_documents
from moe_common.text.packing import pack_documents
from moe_ext.moqe.experts.calibrate import body_linears, pack_linear_layers
from moe_ext.moqe.experts.expert import torch_dtype
from moe_ext.moqe.experts.gguf_files import write_gguf
from moe_ext.moqe.experts.group_quant import GroupFormat
from moe_ext.moqe.experts.packed_folder import save_packed
from moe_ext.moqe.experts.schemes import Scheme, parse_schemes
from moe_ext.moqe.options import QuantizeOptions
from moe_ext.moqe.training.rows import shuffled

logger = logging.getLogger(__name__)


def quantize(options: QuantizeOptions) -> list[Path]:
    """Make the experts that are not there yet; each appears whole. All in a folder are of one model and one rounding.

    Returns:
        Their folders and files, in the order of the schemes.

    Raises:
        ValueError, FileNotFoundError: an unknown model, scheme or text.
    """
    schemes = parse_schemes(options.schemes)
    resolve_model_name(options.model)
    texts = {source: load_documents(source, "train")["text"] for scheme in schemes for source in scheme.sources}
    places = [Path(options.output) / scheme.file_name for scheme in schemes]
    with RunFolder(options.output, "moqe quantize", asdict(options), free=("output", "schemes"), option="--output"):
        for scheme, place in zip(schemes, places, strict=True):
            if place.exists():
                logger.info("%s is there already", place)
                continue
            _make(scheme, place, options, texts)
            logger.info("%s is written", place)
    return places


def _make(scheme: Scheme, place: Path, options: QuantizeOptions, texts: dict[str, Sequence[str]]) -> None:
    if scheme.kind == "bitsandbytes":
        model, tokenizer = load_with_bitsandbytes(options.model, scheme.name)
        _save_as_transformers_does(place, model, tokenizer)
        return
    # Rounded from float32, computed in what is asked for: a scale is chosen once.
    model, tokenizer = load_base_model(options.model, dtype=torch.float32)
    if scheme.kind == "full":
        _save_as_transformers_does(place, model.to(torch.bfloat16), tokenizer)
    elif scheme.kind == "gguf":
        write_gguf(place, model, tokenizer, scheme.name)
    else:
        form = GroupFormat(bits=scheme.bits, group_size=options.group_size)
        blocks_NL = calibration_blocks(scheme.sources, texts, tokenizer, options) if scheme.sources else None
        if scheme.sources:
            model.to(torch_dtype(options.dtype))
        pack_linear_layers(model, form, blocks_NL)
        save_packed(place, model, tokenizer, form, {"scheme": scheme.name, "options": asdict(options)})


def calibration_blocks(
    sources: Sequence[str],
    texts: dict[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    options: QuantizeOptions,
) -> Tensor:
    """Blocks [N, L] of calibration text, as many of each source as there are of any.

    Raises:
        ValueError: a source has too little text.
    """
    wanted = -(-options.calibration_blocks // len(sources))
    chosen = []
    for source in sources:
        # Long documents are cut, so that many kinds of text are seen.
        documents = [text[: options.calibration_length * 8] for text in shuffled(texts[source])]
        packed = pack_documents(
            documents[: wanted * 8], tokenizer, block_size=options.calibration_length, keep_remainder=False
        )
        if len(packed) == 0:
            raise ValueError(
                f"{source} has no block of {options.calibration_length} tokens to calibrate on. Give more text, or a "
                "shorter calibration_length."
            )
        chosen.append(torch.tensor(packed[: min(wanted, len(packed))]["input_ids"]))
    return torch.cat(chosen)[: options.calibration_blocks]


def load_with_bitsandbytes(name: str, scheme: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose layers bitsandbytes holds in NF4 (Dettmers et al. 2023) or LLM.int8 (2022).

    The CPU kernel for NF4 multiplies only where a layer's input has a multiple of 64 numbers; without a GPU the other
    layers stay as they are, and the log says how many.
    """
    config = BitsAndBytesConfig(load_in_8bit=True)
    if scheme == "nf4":
        plain, _ = load_base_model(name)
        misfits = {layer for layer, linear in body_linears(plain) if linear.in_features % FOUR_BIT_BLOCK}
        skipped = sorted({layer.rpartition(".")[2] for layer in misfits}) if not torch.cuda.is_available() else []
        if skipped:
            logger.warning("nf4: on a CPU %s cannot be held in 4 bits and stay as they are", ", ".join(skipped))
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
            llm_int8_skip_modules=["lm_head", *skipped],
        )
    where = resolve_model_name(name)
    _, tokenizer = load_base_model(name)
    return AutoModelForCausalLM.from_pretrained(where, quantization_config=config, dtype=torch.bfloat16), tokenizer


def _save_as_transformers_does(place: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with whole_folder(place) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
