"""The one door to text: the built-in domains, a user's own files, and hub datasets all come in here.

    load_documents("prose", "train")             # built in: prose, code, math (see moe_common/text/domains.py)
    load_documents("notes.jsonl", "validation")  # .jsonl, .parquet, .txt, .md, .py, or a folder of these
    load_documents("owner/name:subset", "test")  # a dataset of the Hugging Face hub

Every document is one row with its `text`; where the source has them, `prompt` and `response` or `messages` stay beside
it. `python -m moe_common.text.documents` fetches all that the built-in domains need, once; afterwards no network is
used.
"""

import difflib
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import Dataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from pyarrow import ArrowInvalid
from pyarrow.parquet import ParquetFile

from moe_common.runs.downloads import DownloadError, cache_folder
from moe_common.runs.options import PlainParser
from moe_common.text.domains import DOMAINS, SPLITS, Split, split_of
from moe_common.text.packing import pack_documents

__all__ = ["DOMAINS", "SPLITS", "load_documents", "pack_documents"]

logger = logging.getLogger(__name__)

Part = Literal["pretraining", "train", "validation", "test", "all"]

TABLE_SUFFIXES = (".jsonl", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".py")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<subset>[\w.-]+))?")

# Pairs of columns that are read as a prompt and its response, in order of preference; `messages` comes before them.
PROMPT_COLUMNS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)


def load_documents(source: str | Path, split: Part = "train", *, text_column: str | None = None) -> Dataset:
    """Read the documents of one split of any source.

    A built-in domain has its fixed splits. In a folder whose files are named for splits (`train.jsonl`,
    `validation-00.parquet`, ...) those count; so do the splits of a hub dataset. Everything else is split by the
    SHA-256 of each document's text: 5 % validation, 5 % test, the same for every run and machine, and equal documents
    never fall on two sides. A held-out split that a hub dataset lacks is cut out of its training part in that way.

    A row's text is its `text_column` where one is named, else its column `text`, else its `messages` joined by line
    breaks, else a prompt followed by its response (columns prompt/response, prompt/completion, question/answer or
    instruction/output). A text file in a folder is one document; a text file named by itself is one document for each
    paragraph.

    Args:
        source: `prose`, `code`, `math`; a file or folder; or a hub dataset as `owner/name` or `owner/name:subset`.
        split: `train`, `validation`, `test`, or `all` of them together. The built-in domains also have `pretraining`,
            what the committed base model was trained on; it is part of `all`.
        text_column: column that holds the text, when it is none of the above.

    Returns:
        A dataset with the column `text`, and `prompt` and `response` or `messages` where every document has them.

    Raises:
        ValueError: an unknown name, nothing to read, a line that is not JSON, no column with text, an empty split.
        FileNotFoundError: a path that is not there.
        DownloadError: a built-in domain has not been fetched yet and cannot be.
    """
    if split not in get_args(Part):
        raise ValueError(f"split is '{split}', but must be one of {', '.join(get_args(Part))}.")
    name = str(source)
    if name in DOMAINS:
        rows = [row for part in _parts(split) for row in DOMAINS[name](part)]
    elif Path(name).expanduser().exists():
        rows = _read_path(Path(name).expanduser(), split, text_column)
    elif _looks_like_a_path(name):
        raise FileNotFoundError(f"There is no file or folder {name}. Check the path.")
    elif hub := HUB_NAME.fullmatch(name):
        rows = _read_hub(hub["name"], hub["subset"], split, text_column)
    else:
        close = difflib.get_close_matches(name, DOMAINS, n=2, cutoff=0.5)
        hint = f"Closest: {', '.join(repr(match) for match in close)}. " if close else ""
        raise ValueError(
            f"Unknown dataset '{name}'. {hint}Give one of {', '.join(DOMAINS)}, an existing file or folder, or a hub "
            "dataset as owner/name."
        )
    if not rows:
        raise ValueError(
            f"{name} has no document in its split '{split}'. Give more documents, use split='all', or put files named "
            "train, validation and test into one folder."
        )
    shared = set.intersection(*(set(row) for row in rows))
    columns = [column for column in ("key", "text", "prompt", "response", "messages") if column in shared]
    return Dataset.from_dict({column: [row[column] for row in rows] for column in columns})


def _parts(split: Part) -> tuple[Split, ...]:
    return SPLITS if split == "all" else (split,)


def _looks_like_a_path(name: str) -> bool:
    known = name.endswith(TABLE_SUFFIXES + TEXT_SUFFIXES + (".json", ".csv"))
    return known or name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


def _read_path(path: Path, split: Part, text_column: str | None) -> list[dict[str, Any]]:
    if path.is_file():
        return _of_split(_read_file(path, text_column, by_paragraph=True), split)
    files = files_in(path)
    named = {file: part for file in files if (part := split_named_by(file)) is not None}
    if named:
        files = [file for file, part in named.items() if part in _parts(split)]
        return [row for file in files for row in _read_file(file, text_column, by_paragraph=True)]
    return _of_split((row for file in files for row in _read_file(file, text_column, by_paragraph=False)), split)


def files_in(folder: Path) -> list[Path]:
    """The files of a folder and of those below it that can be read.

    Raises:
        ValueError: there are none.
    """
    suffixes = TABLE_SUFFIXES + TEXT_SUFFIXES
    files = sorted(file for file in folder.rglob("*") if file.suffix in suffixes and file.is_file())
    if not files:
        raise ValueError(f"The folder {folder} holds no file to read. Expected one of {', '.join(suffixes)}.")
    return files


def split_named_by(file: Path) -> Split | None:
    """The split a file is named for: `train.jsonl`, `validation-0001.parquet`, `test_a.txt`; a program never is."""
    first_word = re.split(r"[-_.]", file.stem)[0].lower()
    return first_word if first_word in SPLITS and file.suffix != ".py" else None


def _of_split(rows: Iterator[dict[str, Any]], split: Part) -> list[dict[str, Any]]:
    return [row for row in rows if split == "all" or split_of("own", row["text"]) == split]


def _read_file(path: Path, text_column: str | None, *, by_paragraph: bool) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Give a file with at least one document.")
    if path.suffix in TEXT_SUFFIXES:
        text = _read_text(path)
        pieces = re.split(r"\n\s*\n", text) if by_paragraph and path.suffix != ".py" else [text]
        return ({"text": piece.strip("\n")} for piece in pieces if piece.strip())
    if path.suffix == ".jsonl":
        rows = read_jsonl(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        raise ValueError(
            f"{path} is of a kind that is not read here. Expected one of {', '.join(TABLE_SUFFIXES + TEXT_SUFFIXES)}."
        )
    return (_as_document(row, text_column, where) for where, row in rows)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as wrong:
        raise ValueError(f"{path} is not UTF-8 text (byte {wrong.start}). Convert it to UTF-8.") from wrong


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not empty as a row, behind the words that say where it stands.

    Raises:
        ValueError: the file is not UTF-8, or a line is not a JSON object.
    """
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as wrong:
            raise ValueError(
                f"{where} is not JSON: {wrong.msg} at column {wrong.colno}. Each line must be one JSON object."
            ) from wrong
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{where} holds a JSON {kind}, but each line must be one JSON object.")
        yield where, row


def open_parquet(path: Path) -> ParquetFile:
    """A Parquet file of pyarrow.

    Raises:
        ValueError: it is none.
    """
    try:
        return ParquetFile(path)
    except ArrowInvalid as wrong:
        raise ValueError(f"{path} is not a Parquet file: {wrong}") from wrong


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in open_parquet(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _read_hub(name: str, subset: str | None, split: Part, text_column: str | None) -> list[dict[str, Any]]:
    try:
        there = get_dataset_split_names(name, subset)
        tables = {part: load_dataset(name, subset, split=part) for part in _tables_needed(there, split)}
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as refused:
        said = str(refused).strip().splitlines()[0]
        raise ValueError(
            f"The hub dataset '{name}' could not be read: {said.rstrip('.')}. Check its name and the "
            "network, or give a local file."
        ) from refused
    rows = []
    for part, table in tables.items():
        for number, row in enumerate(table, start=1):
            document = _as_document(row, text_column, f"{name}, {part} row {number}")
            # Splits the dataset lacks are cut out of its training part, and are then no longer part of that.
            own = part
            if part == "train" and (by_text := split_of("own", document["text"])) not in there:
                own = by_text
            if own in _parts(split):
                rows.append(document)
    return rows


def _tables_needed(there: list[str], split: Part) -> list[Split]:
    """Which of a hub dataset's own splits must be read for ours: those asked for, and `train` for one it lacks."""
    asked = _parts(split)
    lacking = [part for part in asked if part not in there]
    return [part for part in SPLITS if part in there and (part in asked or (part == "train" and lacking))]


def _as_document(row: dict[str, Any], text_column: str | None, where: str) -> dict[str, Any]:
    """The row as a document: `text`, and beside it `messages` or `prompt` and `response` where the row has them."""
    document: dict[str, Any] = {}
    if row.get("messages"):
        check_messages(row["messages"], where)
        document["messages"] = row["messages"]
        document["text"] = "\n".join(str(message["content"]) for message in row["messages"])
    for prompt, response in PROMPT_COLUMNS:
        if row.get(prompt) is not None and row.get(response) is not None:
            document |= {"prompt": str(row[prompt]), "response": str(row[response])}
            document.setdefault("text", _joined(document["prompt"], document["response"]))
            break
    wanted = text_column or "text"
    if row.get(wanted) is not None:
        document["text"] = str(row[wanted])
    if "text" not in document or (text_column and row.get(text_column) is None):
        raise ValueError(
            f"{where} has no column '{wanted}'; its columns are {', '.join(map(str, row)) or 'none'}. "
            "Name the one that holds the text with text_column."
        )
    return document


def check_messages(messages: Any, where: str) -> None:
    """Refuse what is no list of messages with a role and a content each.

    Args:
        messages: what a row holds in its column `messages`.
        where: the row, for the error.
    """
    if not isinstance(messages, list):
        raise ValueError(f"{where} holds a {type(messages).__name__} as messages, but must hold a list of them.")
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            held = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
            raise ValueError(
                f"{where}: message {place} holds {held}, but must hold a role and a content. "
                'Write {"role": "user", "content": "..."}.'
            )


def _joined(prompt: str, response: str) -> str:
    return prompt + response if prompt[-1:].isspace() or response[:1].isspace() else f"{prompt}\n{response}"


def main(argv: list[str] | None = None) -> int:
    PlainParser(
        "Fetch the text of the built-in domains into the cache folder.",
        example="DYLO_MOE_CACHE=~/data python -m moe_common.text.documents",
        prog="python -m moe_common.text.documents",
    ).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        for name in DOMAINS:
            counts = {split: len(load_documents(name, split)) for split in SPLITS}
            logger.info("%s: %s documents", name, ", ".join(f"{count} {split}" for split, count in counts.items()))
    except DownloadError as refused:
        print(refused, file=sys.stderr)
        return 1
    print(f"The text of {', '.join(DOMAINS)} is ready; what was fetched lies in {cache_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
