"""The search for the settings of a continual run: it ends at a bracketed best, on validation text, and resumes."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "search_continual.py"
spec = importlib.util.spec_from_file_location("search_continual", SCRIPT)
search_continual = importlib.util.module_from_spec(spec)
spec.loader.exec_module(search_continual)


@pytest.fixture(scope="module")
def argv(tiny_base, tmp_path_factory):
    """A search of a few seconds, over two made-up skills without a single test document."""
    folder = tmp_path_factory.mktemp("skills")
    for name, words in {"rain": ["rain", "hill", "river", "sea"], "sums": ["1", "2", "+", "="]}.items():
        (folder / name).mkdir()
        for split in ("train", "validation"):
            generator = random.Random(f"{name} {split}")
            rows = [json.dumps({"text": " ".join(generator.choices(words, k=20))}) for _ in range(60)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows))
    sizes = {"lora_r": 2, "seed_steps": 2, "consolidate_steps": 1, "train_batch_size": 4, "max_seq_length": 16}
    sizes |= {"replay_blocks": 4, "probe_blocks": 8, "calibration_blocks": 32, "eval_blocks": 4, "bf16": False}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    output = tmp_path_factory.mktemp("search") / "out"
    named = ["--model_name", str(tiny_base), "--output_dir", str(output)]
    return ["--continual", str(folder / "rain"), str(folder / "sums"), *named, *options]


def test_it_prints_every_setting_and_the_best_and_a_second_call_trains_nothing(argv, capsys, monkeypatch):
    monkeypatch.setattr("dylo_moe.continual.run.draw", lambda *args: None)  # a picture takes longer than its run
    assert search_continual.main(argv) == 0
    said = capsys.readouterr().out
    for option in ("learning_rate", "router_weight_decay", "sequential_learning_rate", "joint_learning_rate"):
        values = {float(line.split("|")[3]) for line in said.splitlines() if f"| {option} |" in line}
        chosen = float(said.split(f"--{option} ")[1].split()[0])
        assert min(values) < chosen < max(values)
    in_the_end = [line for line in said.splitlines() if f"| {search_continual.IN_THE_END} |" in line]
    assert len(in_the_end) == said.count("| sequential_learning_rate |")
    table = Path(argv[argv.index("--output_dir") + 1]) / "search.md"
    assert said == f"{table.read_text()}\ntable   {table}\n"
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert search_continual.main(argv) == 0
    assert capsys.readouterr().out == said


def test_bad_input_is_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        search_continual.main([*argv, "--lora_r", "0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
