"""What `quantize` can make of a model, by name.

int8 int4 int3 int2 ...   rounded by group (moe_ext.moqe.experts.group_quant), any number of bits from 2 to 8
int2@math, int3@prose+code    the same by GPTQ, calibrated on the training split of these sources
nf4, bnb8                 bitsandbytes: NF4 and LLM.int8
f16, q8_0, q5_0, q4_1, q4_0   a GGUF file, written by the package gguf
full                      the model as it is
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_common.runs.options import split_names

Kind = Literal["group", "bitsandbytes", "gguf", "full"]

BITSANDBYTES = ("nf4", "bnb8")
GGUF_TYPES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
GROUP = re.compile(r"int(?P<bits>[2-8])(@(?P<sources>.+))?")


@dataclass(frozen=True)
class Scheme:
    """One expert to make.

    Args:
        name: as the user wrote it.
        kind: by which tool.
        bits: of a code; kind `group`.
        sources: calibration text; empty for rounding to nearest.
    """

    name: str
    kind: Kind
    bits: int = 0
    sources: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """Of its folder or GGUF file."""
        if self.sources:
            words = "+".join(Path(source).stem for source in self.sources)
            return f"int{self.bits}-{re.sub(r'[^A-Za-z0-9+_.]', '_', words)}"
        return f"{self.name}.gguf" if self.kind == "gguf" else self.name


def parse_schemes(text: str) -> list[Scheme]:
    """Schemes from their names, separated by commas.

    Raises:
        ValueError: an unknown name, one twice, or none.
    """
    schemes = [_parse(name) for name in split_names(text)]
    if not schemes:
        raise ValueError(f"No scheme was named. Give {_known()}.")
    names = [scheme.file_name for scheme in schemes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"The scheme {twice} is named twice. Name each once.")
    return schemes


def is_scheme(name: str) -> bool:
    """Whether a name is one of a scheme."""
    return name in (*BITSANDBYTES, *GGUF_TYPES, "full") or GROUP.fullmatch(name) is not None


def _parse(name: str) -> Scheme:
    if name in BITSANDBYTES:
        return Scheme(name, "bitsandbytes")
    if name in GGUF_TYPES:
        return Scheme(name, "gguf")
    if name == "full":
        return Scheme(name, "full")
    if group := GROUP.fullmatch(name):
        sources = tuple(filter(None, (group["sources"] or "").split("+")))
        return Scheme(name, "group", int(group["bits"]), sources)
    raise ValueError(f"Unknown scheme '{name}'. Give {_known()}.")


def _known() -> str:
    return f"int2 to int8 (int2@SOURCE to calibrate), {', '.join((*BITSANDBYTES, *GGUF_TYPES))} or full"
