"""The text of a run: built-in domains and hub datasets through `moe_common.text.documents`, and a user's own files.

In a user's files a sample that cannot be read (a line that is not JSON, no text in it, an empty one) is counted and
left out. A file that cannot be read at all is an error.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_common.runs.options import split_names
from moe_common.text.documents import (
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Part,
    files_in,
    load_documents,
    open_parquet,
    split_named_by,
)
from moe_common.text.domains import split_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """What was read.

    Args:
        texts: of each source.
        unreadable: samples that were left out.
    """

    texts: dict[str, list[str]]
    unreadable: int


def read_documents(sources: str, split: Part, *, text_column: str = "text") -> Documents:
    """The documents of one split.

    A folder is split as in `moe_common.text.documents`: by files that are named train, validation and test, or else by
    each document's text.

    Args:
        sources: folders, files, built-in domains or hub datasets, separated by commas.
        split: `train`, `validation`, `test` or `all`.
        text_column: of the user's own Parquet and JSONL files.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: nothing to read, a Parquet file without the column, no document in the split.
    """
    texts, unreadable = {}, 0
    for source in split_names(sources):
        path = Path(source).expanduser()
        if not path.exists():
            texts[source] = list(load_documents(source, split)["text"])
            continue
        files = [path] if path.is_file() else files_in(path)
        named = {file: name for file in files if (name := split_named_by(file))}
        asked = [file for file, name in named.items() if split in ("all", name)] if named else files
        held: list[str] = []
        for file in asked:
            samples = list(_samples_of(file, text_column))
            read = [sample for sample in samples if sample is not None]
            unreadable += len(samples) - len(read)
            own = named.get(file)
            held += [text for text in read if split in ("all", own or split_of("own", text))]
        if not held:
            raise ValueError(
                f"{source} has no readable document in its split '{split}' ({unreadable} samples cannot be read). "
                "Give more documents, or put files named train, validation and test into one folder."
            )
        texts[source] = held
    if not texts:
        raise ValueError("No text was named. Give a folder, a file or a built-in domain with --data_dir.")
    if unreadable:
        logger.warning("%d samples could not be read and are left out", unreadable)
    return Documents(texts, unreadable)


def _samples_of(file: Path, text_column: str) -> Iterator[str | None]:
    """The text of each sample, None where there is none."""
    if file.suffix == ".parquet":
        yield from _parquet_samples(file, text_column)
    elif file.suffix == ".jsonl":
        for line in file.read_bytes().split(b"\n"):
            if line.strip():
                yield _text_of_line(line, text_column)
    elif file.suffix in TEXT_SUFFIXES:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = ""
        yield text.strip("\n") or None
    else:
        expected = ", ".join((*TABLE_SUFFIXES, *TEXT_SUFFIXES))
        raise ValueError(f"{file} is of a kind that is not read here. Expected one of {expected}.")


def _parquet_samples(file: Path, text_column: str) -> Iterator[str | None]:
    table = open_parquet(file)
    columns = table.schema_arrow.names
    if text_column not in columns:
        raise ValueError(
            f"{file} has no column '{text_column}'; its columns are {', '.join(columns) or 'none'}. Name the one that "
            "holds the text with --text_column."
        )
    for batch in table.iter_batches(columns=[text_column]):
        for value in batch.column(0).to_pylist():
            yield _as_text(value)


def _text_of_line(line: bytes, text_column: str) -> str | None:
    try:
        row = json.loads(line)
    except ValueError:  # not UTF-8, or not JSON
        return None
    return _as_text(row.get(text_column)) if isinstance(row, dict) else None


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
