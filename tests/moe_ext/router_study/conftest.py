"""A tiny mixture on disk with the committed tokenizer, revisions of it, and three small sources of text."""

import pytest
import tiny_models
import torch
from tiny_models import MOE_KINDS

WORDS = ["the", "of", "and", "a", "in", "to", "was", "is", "for", "on", "by", "with", "from", "at", "it", "as", "are"]


@pytest.fixture(params=MOE_KINDS)
def family(request):
    return request.param


def spread_gates(model):
    for layer in model.model.layers:
        layer.mlp.gate.weight.mul_(20)  # small random rows would send every token the same way


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("study") / "tiny_moe", "olmoe", change=spread_gates)


@pytest.fixture(scope="session")
def revisions_folder(tmp_path_factory):
    """A folder with the revisions step5-tokens1K, step40-tokens8K and main; step40 is main."""
    folder = tmp_path_factory.mktemp("revisions")
    for name, seed in (("step40-tokens8K", 0), ("step5-tokens1K", 1), ("main", 0)):
        tiny_models.tiny_folder(folder / name, "olmoe", seed=seed, change=spread_gates)
    return folder


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """`--data` of three small files, by name of the domain."""
    folder, parts = tmp_path_factory.mktemp("text"), []
    for number, name in enumerate(("letters", "numbers", "words")):
        generator = torch.Generator().manual_seed(number)
        lines = []
        for _ in range(60):
            drawn = torch.randint(len(WORDS), (30,), generator=generator).tolist()
            if name == "numbers":
                lines.append(" ".join(str(37 * word) for word in drawn))
            elif name == "letters":
                lines.append(" ".join("abcdefghijklmnopq"[word] for word in drawn))
            else:
                lines.append(" ".join(WORDS[word] for word in drawn))
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
        parts.append(f"{name}={folder / name}.txt")
    return ",".join(parts)
