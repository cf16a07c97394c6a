"""The backbone's own continuations, to train a draft on what it is a draft of.

A lossless draft is accepted where it says what the backbone says next, right or wrong. Text that the backbone wrote
itself, greedily, shows just that.

Shape letters: B prompts, L tokens of the longest.
"""

from collections.abc import Iterator, Sequence

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_ext.multi_token.training.data import continued_row

BATCH = 128  # prompts continued at once


def continue_prompts(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    num_tokens: int,
) -> Dataset:
    """Rows of prompts and what the backbone says next, of which only the latter is learnt.

    Args:
        backbone: continues greedily.
        tokenizer: its own.
        prompts: tokens of each.
        num_tokens: most new tokens of each.
    """
    # Alike in length, so that little is padded; a row is a row wherever it stands.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    rows: list[dict | None] = [None] * len(prompts)
    where = backbone.get_input_embeddings().weight.device
    for places in _batches(order, desc="continuing prompts"):
        batch = tokenizer.pad(
            {"input_ids": [prompts[place] for place in places]}, padding_side="left", return_tensors="pt"
        ).to(where)
        written_BL = backbone.generate(**batch, max_new_tokens=num_tokens, do_sample=False)
        for place, new in zip(places, written_BL[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            rows[place] = continued_row(prompts[place], _until_end(new, backbone.generation_config.eos_token_id))
    return Dataset.from_list(rows)


def _until_end(tokens: list[int], ends: int | list[int] | None) -> list[int]:
    """The tokens up to the first that ends a text, that one included."""
    known = {ends} if isinstance(ends, int) else set(ends or ())
    first = next((place for place, token in enumerate(tokens) if token in known), len(tokens))
    return tokens[: first + 1]


def _batches(order: list[int], *, desc: str) -> Iterator[list[int]]:
    for start in tqdm(range(0, len(order), BATCH), desc=desc, unit="batch"):
        yield order[start : start + BATCH]
