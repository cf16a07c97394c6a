"""Tells base models apart, so that a mixture is never put on a base that it was not trained for."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

NUM_SAMPLES = 32
# bfloat16 keeps 8 bits of a number: a base that was rounded to it, or from it, is still the same base.
RELATIVE_TOLERANCE = 2**-7


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """What is remembered of a base model.

    Args:
        name: how it was named: `base`, a folder, a hub model; empty for a model that came without a name.
        model_type: its architecture, as its config says.
        hidden_size, num_layers, vocab_size: its measures.
        samples: some entries of its input embedding, evenly spread; empty where the embedding is quantised.
    """

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    samples: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> "BaseIdentity":
        """Look at a causal language model of transformers; `name` by default the model's own."""
        text = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight.detach()
        samples = ()
        if embedding.is_floating_point():
            flat = embedding.flatten()
            where = torch.linspace(0, flat.numel() - 1, NUM_SAMPLES, dtype=torch.float64).long()
            samples = tuple(flat[where.to(flat.device)].float().tolist())
        return cls(
            name=str(name if name is not None else getattr(model, "name_or_path", "") or ""),
            model_type=model.config.model_type,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            vocab_size=text.vocab_size,
            samples=samples,
        )

    def to_dict(self) -> dict:
        return {**asdict(self), "samples": list(self.samples)}

    @classmethod
    def from_dict(cls, held: dict) -> "BaseIdentity":
        return cls(**{**held, "samples": tuple(held["samples"])})

    def check_is(self, other: "BaseIdentity") -> None:
        """Compare with the base that is there now; names may differ, since folders move.

        Raises:
            ValueError: it is another base; says which was expected and which was found, and in what they differ.
        """
        differs = [
            f"{field} {getattr(self, field)} against {getattr(other, field)}"
            for field in ("model_type", "hidden_size", "num_layers", "vocab_size")
            if getattr(self, field) != getattr(other, field)
        ]
        if not differs and self.samples and other.samples and not self._has_the_weights_of(other):
            differs = ["its weights"]
        if differs:
            raise ValueError(
                f"This mixture was trained for the base '{self.name or 'without a name'}', but the base found is "
                f"'{other.name or 'without a name'}': they differ in {', '.join(differs)}. Load it onto the base it "
                "was trained for."
            )

    def _has_the_weights_of(self, other: "BaseIdentity") -> bool:
        here, there = torch.tensor(self.samples), torch.tensor(other.samples)
        largest = here.abs().max().item()
        return torch.allclose(here, there, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE * 1e-2 * largest)
