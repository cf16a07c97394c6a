"""Tells the files of experts apart, without reading all of them: a router is worth nothing beside other experts."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class ExpertIdentity:
    """An expert's files.

    Args:
        name: last part of its path.
        path: where it lay.
        num_bytes: of its weight files.
        digest: of 64 evenly spread pieces of each weight file.
    """

    name: str
    path: str
    num_bytes: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "ExpertIdentity":
        """Look at a folder or file.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: a folder without weights.
        """
        if not path.exists():
            raise FileNotFoundError(f"There is no expert {path}. Check the path.")
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in WEIGHT_SUFFIXES)
        if not files:
            raise ValueError(
                f"The folder {path} holds no weights. Expected a file that ends in {', '.join(WEIGHT_SUFFIXES)}."
            )
        digest, num_bytes = hashlib.sha256(), 0
        for file in files:
            size = file.stat().st_size
            num_bytes += size
            digest.update(size.to_bytes(8, "little"))
            with file.open("rb") as stream:
                for sample in range(NUM_SAMPLES):
                    stream.seek(max(0, (size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1)))
                    digest.update(stream.read(SAMPLE_BYTES))
        return cls(path.stem if path.is_file() else path.name, str(path), num_bytes, digest.hexdigest()[:16])

    def to_dict(self) -> dict:
        return asdict(self)


def check_same_experts(noted: list[dict], found: list[ExpertIdentity], where: Path | str) -> None:
    """Compare the experts that a router was trained for with those at hand; folders may have moved.

    Args:
        noted: of the router's folder, as `to_dict` gave them.
        found: those at hand, in order.
        where: the router's folder, for the error.

    Raises:
        ValueError: others, fewer, more, or in another order.
    """
    if [expert["digest"] for expert in noted] == [expert.digest for expert in found]:
        return
    names = ", ".join(expert["name"] for expert in noted)
    given = ", ".join(expert.name for expert in found)
    raise ValueError(
        f"{where} was trained for the experts {names} and not for {given}: their number, order or weights differ. "
        "Give the same experts in the same order, or another --save_dir."
    )
