"""Text to train on: question/response pairs of a JSONL file, or plain text by way of `moe_common`.

A pair becomes one row, the question put as the tokenizer's chat template puts it; plain text is packed into rows of
one length, an end-of-text token after each document. Every token of a row is learnt from, the question's too.

A twentieth of a file is held out for the bench, chosen by the SHA-256 of its text as `moe_common.text.documents` does.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from moe_common.runs.options import split_names
from moe_common.text.documents import Part, load_documents, read_jsonl
from moe_common.text.domains import split_of
from moe_common.text.instructions import render, with_chat_template
from moe_common.text.packing import IGNORED_LABEL, pack_documents

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A question and the response to it."""

    question: str
    response: str


@dataclass(frozen=True)
class Task:
    """Tokens of a question and of its right answer, the end included."""

    prompt: list[int]
    reference: list[int]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What `--data` named, read for one split.

    Args:
        pairs: of JSONL files of questions and responses.
        texts: of everything else.
    """

    pairs: list[Pair]
    texts: list[str]


def read_source(names: str, split: Part = "train") -> Source:
    """Read everything that `--data` names.

    Args:
        names: separated by commas: JSONL files of `{"question": ..., "response": ...}`, and whatever
            `moe_common.text.documents.load_documents` takes (text files, folders, built-in domains, hub datasets).
        split: which part of it.

    Raises:
        ValueError: a line without a question or response, an empty one, no text at all; it names the line.
        FileNotFoundError: a file that is not there.
    """
    pairs, texts = [], []
    for name in split_names(names):
        if _holds_pairs(name):
            found = read_pairs(Path(name).expanduser())
            kept = [pair for pair in found if split == "all" or split_of("own", pair.question) == split]
            logger.info("%s: %d of %d pairs are its part '%s'", name, len(kept), len(found), split)
            pairs += kept
        else:
            texts += load_documents(name, split)["text"]
    if not pairs and not texts:
        raise ValueError(f"data is '{names}', which holds no text in its part '{split}'. Give more text.")
    return Source(pairs=pairs, texts=texts)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL file.

    Raises:
        ValueError: what is wrong with which line.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}. Check the path given to --data.")
    pairs = [_as_pair(row, where) for where, row in read_jsonl(path)]
    if not pairs:
        raise ValueError(f"{path} is empty. Give a file with at least one question and response.")
    return pairs


def prompt_tokens(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A question as the model is asked it: by the tokenizer's chat template, or the default one where it has none."""
    asked = render([{"role": "user", "content": question}], with_chat_template(tokenizer), add_generation_prompt=True)
    return tokenizer(asked, add_special_tokens=False)["input_ids"]


def to_rows(source: Source, tokenizer: PreTrainedTokenizerBase, *, length: int) -> Dataset:
    """Rows to train on, as `moe_common.text.batches.collate` takes them.

    Args:
        source: as `read_source` gives it.
        tokenizer: the backbone's own.
        length: most tokens of a row; a longer pair is cut.

    Raises:
        ValueError: the tokenizer has no end-of-text token, or `length` is too small.
    """
    packed = pack_documents(source.texts, tokenizer, block_size=length)
    rows = [row for row in packed if sum(row["attention_mask"]) > 1]
    for pair in source.pairs:
        answer = tokenizer(pair.response, add_special_tokens=False)["input_ids"]
        tokens = [*prompt_tokens(pair.question, tokenizer), *answer, tokenizer.eos_token_id][:length]
        rows.append(continued_row([], tokens))
    return Dataset.from_list(rows)


def to_prompts(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, length: int, whole_texts: bool
) -> list[list[int]]:
    """Beginnings to be continued.

    Args:
        source: each question of it is a prompt.
        tokenizer: the backbone's own.
        length: most tokens of a prompt.
        whole_texts: each document gives one prompt, its beginning; otherwise it gives one for every `length` tokens.
            Of a document no longer than that it is the first half.
    """
    prompts = [prompt_tokens(pair.question, tokenizer)[:length] for pair in source.pairs]
    # Where only the beginning is needed: a token is seldom longer than 16 characters.
    texts = [text[: 16 * length] for text in source.texts] if whole_texts else source.texts
    if texts:
        for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            size = min(length, (len(tokens) + 1) // 2)
            starts = [0] if whole_texts or len(tokens) <= length else range(0, len(tokens) - length + 1, length)
            prompts += [tokens[start : start + size] for start in starts if size > 0]
    return prompts


def to_tasks(source: Source, tokenizer: PreTrainedTokenizerBase, *, prompt_length: int, longest: int) -> list[Task]:
    """Questions and the right answers to them; of a document, how its beginning goes on.

    Args:
        source: as `read_source` gives it.
        tokenizer: the backbone's own.
        prompt_length: most tokens of a document's beginning; a short one is halved.
        longest: most tokens of an answer.
    """
    end = tokenizer.eos_token_id
    tasks = []
    for pair in source.pairs:
        answer = [*tokenizer(pair.response, add_special_tokens=False)["input_ids"], end]
        tasks.append(Task(prompt_tokens(pair.question, tokenizer), answer[:longest]))
    # Only the beginning is needed: a token is seldom longer than 16 characters.
    texts = [text[: 16 * (prompt_length + longest)] for text in source.texts]
    for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []:
        size = min(prompt_length, (len(tokens) + 1) // 2)
        if size:
            tasks.append(Task(tokens[:size], [*tokens[size:], end][:longest]))
    return tasks


def continued_row(prompt: list[int], continuation: list[int]) -> dict[str, list[int]]:
    """A row of which only the continuation is learnt."""
    tokens = [*prompt, *continuation]
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [*[IGNORED_LABEL] * len(prompt), *continuation],
    }


def _holds_pairs(name: str) -> bool:
    """Whether a JSONL file is one of questions and responses: any of its first line's columns says so."""
    path = Path(name).expanduser()
    if path.suffix != ".jsonl":
        return False
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}. Check the path given to --data.")
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return True
    return not isinstance(row, dict) or not ({"text", "messages", "prompt", "instruction", "answer"} & row.keys())


def _as_pair(row: dict, where: str) -> Pair:
    for column in ("question", "response"):
        held = row.get(column)
        if held is None:
            raise ValueError(
                f"{where} has no {column}: it holds the columns {', '.join(row) or 'none'}. "
                'Each line must be {"question": "...", "response": "..."}.'
            )
        if not isinstance(held, str):
            raise ValueError(f"{where}: its {column} is a {type(held).__name__}, but must be text.")
        if not held.strip():
            raise ValueError(f"{where} has an empty {column}. Fill it in or remove the line.")
    return Pair(row["question"], row["response"])
