"""The skills a mixture has met: one embedding each, from the hidden states of the base model without its experts.

A text's embedding is the mean of the base's last hidden state over its real tokens; a skill's is the mean over its
blocks. Such means share much of their length whatever the text says: some dimensions are large for any input at all.
So before two are compared by their cosine, each dimension is shifted and scaled by what the base makes of random
tokens, which needs no text: its mean and standard deviation there, the library's background.

Shape letters: S skills, N blocks, L tokens, H hidden size.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_common.runs.whole_files import whole_file, write_json

LIST, TENSORS = "skills.json", "skills.safetensors"
FORMAT = 1
BACKGROUND_BLOCKS, BACKGROUND_LENGTH = 16, 128  # random blocks, and tokens in each


@dataclass(kw_only=True)
class Skill:
    """What is known of a skill besides its embedding.

    Args:
        name: how it is called.
        num_blocks: blocks of text that its embedding is the mean of.
        expert: the expert that learnt it.
        threshold: similarity below which a text is none of it; see `NoveltyDetector`. None before it was calibrated.
    """

    name: str
    num_blocks: int
    expert: str | None = None
    threshold: float | None = None


class SkillLibrary:
    """Skills by name, in the order they were met.

    Args:
        background_2H: mean and standard deviation of the base's last hidden state on random tokens
            (`measure_background`); without it, embeddings are compared as they are.
    """

    def __init__(self, background_2H: Tensor | None = None) -> None:
        self.background_2H = None if background_2H is None else background_2H.float().cpu()
        self._skills: dict[str, Skill] = {}
        self._embeddings: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._skills)

    def __contains__(self, name: str) -> bool:
        return name in self._skills

    def __iter__(self) -> Iterator[Skill]:
        return iter(self._skills.values())

    def __getitem__(self, name: str) -> Skill:
        if name not in self._skills:
            raise ValueError(f"There is no skill '{name}'. The library holds {', '.join(self._skills) or 'none'}.")
        return self._skills[name]

    @property
    def names(self) -> list[str]:
        return list(self._skills)

    def embedding(self, name: str) -> Tensor:
        """The mean over the skill's blocks, [H]."""
        return self._embeddings[self[name].name]

    def add(self, name: str, blocks_NH: Tensor, *, expert: str | None = None) -> Skill:
        """Take up a skill.

        Args:
            name: a name of its own.
            blocks_NH: embeddings of blocks of its text (`embed_blocks`).
            expert: the expert that learns it.

        Raises:
            ValueError: the name is empty or taken, there is no block, or the width is not that of the others.
        """
        if not name or name in self._skills:
            raise ValueError(
                f"A skill cannot be named '{name}': the name is empty or taken. The library holds "
                f"{', '.join(self._skills) or 'none'}; update() adds to a skill."
            )
        self._check_blocks(blocks_NH)
        self._embeddings[name] = blocks_NH.float().mean(dim=0).cpu()
        self._skills[name] = Skill(name=name, num_blocks=len(blocks_NH), expert=expert)
        return self._skills[name]

    def update(self, name: str, blocks_NH: Tensor) -> Skill:
        """Move a skill's embedding to the mean over its earlier blocks and these."""
        skill = self[name]
        self._check_blocks(blocks_NH)
        total = skill.num_blocks + len(blocks_NH)
        added_H = blocks_NH.float().mean(dim=0).cpu()
        self._embeddings[name] += (added_H - self._embeddings[name]) * (len(blocks_NH) / total)
        skill.num_blocks = total
        return skill

    def remove(self, name: str) -> None:
        """Forget a skill; its expert is not touched."""
        self[name]
        del self._skills[name], self._embeddings[name]

    def similarity(self, name: str, embedding_H: Tensor) -> float:
        """Cosine of the angle between a text's embedding and a skill's, both seen against the background."""
        pair_2H = torch.stack([self.embedding(name), embedding_H.float().cpu()])
        if self.background_2H is not None:
            mean_H, deviation_H = self.background_2H
            pair_2H = (pair_2H - mean_H) / deviation_H.clamp(min=1e-6)
        return torch.nn.functional.cosine_similarity(pair_2H[0], pair_2H[1], dim=0).item()

    def similarities(self, embedding_H: Tensor) -> dict[str, float]:
        """Each skill's similarity to a text, the most similar first."""
        measured = {name: self.similarity(name, embedding_H) for name in self._skills}
        return dict(sorted(measured.items(), key=lambda item: -item[1]))

    def save(self, folder: str | Path) -> None:
        """Write `skills.json` and `skills.safetensors`, each whole or not at all; an empty library leaves no files."""
        folder = Path(folder)
        if not self._skills and self.background_2H is None:
            for file in (LIST, TENSORS):
                (folder / file).unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"embedding.{i}": self._embeddings[name].contiguous() for i, name in enumerate(self._skills)}
        if self.background_2H is not None:
            tensors["background"] = self.background_2H.contiguous()
        with whole_file(folder / TENSORS) as partial:
            save_file(tensors, partial)
        write_json(folder / LIST, {"format": FORMAT, "skills": [asdict(skill) for skill in self]})

    @classmethod
    def load(cls, folder: str | Path) -> "SkillLibrary":
        """Read what `save` wrote; an empty library where there is none.

        Raises:
            ValueError: one of the two files is missing, damaged, or does not belong to the other.
        """
        folder = Path(folder)
        held = [file for file in (LIST, TENSORS) if (folder / file).is_file()]
        if not held:
            return cls()
        if len(held) == 1:
            missing = LIST if held == [TENSORS] else TENSORS
            raise ValueError(f"{folder} holds {held[0]} but no {missing}. The two belong together: save them again.")
        try:
            listed = json.loads((folder / LIST).read_text(encoding="utf-8"))
            skills = [Skill(**entry) for entry in listed["skills"]]
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as wrong:
            raise ValueError(f"{folder / LIST} is damaged ({wrong}). Save the library again.") from wrong
        if listed.get("format") != FORMAT:
            raise ValueError(
                f"{folder / LIST} has format {listed.get('format')}, but this version reads format {FORMAT}."
            )
        try:
            with safe_open(folder / TENSORS, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as wrong:
            raise ValueError(f"{folder / TENSORS} is damaged ({wrong}). Save the library again.") from wrong
        library = cls(tensors.pop("background", None))
        expected = {f"embedding.{i}" for i in range(len(skills))}
        if set(tensors) != expected:
            raise ValueError(
                f"{folder / LIST} lists {len(skills)} skills, but {TENSORS} holds {len(tensors)} embeddings. The two "
                "belong together: save them again."
            )
        for i, skill in enumerate(skills):
            library._check_blocks(tensors[f"embedding.{i}"][None])
            library._skills[skill.name] = skill
            library._embeddings[skill.name] = tensors[f"embedding.{i}"]
        return library

    def _check_blocks(self, blocks_NH: Tensor) -> None:
        if blocks_NH.dim() != 2 or len(blocks_NH) == 0:
            raise ValueError(
                f"Embeddings of blocks must be [blocks, hidden size] with at least one block, got "
                f"{list(blocks_NH.shape)}."
            )
        others = [*self._embeddings.values(), *([] if self.background_2H is None else self.background_2H)]
        if others and others[0].shape[-1] != blocks_NH.shape[-1]:
            raise ValueError(
                f"The embeddings are {blocks_NH.shape[-1]} wide, but the library's are {others[0].shape[-1]}. Embed "
                "with the base the library was made with."
            )


@torch.no_grad()
def embed_blocks(model, blocks: Dataset, *, batch_size: int = 8) -> Tensor:
    """The mean of the base's last hidden state over the real tokens of each block, [N, H], float32 on the CPU.

    Args:
        model: a causal language model of transformers; adapters, if it has any, are left out.
        blocks: rows of `input_ids` and `attention_mask` of equal length.
        batch_size: blocks at once.

    Raises:
        ValueError: there is no block, or one without a real token.
    """
    if len(blocks) == 0:
        raise ValueError("There is no block to embed. Give longer text.")
    means = []
    with _backbone(model) as backbone:
        device = next(backbone.parameters()).device
        for batch in blocks.with_format("torch").iter(batch_size=batch_size):
            mask_NL = batch["attention_mask"].to(device)
            if not mask_NL.any(dim=1).all():
                raise ValueError("A block holds nothing but padding, so it has no embedding. Drop it.")
            states_NLH = backbone(input_ids=batch["input_ids"].to(device), attention_mask=mask_NL).last_hidden_state
            weights_NL = mask_NL.float() / mask_NL.sum(dim=1, keepdim=True)
            # where, not a product: what a model computes for padding may be infinite
            states_NLH = torch.where(mask_NL[..., None].bool(), states_NLH.float(), 0.0)
            means.append(torch.einsum("nlh,nl->nh", states_NLH, weights_NL).cpu())
    return torch.cat(means)


@torch.no_grad()
def measure_background(model, *, seed: int = 0) -> Tensor:
    """Mean and standard deviation over tokens of the base's last hidden state on random tokens, [2, H].

    Args:
        model: as in `embed_blocks`.
        seed: of the random tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids_NL = torch.randint(vocabulary, (BACKGROUND_BLOCKS, BACKGROUND_LENGTH), generator=generator)
    with _backbone(model) as backbone:
        device = next(backbone.parameters()).device
        states = [backbone(input_ids=rows.to(device)).last_hidden_state for rows in ids_NL.split(8)]
    tokens_TH = torch.cat(states).float().flatten(0, 1).cpu()
    return torch.stack([tokens_TH.mean(dim=0), tokens_TH.std(dim=0)])


@contextmanager
def _backbone(model) -> Iterator[nn.Module]:
    """The base's stack of blocks, in eval mode and with adapters disabled until left."""
    was_training, adapted = model.training, hasattr(model, "disable_adapter")
    model.eval()
    try:
        with model.disable_adapter() if adapted else nullcontext():
            yield (model.get_base_model() if adapted else model).get_decoder()
    finally:
        model.train(was_training)
