"""The continual run, from its settings to its files, on a tiny random base and three kinds of made-up text."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from dylo_moe.continual import run as continual
from dylo_moe.continual.run import ContinualConfig, run
from dylo_moe.model import DyLoRA_MoE
from moe_common.models.perplexity import HeldOutLoss
from moe_common.runs.whole_files import read_json, write_json

KINDS = {
    "rain": ["rain", "river", "hill", "water", "sea", "cloud", "wet", "stream", "flood", "grey"],
    "code": ["def", "return", "for", "in", "range", "(", ")", ":", "x", "+=", "1", "lambda", "self"],
    "sums": ["1", "2", "3", "4", "5", "6", "7", "8", "9", "0", "+", "-", "=", "*", "/"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of text for each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, words in KINDS.items():
        (folder / name).mkdir()
        for split, count in {"train": 60, "validation": 60, "test": 10}.items():
            generator = random.Random(f"{name} {split}")
            rows = [json.dumps({"text": " ".join(generator.choices(words, k=20))}) for _ in range(count)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows))
    return {name: str(folder / name) for name in KINDS}


def config_of(tiny_base, output, skills, **changed) -> ContinualConfig:
    chosen = {
        "continual": skills,
        "model_name": str(tiny_base),
        "output_dir": str(output),
        "lora_r": 2,
        "lora_alpha": 4,
        "first_adapted_block": 1,
        "seed_steps": 3,
        "consolidate_steps": 2,
        "train_batch_size": 4,
        "max_seq_length": 16,
        "replay_blocks": 4,
        "probe_blocks": 16,
        "calibration_blocks": 32,
        "eval_blocks": 4,
        "bf16": False,
        **changed,
    }
    return ContinualConfig(**chosen)


@pytest.fixture(scope="module")
def visits(sources):
    return [sources["rain"], sources["code"], sources["sums"], sources["rain"]]


@pytest.fixture(scope="module")
def finished(tiny_base, visits, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "all"
    return output, run(config_of(tiny_base, output, visits))


def test_new_skills_grow_an_expert_each_and_a_known_one_grows_none(finished, visits):
    _, results = finished
    assert [decision["is_novel"] for decision in results["decisions"]] == [True, True, True, False]
    assert [decision["expert"] for decision in results["decisions"]] == [
        "expert_0",
        "expert_1",
        "expert_2",
        "expert_0",
    ]
    assert results["decisions"][3]["nearest"] == visits[0]
    assert results["experts"] == ["expert_0", "expert_1", "expert_2"]


def weights_of(folder, expert, tiny_base) -> list[torch.Tensor]:
    return DyLoRA_MoE.from_pretrained(folder).experts.parameters_of(expert)


def test_an_expert_changes_only_while_its_own_skill_is_learnt(finished, tiny_base):
    output, _ = finished
    after = [{e: weights_of(output / "mixture" / f"{v:02d}", e, tiny_base) for e in names} for v, names in
             enumerate([["expert_0"], ["expert_0", "expert_1"], ["expert_0", "expert_1", "expert_2"],
                        ["expert_0", "expert_1", "expert_2"]], start=1)]  # fmt: skip

    def same(before, now, expert):
        return all(torch.equal(a, b) for a, b in zip(after[before][expert], after[now][expert], strict=True))

    assert same(0, 1, "expert_0") and same(1, 2, "expert_0") and same(1, 2, "expert_1")
    assert not same(2, 3, "expert_0")  # learns on at the second visit
    assert same(2, 3, "expert_1") and same(2, 3, "expert_2")


def test_every_skill_so_far_is_measured_after_each_visit(finished, visits):
    _, results = finished
    for system in ("mixture", "sequential"):
        assert [set(nll) for nll in results["mean_nll"][system]] == [set(visits[:n]) for n in (1, 2, 3, 4)]
    assert set(results["mean_nll"]["joint"]) == set(results["base"]) == set(visits)


def test_the_three_compared_have_about_as_many_parameters(finished):
    sizes = finished[1]["trained_parameters"]
    assert sizes["sequential"] == sizes["joint"] == pytest.approx(sizes["mixture"], rel=0.05)


def test_the_saved_mixture_is_the_one_that_was_measured(finished, sources, tiny_base):
    output, results = finished
    model = DyLoRA_MoE.from_pretrained(output / "mixture" / "04")
    assert [skill.expert for skill in model.skills] == ["expert_0", "expert_1", "expert_2"]
    assert model.experts.frozen == ["expert_0", "expert_1", "expert_2"]
    config = config_of(tiny_base, output, results["visits"])
    from moe_common.models.base_model import load_base_model
    from moe_common.models.perplexity import measure_blocks

    text = continual.read_texts(config, load_base_model(tiny_base)[1])[sources["code"]]
    assert measure_blocks(model, text.measured).mean_nll == results["mean_nll"]["mixture"][-1][sources["code"]]


def test_the_card_of_each_visit_tells_what_was_learnt_and_measured(finished, visits):
    output, results = finished
    for number, nll in enumerate(results["mean_nll"]["mixture"], start=1):
        card = (output / "mixture" / f"{number:02d}" / "README.md").read_text()
        learnt = list(dict.fromkeys(visits[:number]))
        for system, found in (("base", results["base"]), ("mixture (this)", nll)):
            assert f"| {system} | {' | '.join(f'{math.exp(found[skill]):.2f}' for skill in learnt)} |" in card
        assert f"| skills, as they arrived | {', '.join(Path(skill).name for skill in visits[:number])} |" in card
        assert "5 steps of 4 rows of 16 tokens" in card and "4 rows of the test split" in card
        assert not any(folder in card for folder in visits)


def test_no_expert_lies_below_the_first_adapted_block(finished):
    output, _ = finished
    model = DyLoRA_MoE.from_pretrained(output / "mixture" / "01")
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted and all(".layers.1." in name for name in adapted)


def test_everything_is_written_and_nothing_half(finished):
    output, results = finished
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (output / "table.md").read_text() == continual.as_text(results, output)
    assert (output / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    left = [path for path in output.rglob("*") if path.suffix in (".partial", ".scratch")]
    assert left == []


def test_an_interrupted_run_goes_on_behind_the_last_skill_and_ends_the_same(
    finished, tiny_base, visits, tmp_path, monkeypatch
):
    output, whole = finished
    learn, calls = continual._learn, []

    def breaks_in_the_third(*args, **kwargs):
        calls.append(kwargs["number"])
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        return learn(*args, **kwargs)

    monkeypatch.setattr(continual, "_learn", breaks_in_the_third)
    config = config_of(tiny_base, tmp_path / "all", visits)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not (tmp_path / "all" / "results.json").exists()
    continued = run(config)
    assert calls == [0, 1, 2, 2, 3]
    assert continued["mean_nll"] == whole["mean_nll"]
    assert continued["decisions"] == whole["decisions"]
    for part in ("mixture", "sequential"):
        name = f"{part}/04/adapter_model.safetensors"
        assert (tmp_path / "all" / name).read_bytes() == (output / name).read_bytes()


def test_a_finished_run_is_not_trained_again(finished, tiny_base, visits, monkeypatch):
    output, whole = finished
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run(config_of(tiny_base, output, visits))["mean_nll"] == whole["mean_nll"]


def test_a_baseline_is_resumed_too(finished, tiny_base, visits, tmp_path):
    output, whole = finished
    shutil.copytree(output, tmp_path / "all")
    for folder in ("sequential/03", "sequential/04", "joint"):
        shutil.rmtree(tmp_path / "all" / folder)
    assert run(config_of(tiny_base, tmp_path / "all", visits))["mean_nll"] == whole["mean_nll"]


def test_a_skill_that_has_changed_beyond_recognition_gets_an_expert_of_its_own(tiny_base, sources, tmp_path):
    # a negative distance cannot be asked for, so the quantile is moved: everything is novel
    rain = sources["rain"]
    config = config_of(tiny_base, tmp_path, [rain, rain], baselines=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dylo_moe.continual.novelty.NoveltyDetector.calibrate", lambda self, name, held_out: setattr(
            self.library[name], "threshold", 2.0))  # fmt: skip
        results = run(config)
    assert [decision["expert"] for decision in results["decisions"]] == ["expert_0", "expert_1"]
    assert DyLoRA_MoE.from_pretrained(tmp_path / "mixture" / "02").skills.names == [rain, f"{rain} (expert_1)"]


def test_settings_are_chosen_on_other_documents_than_results_are_reported_on(
    tiny_base, sources, tmp_path, monkeypatch
):
    from dylo_moe.continual import baselines as continual_baselines
    from moe_common.models.base_model import load_base_model

    decode = load_base_model(tiny_base)[1].decode
    measured = set()

    def noted(model, blocks):
        measured.update(decode(row) for row in blocks["input_ids"])
        return HeldOutLoss(total_nll=1.0, num_tokens=1)

    for module in (continual, continual_baselines):
        monkeypatch.setattr(module, "measure_blocks", noted)
    seen = {}
    for split in ("test", "validation"):
        measured.clear()
        run(config_of(tiny_base, tmp_path / split, [sources["rain"]], eval_split=split))
        seen[split] = set(measured)
        text = (Path(sources["rain"]) / f"{split}.jsonl").read_text()
        documents = " ".join(json.loads(line)["text"] for line in text.splitlines())
        assert all(block.split("<")[0].strip() in documents for block in seen[split])
    assert not seen["test"] & seen["validation"]


def test_each_baseline_has_the_rate_of_its_own(finished, tiny_base, visits, tmp_path):
    output, whole = finished
    changed = {}
    for option in ("sequential_learning_rate", "joint_learning_rate"):
        shutil.copytree(output / "mixture", tmp_path / option / "mixture")
        noted = read_json(output / "run.json")
        noted["settings"][option] = 1e-2
        write_json(tmp_path / option / "run.json", noted)
        changed[option] = run(config_of(tiny_base, tmp_path / option, visits, **{option: 1e-2}))["mean_nll"]
    assert changed["sequential_learning_rate"]["sequential"] != whole["mean_nll"]["sequential"]
    assert changed["sequential_learning_rate"]["joint"] == whole["mean_nll"]["joint"]
    assert changed["joint_learning_rate"]["joint"] != whole["mean_nll"]["joint"]
    assert changed["joint_learning_rate"]["sequential"] == whole["mean_nll"]["sequential"]


def test_without_baselines_only_the_mixture_is_trained(tiny_base, sources, tmp_path):
    results = run(config_of(tiny_base, tmp_path, [sources["rain"]], baselines=False))
    assert set(results["mean_nll"]) == {"mixture"}
    assert not (tmp_path / "sequential").exists() and not (tmp_path / "joint").exists()


def test_other_settings_in_the_same_folder_are_refused_and_named(finished, tiny_base, visits):
    output, _ = finished
    with pytest.raises(ValueError, match=r"lora_r \(2\b.*\b3\b"):
        run(config_of(tiny_base, output, visits, lora_r=3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"continual": []}, "continual names no skill"),
        ({"lora_r": 0}, r"lora_r.*\b0\b.*\b1\b"),
        ({"top_k": 0}, r"top_k.*\b0\b.*\b1\b"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"replay_blocks": 0}, "replay_blocks is 0"),
        ({"eval_blocks": 0}, "eval_blocks is 0"),
        ({"seed_steps": -1}, r"seed_steps.*-1\b.*\b0\b"),
        ({"seed_steps": 0, "consolidate_steps": 0}, "both 0, so nothing would be learnt"),
        ({"first_adapted_block": -1}, "first_adapted_block is -1"),
        ({"max_seq_length": 1}, "max_seq_length is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"sequential_learning_rate": -1.0}, "sequential_learning_rate is -1.0"),
        ({"joint_learning_rate": 0.0}, "joint_learning_rate is 0.0"),
        ({"seed_steps": 3, "consolidate_steps": 0, "train_batch_size": 2}, r"\b6 blocks.*\b8\b"),
        ({"consolidate_ratio": 0.0}, "consolidate_ratio is 0.0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"novelty_margin": -0.1}, "novelty_margin is -0.1"),
        ({"router_weight_decay": -0.1}, "router_weight_decay is -0.1"),
        ({"probe_blocks": 7}, r"probe_blocks.*\b7\b.*\b8\b"),
        ({"calibration_blocks": 31}, r"calibration_blocks.*\b31\b.*\b32\b"),
    ],
)
def test_a_setting_out_of_range_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        ContinualConfig(**changed)


def test_an_output_folder_that_is_a_file_is_refused(tiny_base, sources, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes.*file.*--output_dir"):
        run(config_of(tiny_base, tmp_path / "notes", [sources["rain"]]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"continual": ["proze"]}, "'proze'.*'prose'"),
        ({"calibration_blocks": 5000}, r"\b16 tokens.*validation.*\b5000\b"),
        ({"first_adapted_block": 2}, r"first_adapted_block.*\b2\b.*\b0 to 1\b"),
        ({"model_name": "no-such-model"}, "'no-such-model'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tiny_base, sources, tmp_path, changed, message):
    skills = changed.pop("continual", [sources["rain"]])
    with pytest.raises(ValueError, match=message):
        run(config_of(tiny_base, tmp_path / "run", skills, **changed))
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"\b2 processes"):
        run(ContinualConfig(output_dir=str(tmp_path / "run"), model_name="no/such/folder/here"))
    assert not (tmp_path / "run").exists()
