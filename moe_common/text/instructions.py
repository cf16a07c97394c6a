"""Conversations as tokens and labels: the loss is on what the assistant says, and on nothing else.

A row holds `messages` (a list of {"role": ..., "content": ...}) or a `prompt` and its `response`, which are a user's
message and the assistant's. The tokenizer's chat template renders them; a tokenizer without one gets
DEFAULT_CHAT_TEMPLATE, which writes `User: ...` and `Assistant: ...` lines and an end-of-text token after each answer.

An example that is longer than the longest sequence is left out: an answer that stops in the middle teaches stopping in
the middle. With `keep_truncated` its first tokens are kept, if part of an answer is among them.
"""

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from moe_common.text.documents import check_messages
from moe_common.text.packing import IGNORED_LABEL

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """Examples ready for training.

    Args:
        rows: one example each, of different lengths: `input_ids`, `attention_mask` and `labels`.
        num_truncated: examples longer than the limit.
        num_left_out: those of them that are not in `rows`.
        num_trained_tokens: labels that are not -100.
    """

    rows: Dataset
    num_truncated: int
    num_left_out: int
    num_trained_tokens: int


def is_instruction(columns: Iterable[str]) -> bool:
    """Whether a dataset with these columns holds conversations rather than plain text."""
    columns = set(columns)
    return "messages" in columns or {"prompt", "response"} <= columns


def encode_examples(
    documents: Iterable[dict[str, Any]],
    tokenizer,
    *,
    max_seq_length: int,
    keep_truncated: bool = False,
    where: Iterable[str] | None = None,
) -> EncodedExamples:
    """Encode conversations one by one; see the top of this file for what is cut and what is left out.

    Args:
        documents: rows of `moe_common.text.documents.load_documents` with `messages`, or with `prompt` and `response`.
        tokenizer: any transformers tokenizer.
        max_seq_length: tokens that an example may have.
        keep_truncated: keep the first tokens of a longer one.
        where: what each is called in an error; by default example 1, example 2 and so on.

    Raises:
        ValueError: a row is no conversation, or its template cannot be split into question and answer.
    """
    tokenizer = with_chat_template(tokenizer)
    rows, truncated, left_out, trained = [], 0, 0, 0
    for place, document in zip(where or map("example {}".format, itertools.count(1)), documents, strict=False):
        input_ids, labels = encode_conversation(as_messages(document, place), tokenizer)
        too_long = len(input_ids) > max_seq_length
        truncated += too_long
        kept = labels[1:max_seq_length]  # the first label is never predicted
        if (too_long and not keep_truncated) or all(label == IGNORED_LABEL for label in kept):
            left_out += 1
            continue
        trained += sum(label != IGNORED_LABEL for label in kept)
        length = min(len(input_ids), max_seq_length)
        rows.append({"input_ids": input_ids[:length], "attention_mask": [1] * length, "labels": labels[:length]})
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "attention_mask", "labels")}
    return EncodedExamples(
        rows=Dataset.from_dict(columns),
        num_truncated=truncated,
        num_left_out=left_out,
        num_trained_tokens=trained,
    )


def encode_conversation(messages: list[dict[str, str]], tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and labels that are -100 outside of the assistant's messages.

    Each message is tokenised apart from what stands before it, as it is when the model answers a prompt. What the
    template writes behind an answer, such as its end-of-turn token, is part of the answer.

    Args:
        messages: roles and contents, at least one of them the assistant's.
        tokenizer: one with a chat template.

    Raises:
        ValueError: the template does not render the part before an answer as a beginning of the whole.
    """
    input_ids: list[int] = []
    labels: list[int] = []

    def add(text: str, *, trained: bool) -> None:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        input_ids.extend(tokens)
        labels.extend(tokens if trained else [IGNORED_LABEL] * len(tokens))

    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], tokenizer, add_generation_prompt=True)
        after = render(messages[: index + 1], tokenizer)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"The chat template of {type(tokenizer).__name__} writes a conversation of {index + 1} messages "
                "differently from its beginning, so the answer cannot be told from the question. Give the answers as "
                "rows of prompt and response, or set tokenizer.chat_template to one that only appends."
            )
        add(before[len(done) :], trained=False)
        add(after[len(before) :], trained=True)
        done = after
    return input_ids, labels


def render_question(document: dict[str, Any], tokenizer, where: str) -> str:
    """What stands before the first answer of a conversation, as a model that is to answer it reads it."""
    messages = itertools.takewhile(lambda message: message["role"] != "assistant", as_messages(document, where))
    return render(list(messages), with_chat_template(tokenizer), add_generation_prompt=True)


def render(messages: list[dict[str, str]], tokenizer, *, add_generation_prompt: bool = False) -> str:
    """The conversation as the template writes it."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def as_messages(document: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The conversation a row holds.

    Raises:
        ValueError: a message without role or content, or nothing said by the assistant.
    """
    messages = document.get("messages")
    if messages is None:
        return [
            {"role": "user", "content": document["prompt"].strip()},
            {"role": "assistant", "content": document["response"].strip()},
        ]
    check_messages(messages, where)
    if all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(
            f"{where} has no message of the role 'assistant' to learn from; its roles are {roles}. Rename the roles, "
            "or leave the example out."
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def with_chat_template(tokenizer):
    """The tokenizer, or a copy of it with DEFAULT_CHAT_TEMPLATE where it has none."""
    if tokenizer.chat_template is not None:
        return tokenizer
    copied = copy.copy(tokenizer)
    copied.chat_template = DEFAULT_CHAT_TEMPLATE
    return copied
