"""What a benchmark ran on: processor, versions, commit, and a fingerprint of the code that was measured."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import peft
import torch

PACKAGES = ("torch", "transformers", "peft")
ROOT = Path(__file__).parents[1]


def machine(device: str) -> dict[str, str]:
    """Names and versions for the head of a report."""
    facts = {
        "processor": _gpu() if device == "cuda" else _cpu(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        facts[package] = _version(package)
    facts["commit"] = _commit()
    return facts


def supports(device: str, dtype: str) -> bool:
    """Whether this machine has the device, and multiplies the number format in hardware."""
    if device == "cuda" and not torch.cuda.is_available():
        return False
    if dtype == "float32":
        return True
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & _cpu_facts().get("flags", set()))


def measured_code() -> str:
    """A fingerprint of the routed layer's modules and of the files here that build and time the ways."""
    lora = Path(peft.__file__).parent / "tuners"
    here = [Path(__file__).with_name(f"{name}.py") for name in ("models", "textbook", "passes", "ways", "measure")]
    digest = hashlib.sha256()
    for path in (*sorted((lora / "lora").glob("moe_*.py")), *sorted((lora / "moe_lora").glob("*.py")), *here):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # used from a source tree
        return __import__(package).__version__


def _gpu() -> str:
    return torch.cuda.get_device_name()


def _cpu() -> str:
    facts = _cpu_facts()
    amx = ", AMX" if "amx_bf16" in facts.get("flags", ()) else ""
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads on {os.cpu_count()} cores{amx}"


def _cpu_facts() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return {}
    facts: dict = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault({"Features": "flags"}.get(name.strip(), name.strip()), value.strip())
    return facts | {"flags": set(facts.get("flags", "").split())}


def _commit() -> str:
    """Short hash of the checkout, marked where files differ from it; "unknown" outside git."""
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return shown.stdout.strip() or "unknown"
