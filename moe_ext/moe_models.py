"""Find a mixture-of-experts model by name: the committed small one, a local folder, or a hub model.

model, tokenizer = load_moe()                            # the small OLMoE-type model of this package, no network
model, tokenizer = load_moe("allenai/OLMoE-1B-7B-0924")  # anything transformers can load that has experts
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_common.models.base_model import load_base_model
from moe_ext.routers import moe_layers

SMALL_MOE = "small-moe"
SMALL_MOE_FOLDER = Path(__file__).parent / "small_moe"
MODEL_HELP = "Mixture: small-moe, a local folder, or a hub model as owner/name."


def load_moe(
    name: str | Path = SMALL_MOE, *, dtype: torch.dtype | str | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a mixture and its tokenizer by name.

    Args:
        name: `small-moe`, a local folder, or a hub model as `owner/name`.
        dtype: of the weights; None takes float32 without a GPU and what the checkpoint is stored in with one.
        revision: a branch or tag of a hub model.

    Returns:
        The model, in eval mode on the CPU, and its tokenizer, with a padding token.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: an unknown name, a model that cannot be read, or one without experts.
    """
    where = SMALL_MOE_FOLDER if str(name) == SMALL_MOE else name
    model, tokenizer = load_base_model(where, dtype=dtype, revision=revision)
    moe_layers(model)  # refuses what is no mixture
    return model, tokenizer


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read at once; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
