"""`python -m dylo_moe.evaluate` on a run of train.py, on a single adapter, and on what is neither."""

import json
import shutil

import pytest
from tiny_models import tiny_folder

import train
from dylo_moe.evaluate import command as evaluate
from dylo_moe.evaluate import humaneval
from dylo_moe.evaluate.humaneval import Outcome
from dylo_moe.model import DyLoRA_MoE


@pytest.fixture(scope="module")
def finished(tiny_options, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    assert train.main(tiny_options(output, learning_rate=0.05)) == 0
    return output


def results_of(*argv, folder, name="results.json") -> dict:
    assert evaluate.main([*map(str, argv), "--output", str(folder / name)]) == 0
    return json.loads((folder / name).read_text())


def refused(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(word) for word in argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_measured_as_train_py_measured_it(finished, tmp_path, capsys):
    trained = json.loads((finished / "results.json").read_text())["perplexity"]
    for folder, name in {finished: "mixture", finished / "lora": "lora"}.items():
        argv = ["--checkpoint", folder, "--eval_blocks", 3]
        found = results_of(*argv, folder=tmp_path, name=f"{name}.json")["perplexity"]
        assert found == {
            domain: {"base": trained["base"][domain], "checkpoint": trained[name][domain]}
            for domain in trained["base"]
        }
    assert f"results   {tmp_path / 'lora.json'}" in capsys.readouterr().out


def test_what_is_given_wins_over_what_the_run_had(finished, tiny_sources, tmp_path):
    rain = tiny_sources.split(",")[0]
    whole = results_of("--checkpoint", finished, "--datasets", rain, folder=tmp_path)
    assert list(whole["perplexity"]) == [rain]
    assert whole["run"]["settings"]["checkpoint"] == str(finished)
    for changed in (["--max_seq_length", 8], ["--eval_subset", 50], ["--separate_documents", "false"]):
        argv = ["--checkpoint", finished, "--datasets", rain, *changed]
        other = results_of(*argv, folder=tmp_path, name=f"{changed[0]}.json")
        assert other["perplexity"] != whole["perplexity"], changed


def test_the_batch_size_is_that_of_the_measuring(finished, monkeypatch, tmp_path):
    sizes = []
    measure = evaluate.measure_blocks
    monkeypatch.setattr(
        evaluate, "measure_blocks", lambda *args, batch_size: sizes.append(batch_size) or measure(*args, batch_size=1)
    )
    results_of("--checkpoint", finished, "--eval_batch_size", 3, "--eval_blocks", 1, folder=tmp_path)
    assert set(sizes) == {3}


def test_a_growing_mixture_is_evaluated_too(tiny_base, tiny_sources, tmp_path):
    DyLoRA_MoE(tiny_base, num_experts=2, lora_r=2).save_pretrained(tmp_path / "grown")
    found = results_of("--checkpoint", tmp_path / "grown", "--datasets", tiny_sources, folder=tmp_path)
    for measured in found["perplexity"].values():
        assert measured["checkpoint"] == pytest.approx(measured["base"])  # untrained experts change nothing


def test_another_base_is_refused_and_both_are_named(finished, tiny_base, tmp_path, capsys):
    tiny_folder(tmp_path / "other", seed=1)
    said = refused(["--checkpoint", finished, "--model_name", tmp_path / "other"], capsys)
    assert f"trained for the base '{tiny_base}'" in said
    assert f"the base found is '{tmp_path / 'other'}'" in said


def test_a_base_of_another_shape_is_refused_also_where_nothing_was_noted(finished, tmp_path, capsys):
    shutil.copytree(finished / "lora", tmp_path / "bare")
    (tmp_path / "bare" / "base.json").unlink()
    said = refused(["--checkpoint", tmp_path / "bare", "--model_name", "base", "--datasets", "prose"], capsys)
    assert "does not fit the base model 'base'" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint", "nowhere"], "There is no checkpoint folder nowhere"),
        (["--checkpoint", "EMPTY"], "holds no adapter_config.json"),
        (["--checkpoint", "RUN", "--datasets", "proze"], "Unknown dataset 'proze'"),
        (["--checkpoint", "RUN", "--include_path", "EMPTY"], "include_path is set, but no tasks"),
        (["--checkpoint", "RUN", "--tasks", "a", "--include_path", "nowhere"], "There is no folder nowhere"),
        (["--checkpoint", "RUN", "--allow_code_execution"], "nothing would be executed. Add --humaneval"),
        (["--checkpoint", "RUN", "--limit", "0"], "limit is 0"),
        (["--checkpoint", "RUN", "--eval_batch_size", "0"], "eval_batch_size is 0"),
        (["--checkpoint", "RUN", "--output", "EMPTY"], "which is a folder. Give the name of a file"),
        (["--checkpoint", "RUN", "--humaneval", "--samples", "EMPTY"], "which is a folder. Give the name of a file"),
    ],
)
def test_bad_input_is_one_line(finished, tmp_path, capsys, argv, message):
    places = {"RUN": str(finished), "EMPTY": str(tmp_path)}
    assert message in refused([places.get(word, word) for word in argv], capsys)


PROBLEM = {"task_id": "Own/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(candidate): pass\n"}


@pytest.mark.parametrize("allowed", [True, False])
def test_what_the_model_wrote_is_run_only_if_that_is_allowed(finished, monkeypatch, tmp_path, capsys, allowed):
    monkeypatch.setattr(evaluate, "load_problems", lambda *, limit: [PROBLEM])
    monkeypatch.setattr(evaluate, "complete_problems", lambda *args: {"Own/0": "    pass"})
    ran = []
    monkeypatch.setattr(evaluate, "run_tests", lambda *args: ran.append(args) or {"Own/0": Outcome.PASSED})
    argv = ["--checkpoint", finished, "--eval_blocks", 1, "--humaneval", "--samples", tmp_path / "samples.jsonl"]
    found = results_of(*argv, *(["--allow_code_execution"] if allowed else []), folder=tmp_path)["humaneval"]
    assert bool(ran) is allowed
    assert found.get("pass@1") == (1.0 if allowed else None)
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"task_id": "Own/0", "completion": "    pass"}
    assert ("nothing was executed" in capsys.readouterr().out) is not allowed


def test_tasks_are_run_with_what_was_asked_for(finished, monkeypatch, tmp_path, capsys):
    asked = {}
    monkeypatch.setattr(
        evaluate, "find_tasks", lambda names, *, include_path: asked.update(path=include_path) or "manager"
    )
    monkeypatch.setattr(
        evaluate,
        "run_tasks",
        lambda model, tokenizer, names, manager, **how: asked.update(names=names, **how) or {"a": {"acc": 0.25}},
    )
    argv = ["--checkpoint", finished, "--eval_blocks", 1, "--tasks", "a, b", "--include_path", tmp_path, "--limit", 5]
    found = results_of(*argv, folder=tmp_path)
    assert asked == {"path": str(tmp_path), "names": ["a", "b"], "limit": 5, "batch_size": 8}
    assert found["tasks"] == {"a": {"acc": 0.25}}
    assert "a: acc 0.2500" in capsys.readouterr().out


def test_an_evaluation_that_is_broken_off_goes_on_with_what_it_has_not_measured_yet(
    finished, tiny_sources, monkeypatch, tmp_path, capsys
):
    argv = ["--checkpoint", finished, "--humaneval", "--samples", tmp_path / "samples.jsonl"]
    problems = [{**PROBLEM, "task_id": f"Own/{number}"} for number in range(3)]
    monkeypatch.setattr(evaluate, "load_problems", lambda *, limit: problems)
    monkeypatch.setattr(humaneval, "MAX_NEW_TOKENS", 3)
    (tmp_path / "whole").mkdir()
    whole = results_of(*argv, folder=tmp_path / "whole")
    samples = (tmp_path / "samples.jsonl").read_text()
    (tmp_path / "samples.jsonl").unlink()

    complete, measured, completed = humaneval._complete, [], []
    measure = evaluate.measure_blocks
    monkeypatch.setattr(evaluate, "measure_blocks", lambda *args, **how: measured.append(1) or measure(*args, **how))

    def stop_at_second(*args):
        if completed:
            raise KeyboardInterrupt
        completed.append(1)
        return complete(*args)

    monkeypatch.setattr(humaneval, "_complete", stop_at_second)
    broken = [*map(str, argv), "--output", str(tmp_path / "results.json")]
    assert evaluate.main(broken) == 130
    assert not (tmp_path / "results.json").exists() and (tmp_path / "results.json.unfinished").exists()
    monkeypatch.setattr(humaneval, "_complete", lambda *args: completed.append(1) or complete(*args))
    again = results_of(*argv, folder=tmp_path)
    assert again["perplexity"] == whole["perplexity"] and (tmp_path / "samples.jsonl").read_text() == samples
    assert len(completed) == 3 and len(measured) == 2 * len(tiny_sources.split(","))
    assert not (tmp_path / "results.json.unfinished").exists()


def test_results_of_another_evaluation_are_never_overwritten(finished, tmp_path, capsys):
    argv = ["--checkpoint", finished, "--eval_blocks", 1]
    found = results_of(*argv, folder=tmp_path)
    assert results_of(*argv, folder=tmp_path) == found  # read, not measured
    results = (tmp_path / "results.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        results_of("--checkpoint", finished, "--eval_blocks", 2, folder=tmp_path)
    assert stopped.value.code == 2
    assert "eval_blocks (1 there, 2 asked for)" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == results


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_output_over_the_checkpoint_is_refused_before_anything_is_measured(finished, name, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda *args: pytest.fail("loaded"))
    place = finished / "mixture" / name
    held = place.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", str(finished), "--output", str(place)])
    assert stopped.value.code == 2
    assert f"{place} is there already" in capsys.readouterr().err
    assert place.read_bytes() == held
