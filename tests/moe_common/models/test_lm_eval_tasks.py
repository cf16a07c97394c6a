"""A task file of one's own, without the hub; skipped where lm-eval is not installed."""

import json
import sys

import pytest
import torch

from moe_common.models.base_model import load_base_model
from moe_common.models.lm_eval_tasks import find_tasks, run_tasks

QUESTIONS = [("Two and two?", "four", "nine"), ("The sea is", "wet", "square"), ("A cat is", "an animal", "a number")]


@pytest.fixture
def task_folder(tmp_path):
    rows = [{"question": q, "choices": [right, wrong], "label": 0} for q, right, wrong in QUESTIONS]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "own_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "own.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "own.yaml").write_text(json.dumps(task))  # JSON is YAML
    return tmp_path


@torch.no_grad()
def right_answers(model, tokenizer) -> float:
    """Oracle: the share of questions after which the right answer is likelier than the wrong one."""
    right = 0
    for question, *answers in QUESTIONS:
        scores = []
        for answer in answers:
            context = tokenizer(question, add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{question} {answer}", add_special_tokens=False)["input_ids"]
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        right += scores[0] > scores[1]
    return right / len(QUESTIONS)


def test_a_task_of_ones_own_scores_what_a_plain_loop_does(task_folder):
    pytest.importorskip("lm_eval")
    model, tokenizer = load_base_model()
    manager = find_tasks(["own_questions"], include_path=str(task_folder))
    measured = run_tasks(model, tokenizer, ["own_questions"], manager, limit=None, batch_size=2)
    assert measured["own_questions"]["acc,none"] == pytest.approx(right_answers(model, tokenizer))


def test_an_unknown_task_is_refused(task_folder):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="own_question.*lm-eval"):
        find_tasks(["own_question"], include_path=str(task_folder))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ModuleNotFoundError, match=r"lm-eval.*\.\[eval\]"):
        find_tasks(["any"], include_path=None)
