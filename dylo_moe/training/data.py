"""What a run reads: the datasets it names, each as rows of tokens and labels, and how many of what it holds.

Built-in domains are plain text. So is a dataset without conversations, with `--as_text`, or with a `--text_column`.
Anything else with `messages` or `prompt` and `response` is instruction data (`moe_common/text/instructions.py`).
"""

import logging
import math
from dataclasses import dataclass, field

from datasets import Dataset

from moe_common.runs.options import check_at_least, split_names
from moe_common.text.documents import DOMAINS, Part, load_documents
from moe_common.text.instructions import encode_examples, is_instruction
from moe_common.text.packing import IGNORED_LABEL, pack_apart, pack_documents
from moe_common.text.reading import enough_texts, reading_order

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DataConfig:
    """Which text is read, how much of it, and how it becomes rows."""

    datasets: str = field(
        default="prose,code,math",
        metadata={"help": "Domains, JSONL/Parquet/text files, folders, hub ids; comma separated."},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of your own datasets to read as plain text."}
    )
    as_text: bool = field(
        default=False, metadata={"help": "Read instruction data as plain text: loss on every token."}
    )
    training_subset: float = field(default=100.0, metadata={"help": "Percent of the training documents to use."})
    eval_subset: float = field(default=100.0, metadata={"help": "Percent of the held-out documents to use."})
    eval_blocks: int | None = field(
        default=None, metadata={"help": "Held-out rows of each dataset to measure on, at most; by default all."}
    )
    max_seq_length: int = field(default=256, metadata={"help": "Tokens in a row."})
    keep_truncated: bool = field(
        default=False, metadata={"help": "Cut examples longer than a row, rather than leave them out."}
    )
    separate_documents: bool = field(
        default=True, metadata={"help": "No attention across the documents packed in a row."}
    )
    interleaved_sampling: bool = field(
        default=False, metadata={"help": "The datasets take turns row by row, each with the same share."}
    )

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("datasets names no dataset. Give at least one, e.g. --datasets prose,code.")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"datasets names one twice: {self.datasets}. Give each once.")
        for name in ("training_subset", "eval_subset"):
            if not 0 < getattr(self, name) <= 100:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a percentage above 0, up to 100.")
        check_at_least(self, eval_blocks=1, max_seq_length=2)

    @property
    def domains(self) -> list[str]:
        return split_names(self.datasets)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """One split of one dataset as rows.

    Args:
        name: the dataset.
        instruction: whether its rows are conversations, one each, rather than blocks of text.
        rows: `input_ids`, `labels`, and `attention_mask` or `position_ids`.
        num_examples: documents or conversations that were read.
        num_tokens: tokens in `rows`, padding not counted.
        num_truncated: conversations longer than a row. Text is never cut: it goes on in the next row.
        num_left_out: conversations that are not in `rows`.
    """

    name: str
    instruction: bool
    rows: Dataset
    num_examples: int
    num_tokens: int
    num_truncated: int = 0
    num_left_out: int = 0


def prepare(
    name: str,
    split: Part,
    tokenizer,
    config: DataConfig,
    *,
    seed: int,
    apart: bool,
    max_rows: int | None = None,
) -> PreparedData:
    """Read one split of one dataset, in an order that depends on the seed alone.

    Args:
        name: as `load_documents` takes it.
        split: `train` reads `training_subset` percent of the documents, the others `eval_subset` percent.
        tokenizer: the base model's.
        seed: of the order in which documents are read and subsets drawn.
        apart: keep the documents of a block apart (the base must allow it, see `keeps_documents_apart`).
        max_rows: stop when there are so many rows.

    Raises:
        ValueError: as `load_documents`; or not one row of `max_seq_length` comes of it.
    """
    documents = load_documents(name, split, text_column=None if name in DOMAINS else config.text_column)
    percent = config.training_subset if split == "train" else config.eval_subset
    order = reading_order(len(documents), seed)
    order = order[: math.ceil(len(order) * percent / 100)]
    make = _conversations if reads_conversations(name, documents.column_names, config) else _blocks_of_text
    prepared = make(name, documents, order, tokenizer, config, apart=apart, training=split == "train", limit=max_rows)
    if len(prepared.rows) == 0:
        raise ValueError(
            f"{name} gives no row of {config.max_seq_length} tokens in its split '{split}': {len(order)} documents "
            f"were read, {prepared.num_left_out} were too long and left out. Give more text, change --max_seq_length, "
            "or set --keep_truncated."
        )
    return prepared


def reads_conversations(name: str, columns: list[str], config: DataConfig) -> bool:
    """Whether a dataset of these columns is read as instruction data, and not as plain text."""
    as_text = name in DOMAINS or config.as_text or config.text_column
    return not as_text and is_instruction(columns)


def _blocks_of_text(name, documents, order, tokenizer, config, *, apart, training, limit) -> PreparedData:
    size = config.max_seq_length
    texts = enough_texts((documents[i]["text"] for i in order), None if limit is None else limit * size)
    if apart:
        rows = pack_apart(texts, tokenizer, block_size=size, keep_remainder=not training)
    else:
        rows = pack_documents(texts, tokenizer, block_size=size, keep_remainder=len(texts) < 2)
    rows = rows.select(range(len(rows) if limit is None else min(limit, len(rows))))
    return PreparedData(
        name=name,
        instruction=False,
        rows=rows,
        num_examples=len(texts),
        num_tokens=len(rows) * size - (_padding_at_the_end(rows[-1]["labels"]) if len(rows) else 0),
    )


def _padding_at_the_end(labels: list[int]) -> int:
    return next((count for count, label in enumerate(reversed(labels)) if label != IGNORED_LABEL), len(labels))


def _conversations(name, documents, order, tokenizer, config, *, apart, training, limit) -> PreparedData:
    examples = documents.select(order)
    encoded = encode_examples(
        examples,
        tokenizer,
        max_seq_length=config.max_seq_length,
        keep_truncated=config.keep_truncated,
        where=[f"{name}, example {index + 1}" for index in order],
    )
    if encoded.num_left_out:
        logger.warning(
            "%s: %d of %d examples are left out, because no answer fits into %d tokens (see --keep_truncated)",
            name,
            encoded.num_left_out,
            len(examples),
            config.max_seq_length,
        )
    rows = encoded.rows.select(range(min(limit or len(encoded.rows), len(encoded.rows))))
    return PreparedData(
        name=name,
        instruction=True,
        rows=rows,
        num_examples=len(examples),
        num_tokens=sum(map(len, rows["input_ids"])),
        num_truncated=encoded.num_truncated,
        num_left_out=encoded.num_left_out,
    )
