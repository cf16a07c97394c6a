"""`memory`: what one expert takes on disk, as tensors, and of this process."""

import ctypes
import gc
from pathlib import Path

import psutil

from moe_ext.moqe.experts.expert import load_expert, resolve_expert
from moe_ext.moqe.experts.identity import ExpertIdentity
from moe_ext.moqe.options import MemoryOptions

MIB = 2**20


def memory(options: MemoryOptions) -> str:
    """Load an expert alone and say what it takes.

    Raises:
        ValueError, FileNotFoundError: as `load_expert`.
    """
    place = resolve_expert(options.expert)
    stored = ExpertIdentity.of(place).num_bytes
    before = _resident()
    expert = load_expert(place, dtype=options.dtype, gguf_backend=options.gguf_backend)
    after = _resident()
    return (
        f"{expert.name} ({expert.kind}): {stored / MIB:.2f} MiB of weight files, "
        f"{expert.memory_bytes() / MIB:.2f} MiB of tensors, resident memory grew by {(after - before) / MIB:.1f} MiB "
        f"(libraries that loading imports included): {Path(place)}"
    )


def _resident() -> int:
    """Bytes of this process that lie in memory, after freed ones were given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss
