"""The text of a study: one source a domain, cut into rows of tokens.

    DatasetLoader(tokenizer).rows({"prose": "prose", "code": "humaneval", "notes": "notes.jsonl"})

A source is a built-in domain (`prose`, `code`, `math`), a file or folder, a hub dataset by a name of `HUB_TEXTS`, or
any as `owner/name:subset`. What cannot be had is an error; nothing ever stands in for it.

Shape letters: N rows, S tokens of a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from torch import Tensor

from moe_common.text.documents import Part, load_documents
from moe_common.text.packing import token_stream


@dataclass(frozen=True)
class HubText:
    """Where a well-known data set lies on the hub: its name, subset and split, and the columns that make a text."""

    name: str
    subset: str | None
    split: str
    columns: tuple[str, ...]


HUB_TEXTS = {
    "fineweb": HubText("HuggingFaceFW/fineweb", "sample-10BT", "train", ("text",)),
    "gsm8k": HubText("openai/gsm8k", "main", "test", ("question", "answer")),
    "math500": HubText("HuggingFaceH4/MATH-500", None, "test", ("problem", "solution")),
    "aqua_rat": HubText("deepmind/aqua_rat", "raw", "test", ("question", "rationale")),
    "humaneval": HubText("openai/openai_humaneval", None, "test", ("prompt", "canonical_solution")),
    "codeparrot": HubText("codeparrot/codeparrot-clean-valid", None, "train", ("content",)),
}


@dataclass(frozen=True)
class TokenRows:
    """The tokens of a domain.

    Args:
        ids_NS: int64.
        mask_NS: true for tokens, false for padding.
    """

    ids_NS: Tensor
    mask_NS: Tensor

    def __len__(self) -> int:
        return len(self.ids_NS)

    @property
    def num_tokens(self) -> int:
        return int(self.mask_NS.sum())


class DatasetLoader:
    """Reads domains of text.

    Args:
        tokenizer: of the model that will read the text.
        split: split of built-in domains, files and hub datasets given as `owner/name`.
        max_tokens: tokens of each domain; a domain that has fewer is refused, so that all weigh the same.
        row_tokens: tokens of a row (S).
        seed: of the order of the documents; a stream of the hub is read from its beginning.
    """

    def __init__(
        self, tokenizer=None, *, split: Part = "test", max_tokens: int = 32768, row_tokens: int = 512, seed: int = 0
    ) -> None:
        if row_tokens < 2:
            raise ValueError(f"row_tokens is {row_tokens}, but a row must hold at least 2 tokens.")
        if max_tokens < row_tokens:
            raise ValueError(f"max_tokens is {max_tokens}, but must hold at least one row of {row_tokens} tokens.")
        self.tokenizer, self.split, self.seed = tokenizer, split, seed
        self.max_tokens, self.row_tokens = max_tokens, row_tokens

    def load(self, source: str) -> Iterator[str]:
        """The documents of a source, one after another.

        Raises:
            ValueError, FileNotFoundError, DownloadError: it is unknown, empty or cannot be had.
        """
        if source in HUB_TEXTS:
            return _stream(source, HUB_TEXTS[source])
        texts = list(load_documents(source, self.split)["text"])
        Random(self.seed).shuffle(texts)
        return iter(texts)

    def load_prose_data(self, source: str = "prose") -> Iterator[str]:
        """Web text or an encyclopedia: `prose` (built in), `fineweb`, or any other source."""
        return self.load(source)

    def load_math_qa_data(self, source: str = "math") -> Iterator[str]:
        """Questions with worked answers: `math` (built in), `gsm8k`, `math500`, `aqua_rat`, or any other source."""
        return self.load(source)

    def load_code_data(self, source: str = "code") -> Iterator[str]:
        """Programs: `code` (built in), `humaneval`, `codeparrot`, or any other source."""
        return self.load(source)

    def rows(self, sources: Mapping[str, str]) -> dict[str, TokenRows]:
        """The rows of each domain, an end-of-text token after every document, no padding.

        Args:
            sources: name of a domain -> its source.

        Raises:
            ValueError: a text shorter than max_tokens; all that `load` raises.
        """
        return {domain: self._rows_of(domain, source) for domain, source in sources.items()}

    def _rows_of(self, domain: str, source: str) -> TokenRows:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-text token to separate documents with. Set its eos_token.")
        num_rows = self.max_tokens // self.row_tokens
        needed = num_rows * self.row_tokens
        stream = token_stream(self.load(source), self.tokenizer, enough=needed)
        if len(stream) < needed:
            named = source if source == domain else f"{domain} ({source})"
            raise ValueError(
                f"The text of {named} has {len(stream)} tokens, but {needed} are needed. Give more text, lower "
                "max_tokens, or take another split."
            )
        ids_NS = torch.from_numpy(stream[:needed]).view(num_rows, self.row_tokens)
        return TokenRows(ids_NS, torch.ones_like(ids_NS, dtype=torch.bool))


def parse_sources(data: str) -> dict[str, str]:
    """`prose=notes.jsonl,code` as a source for each domain; one that is not named so is named as its source.

    Raises:
        ValueError: nothing is given, a part is empty, or a domain is named twice.
    """
    sources: dict[str, str] = {}
    for part in data.split(","):
        domain, _, source = part.strip().partition("=")
        if not domain or (("=" in part) and not source):
            raise ValueError(
                f"'{data}' is no list of domains. Write domain=source,..., as in prose=prose,code=humaneval."
            )
        if domain in sources:
            raise ValueError(f"The domain {domain} is named twice in '{data}'.")
        sources[domain] = source or domain
    return sources


def _stream(source: str, where: HubText) -> Iterator[str]:
    try:
        rows = load_dataset(where.name, where.subset, split=where.split, streaming=True)
        for row in rows:
            yield "\n".join(str(row[column]) for column in where.columns)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as refused:
        said = str(refused).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"The hub dataset '{where.name}' ({source}) could not be read: {said}. Check the network, or give a "
            "built-in domain or a local file."
        ) from refused
