import json

import pytest
import torch
from tiny_models import tiny_folder

from moe_common.models.base_model import load_base_model
from moe_ext.multi_token.__main__ import COMMANDS, main
from moe_ext.multi_token.decoding import generation
from moe_ext.multi_token.model.storage import load

NEW = 12


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "qa.jsonl"
    rows = [{"question": f"What is {n}?", "response": f"It is {n}, and {n} it is."} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def command_line(data, out, **changed):
    chosen = {
        "model": "base",
        "data": data,
        "out": out,
        "heads": 2,
        "k_max": 1,
        "stage1_epochs": 0.5,
        "stage2_epochs": 0.5,
        "batch": 8,
        "length": 48,
        "lr": 1e-3,
        **changed,
    }
    return ["train", *(f"--{name}={value}" for name, value in chosen.items() if value is not None)]


@pytest.fixture(scope="module")
def trained(questions, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "qa"
    assert main(command_line(questions, out, ppo_steps=1, self_distill=True, prompt_length=24)) == 0
    return out


def refused(argv, capsys):
    """The one line that a refused command says."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in argv])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("python -m moe_ext.multi_token")
    return said[-1]


def test_every_stage_lies_in_its_own_folder(trained):
    for name in ("s1", "s2", "ppo_final"):
        inside = {path.name for path in (trained / name).iterdir()}
        assert inside >= {"config.json", "heads.safetensors", "router.safetensors", "moe_meta.json"}
        assert load(trained / name)[2].stage == name


def test_a_second_call_trains_nothing_again(trained, questions, caplog):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    caplog.set_level("INFO")
    assert main(command_line(questions, trained, ppo_steps=1, self_distill=True, prompt_length=24)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    assert "is there already" in caplog.text


def test_a_run_begun_otherwise_is_not_gone_on_with(trained, questions, capsys):
    said = refused(command_line(questions, trained, ppo_steps=1, self_distill=True, prompt_length=24, lr=1), capsys)
    assert "lr (0.001 there, 1.0 asked for)" in said


def test_lossless_output_is_that_of_generate(trained, capsys):
    assert (
        main(["infer", f"--ckpt={trained / 's2'}", "--prompt=The river", f"--max_tokens={NEW}", "--as_question=false"])
        == 0
    )
    said = capsys.readouterr().out
    backbone, tokenizer = load_base_model()
    prompt = tokenizer("The river", return_tensors="pt")
    expected = backbone.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0]
    assert said.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_a_prompt_is_put_as_a_question_where_the_data_were_questions(trained, capsys):
    assert main(["infer", f"--ckpt={trained / 's2'}", "--prompt=What is 3?", "--max_tokens=4"]) == 0
    asked = capsys.readouterr().out
    assert "What is 3?" not in asked  # only the answer is printed


def test_a_stop_string_ends_the_output(trained, capsys):
    words = ["infer", f"--ckpt={trained / 's2'}", "--prompt=The river", "--max_tokens=40", "--as_question=false"]
    assert main(words) == 0
    whole = capsys.readouterr().out
    stop = whole[len("The river") + 10 : len("The river") + 12]
    assert main([*words, "--stop", stop]) == 0
    cut = capsys.readouterr().out
    assert whole.strip().startswith(cut.strip())
    assert stop in cut and len(cut) < len(whole)


def test_fast_says_what_it_costs(trained, caplog):
    caplog.set_level("INFO")
    assert main(["infer", f"--ckpt={trained / 's2'}", "--prompt=The", "--max_tokens=8", "--mode=fast"]) == 0
    assert "negative log-likelihood under the backbone" in caplog.text


def test_sampling_with_a_seed_repeats_itself(trained, capsys):
    words = ["infer", f"--ckpt={trained / 's1'}", "--prompt=The", "--max_tokens=8", "--temperature=1.5"]
    said = []
    for seed in (1, 1, 2):
        assert main([*words, f"--seed={seed}"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_the_bench_measures_all_ways_and_finds_the_same_text(trained, tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["bench", f"--ckpt={trained / 's2'}", f"--against={trained / 's1'}", "--prompts=2", "--max_tokens=8"]
    assert main([*words, "--rounds=1", f"--out={out}", "--split=all"]) == 0
    said = capsys.readouterr().out
    figures = json.loads(out.read_text())
    lossless = {"generate", "prompt lookup", "heads", "copies", "heads and copies", "independent heads"}
    assert set(figures["ways"]) == {*lossless, "fast"}
    for name in lossless:
        assert figures["ways"][name]["exact_match"] == 1.0
    assert set(figures["ways"]["heads"]["sources"]) == {"heads"}
    assert set(figures["ways"]["heads and copies"]["sources"]) == {"heads", "copies"}
    assert figures["ways"]["generate"]["tokens_per_pass"] == 1.0
    assert [len(figures["cost_ms"][name]) for name in ("heads", "copies")] == [3, 17]
    assert figures["trained"]["data"] and figures["machine"]["torch"] == torch.__version__
    assert "| heads and copies |" in said and "exact match" in said


def test_a_gpt2_backbone_in_a_folder_is_trained_beside_and_measured(questions, tmp_path):
    tiny_folder(tmp_path / "gpt2", "gpt2", bos_token_id=0)
    words = command_line(questions, tmp_path / "run", model=tmp_path / "gpt2", self_distill=True, prompt_length=24)
    assert main([*words, "--draft_vocabulary=64"]) == 0
    out = tmp_path / "bench.json"
    words = ["bench", f"--ckpt={tmp_path / 'run' / 's2'}", "--prompts=2", f"--max_tokens={NEW}", "--rounds=1"]
    assert main([*words, f"--out={out}", "--split=all"]) == 0
    figures = json.loads(out.read_text())["ways"]
    assert figures["heads and copies"]["exact_match"] == figures["heads"]["exact_match"] == 1.0
    assert figures["copies"]["tokens_per_pass"] > 1  # a random model soon repeats itself


def test_copies_can_be_left_out_of_inference(trained, caplog, monkeypatch):
    asked = []
    inner = generation.sources_of
    monkeypatch.setattr(
        generation, "sources_of", lambda model, names: asked.append(tuple(names)) or inner(model, names)
    )
    words = ["infer", f"--ckpt={trained / 's2'}", "--prompt=The", "--max_tokens=4"]
    assert main(words) == 0
    assert set(asked) == {("heads", "copies")}
    asked.clear()
    assert main([*words, "--copy=false"]) == 0
    assert set(asked) == {("heads",)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_max": 3}, r"k_max is 3, but must lie between 1 and heads \(2\)"),
        ({"ppo_steps": 5, "stage2_epochs": 0}, "ppo_steps is 5 and stage2_epochs is 0"),
        ({"ppo_steps": -1}, "ppo_steps is -1"),
        ({"model": "bse"}, "Unknown model 'bse'. Closest: 'base'"),
        ({"model": "/no/such/model"}, "no model folder /no/such/model"),
        ({"data": "/no/such/file.jsonl"}, "no data file"),
        ({"data": "prse"}, "Unknown dataset 'prse'"),
        ({"batch": 0}, "batch is 0"),
        ({"lr": 0}, "lr is 0.0"),
        ({"quant": "2bit"}, "invalid choice"),
        ({"self_distill": True, "prompt_length": 48}, r"prompt_length is 48, but must be below length \(48\)"),
        ({"ppo_steps": 1, "prompt_length": 64}, r"prompt_length is 64, but must be below length \(48\)"),
        ({"head": 2}, "Unknown option --head=2. Closest: --heads"),
        ({"data": None}, "--data"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_is_written(questions, tmp_path, capsys, changed, message):
    import re

    out = tmp_path / "out"
    assert re.search(message, refused(command_line(**{"data": questions, "out": out, **changed}), capsys))
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"question": "x"}', "line 2 has no response"), ('{"question": "x", "response": " "}', "line 2 has an empty")],
)
def test_a_line_without_a_response_is_named_and_nothing_is_written(tmp_path, capsys, line, message):
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "x", "response": "y"}\n' + line)
    assert message in refused(command_line(path, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_not_written_to(questions, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("mine")
    assert "holds something else" in refused(command_line(questions, tmp_path), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


@pytest.mark.parametrize("command", ["infer", "bench"])
def test_a_checkpoint_of_another_backbone_is_refused(trained, tiny_base, capsys, command):
    words = [command, f"--ckpt={trained / 's2'}", f"--model={tiny_base}"]
    said = refused([*words, "--prompt=x"] if command == "infer" else words, capsys)
    assert "was trained for the base 'base'" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["infer", "--ckpt=/no/such", "--prompt=x"], "no checkpoint /no/such"),
        (["infer", "--ckpt=/no/such", "--prompt="], "prompt is empty"),
        (["infer", "--ckpt=/no/such", "--prompt=x", "--max_tokens=0"], "max_tokens is 0"),
        (["infer", "--ckpt=/no/such", "--prompt=x", "--mode=quick"], "invalid choice"),
        (["bench", "--ckpt=/no/such"], "no checkpoint /no/such"),
        (["bench", "--ckpt=/no/such", "--rounds=0"], "rounds is 0"),
    ],
)
def test_what_cannot_be_read_is_refused(argv, message, capsys):
    assert message in refused(argv, capsys)


def test_an_unknown_command_is_refused(capsys):
    assert main(["learn"]) == 2
    assert "'learn' is no command. Give one of train, infer, bench" in capsys.readouterr().err


def test_help_names_the_commands_and_their_options(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
