"""Find a base model by name: the committed one, SmolLM2-135M from a package, a local folder, or a hub model.

model, tokenizer = load_base_model()                   # the small committed base, no network
model, tokenizer = load_base_model("smollm2-135m")     # converted once by `python -m moe_common.models.smollm2`
model, tokenizer = load_base_model("owner/name")       # anything transformers can load
"""

import difflib
import re
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_common.models.smollm2 import smollm2_folder

Quantization = Literal["none", "8bit", "4bit"]

FOUR_BIT_BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit formats

COMMITTED = "base"
SMOLLM2 = "smollm2-135m"
COMMITTED_FOLDER = Path(__file__).parent / "base"


def resolve_model_name(name: str | Path = COMMITTED) -> str:
    """What transformers' `from_pretrained` takes for a name of ours.

    Args:
        name: `base`, `smollm2-135m`, a local folder, or a hub model as `owner/name`.

    Returns:
        A folder that exists, or the hub name unchanged.

    Raises:
        FileNotFoundError: a folder that is not there, or SmolLM2 before it was fetched.
        ValueError: a name that is none of these; a folder without a config.json.
    """
    text = str(name)
    if text == COMMITTED:
        return _model_folder(COMMITTED_FOLDER)
    if text == SMOLLM2:
        folder = smollm2_folder()
        if not folder.exists():
            raise FileNotFoundError(
                f"{SMOLLM2} is not in the cache ({folder}). Fetch and convert it once with: make smollm2 "
                "(or python -m moe_common.models.smollm2)."
            )
        return _model_folder(folder)
    path = Path(text).expanduser()
    if path.is_dir():
        return _model_folder(path)
    if text.startswith((".", "~", "/")) or text.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder {text}. Check the path.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return text
    close = difflib.get_close_matches(text, (COMMITTED, SMOLLM2), n=1, cutoff=0.4)
    hint = f"Closest: '{close[0]}'. " if close else ""
    raise ValueError(
        f"Unknown model '{text}'. {hint}Give '{COMMITTED}', '{SMOLLM2}', a local folder, or a hub model as owner/name."
    )


def load_base_model(
    name: str | Path = COMMITTED,
    *,
    dtype: torch.dtype | str | None = None,
    quant: Quantization = "none",
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer by name; see `resolve_model_name`.

    Args:
        name: which model.
        dtype: of the weights; None takes float32 without a GPU (most CPUs are slow in bf16) and what the checkpoint
            is stored in with one ("auto").
        quant: hold the linear layers in 8 bits (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339) or 4 bits (NF4,
            Dettmers et al. 2023, arXiv:2305.14314), both by bitsandbytes, for training adapters on top of them.
        revision: a branch or tag of a hub model.

    Returns:
        The model, in eval mode on the CPU, and its tokenizer, with a padding token.

    Raises:
        FileNotFoundError, ValueError: as `resolve_model_name`; or the hub or the folder does not hold the model.
    """
    where = resolve_model_name(name)
    if dtype is None:
        dtype = "auto" if torch.cuda.is_available() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, quantization_config=_format(quant), revision=revision
        )
    except OSError as unread:  # transformers' answer to a hub it cannot reach, a wrong id and a missing file alike
        raise ValueError(
            f"The model '{name}' could not be read: {str(unread).splitlines()[0]} Check its name and the network, or "
            "give a local folder."
        ) from unread
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if quant == "4bit" and not torch.cuda.is_available():
        _check_four_bits_on_cpu(model)
    return model, tokenizer


def _check_four_bits_on_cpu(model: PreTrainedModel) -> None:
    """Refuse what the CPU kernel of bitsandbytes would fail at in the middle of a forward pass."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and module.in_features % FOUR_BIT_BLOCK:
            raise ValueError(
                "quant is 4bit, but on a CPU bitsandbytes multiplies 4-bit weights only where a layer's input has "
                f"a multiple of {FOUR_BIT_BLOCK} numbers, and that of {name} has {module.in_features}. Use --quant "
                "8bit, or a GPU."
            )


def _format(quant: Quantization) -> BitsAndBytesConfig | None:
    if quant == "none":
        return None
    if quant == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )


def _model_folder(folder: Path) -> str:
    if not (folder / "config.json").exists():
        raise ValueError(f"The folder {folder} has no config.json, so it holds no model. Give the folder that does.")
    return str(folder)


def default_device() -> str:
    """Where a command computes unless it is told otherwise: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
