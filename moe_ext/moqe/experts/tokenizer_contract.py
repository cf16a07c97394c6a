"""Whether two experts read and write the same tokens; a mixture of others would mix logits of different words."""

from transformers import PreTrainedTokenizerBase

# Numbers, spaces, line ends, code, scripts beyond Latin, an emoji: where tokenizers of one vocabulary differ.
PROBES = (
    "The river runs 1234 km, then 56.7 more.",
    "  two  spaces\tand a tab\n\n\nthree line ends ",
    "def f(x_1):\n    return {'a': x_1 ** 2}  # done",
    "Ärger, naïve, Ελλάδα, Москва, 東京, العربية",
    "don't they'll I'M \U0001f600 #### 42",
)
SPECIAL = ("bos_token", "eos_token", "unk_token")


def check_tokenizers(first: tuple[str, PreTrainedTokenizerBase], other: tuple[str, PreTrainedTokenizerBase]) -> None:
    """Compare vocabularies, special tokens and how probe texts are cut.

    A padding token may differ: it is never predicted and never read.

    Args:
        first, other: name and tokenizer of an expert.

    Raises:
        ValueError: they differ; names both experts and the first token that does.
    """
    (name, tokenizer), (other_name, other_tokenizer) = first, other
    if difference := _difference(tokenizer, other_tokenizer):
        raise ValueError(
            f"The tokenizers of {name} and {other_name} differ: {difference}. Experts of one mixture must be versions "
            "of one model, or models with the same tokenizer."
        )


def _difference(one: PreTrainedTokenizerBase, two: PreTrainedTokenizerBase) -> str | None:
    here, there = one.get_vocab(), two.get_vocab()
    padding = {one.pad_token, two.pad_token}
    by_id = {place: token for token, place in there.items()}
    for token, place in sorted(here.items(), key=lambda item: item[1]):
        if there.get(token) != place and token not in padding:
            return f"token {place} is {token!r} in the first and {by_id.get(place)!r} in the second"
    for token, place in sorted(there.items(), key=lambda item: item[1]):
        if token not in here and token not in padding:
            return f"token {place} is {token!r} in the second and not in the first"
    for kind in SPECIAL:
        if getattr(one, kind) != getattr(two, kind):
            return f"their {kind} is {getattr(one, kind)!r} and {getattr(two, kind)!r}"
    for probe in PROBES:
        cut, other_cut = (tokenizer(probe, add_special_tokens=False)["input_ids"] for tokenizer in (one, two))
        if cut != other_cut:
            place = next((i for i, pair in enumerate(zip(cut, other_cut, strict=False)) if pair[0] != pair[1]), None)
            if place is None:
                return f"they cut {probe!r} into {len(cut)} and {len(other_cut)} tokens"
            ours, theirs = (t.convert_ids_to_tokens(c[place]) for t, c in ((one, cut), (two, other_cut)))
            return f"token {place} of {probe!r} is {ours!r} in the first and {theirs!r} in the second"
    return None
