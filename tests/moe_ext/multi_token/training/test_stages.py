import pytest
import torch
from datasets import Dataset
from multi_token_testing import FAMILIES, VOCABULARY, make_backbone
from torch import nn

from moe_common.runs.trainer_callbacks import Annealing
from moe_ext.multi_token.decoding.generation import generate
from moe_ext.multi_token.decoding.planning import FixedPlan
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE
from moe_ext.multi_token.training import stages as training
from moe_ext.multi_token.training.self_distill import continue_prompts
from moe_ext.multi_token.training.stages import StageSettings, at_progress, train_stage


class Killed(Exception):
    """In place of a signal, in the middle of a run."""


def rows(count=12, length=10):
    torch.manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (count, length)).tolist()
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in tokens])


def settings(stage, **changed):
    chosen = {"epochs": 3, "batch": 4, "lr": 1e-2, "save_steps": 2, "logging_steps": 2, "bf16": False, "seed": 0}
    return StageSettings(stage=stage, **{**chosen, **changed})


def fresh(**config):
    backbone = make_backbone()
    torch.manual_seed(1)
    return MultiTokenMoE(backbone, MultiTokenConfig(**{"num_heads": 2, "k_max": 1, **config}))


@pytest.mark.parametrize("stage", ["heads", "router"])
@pytest.mark.parametrize("killed_after", [3, 8])
def test_a_broken_run_ends_with_the_numbers_of_a_whole_one(tmp_path, monkeypatch, stage, killed_after):
    whole = fresh()
    train_stage(whole, rows(), settings(stage), tmp_path / "whole")

    class AnnealAndKill(Annealing):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == killed_after:
                raise Killed

    monkeypatch.setattr(training, "Annealing", AnnealAndKill)
    with pytest.raises(Killed):
        train_stage(fresh(), rows(), settings(stage), tmp_path / "broken")
    monkeypatch.undo()
    torch.rand(7)  # whatever the process did meanwhile
    again = fresh()
    train_stage(again, rows(), settings(stage), tmp_path / "broken")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_stage_1_trains_the_heads_and_leaves_the_router(tmp_path):
    model = fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_stage(model, rows(), settings("heads"), tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("heads.") for name in changed)
    assert not any(name.startswith(("router.", "copy_router.")) for name in changed)


def test_stage_2_trains_both_and_nothing_trains_the_backbone(tmp_path):
    model = fresh()
    frozen = [parameter.clone() for parameter in model.backbone.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_stage(model, rows(), settings("router"), tmp_path)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"heads", "router", "copy_router"}
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.backbone.parameters(), strict=True))


def test_one_schedule_runs_over_all_epochs(tmp_path, monkeypatch):
    seen = []
    inner = MultiTokenMoE.forward

    def watched(self, *args, **kwargs):
        seen.append((self.training_state.teacher_forcing, self.training_state.heads_on))
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(MultiTokenMoE, "forward", watched)
    train_stage(fresh(), rows(), settings("router"), tmp_path)
    assert len(seen) == 9  # three epochs of three steps
    expected = [(1 - step / 8, 2 - step / 8) for step in range(9)]
    for found, wanted in zip(seen, expected, strict=True):
        assert found == pytest.approx(wanted)


def test_stage_1_is_taught_with_all_heads_on_throughout():
    for progress in (0.0, 0.5, 1.0):
        state = at_progress("heads", progress, MultiTokenConfig(num_heads=5, k_max=1))
        assert (state.teacher_forcing, state.heads_on) == (1.0, 5)


def test_teaching_can_go_on_to_the_end():
    config = MultiTokenConfig(teacher_forcing_end=0.6)
    taught = [at_progress("router", progress, config).teacher_forcing for progress in (0.0, 0.5, 1.0)]
    assert taught == pytest.approx([1.0, 0.8, 0.6])


def test_the_copy_router_learns_how_far_copies_stand(tmp_path):
    """Rows that turn in a circle of four for twelve tokens: long matches stand, the first ones do not."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(40):
        circle = torch.randint(3, VOCABULARY, (4,), generator=generator).tolist()
        texts.append([*circle * 3, *torch.randint(3, VOCABULARY, (12,), generator=generator).tolist()])
    data = Dataset.from_list([{"input_ids": r, "attention_mask": [1] * 24, "labels": r} for r in texts])
    model = fresh(max_copy=2)
    train_stage(model, data, settings("router", epochs=25, batch=8, lr=3e-2), tmp_path)
    states = model.states(torch.tensor(texts), torch.ones(40, 24))
    with torch.no_grad():
        turning = torch.sigmoid(model.copy_router(states[:, 7], torch.full((40,), 4)))[:, 0].mean()
        chance = torch.sigmoid(model.copy_router(states[:, 20], torch.full((40,), 1)))[:, 0].mean()
    tokens_BL = torch.tensor(texts)
    matched_N, right_NK, judged_NK = model.copies(tokens_BL, tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool))
    often = right_NK[(matched_N == 1) & judged_NK[:, 0], 0].float().mean()
    assert turning > 0.8 and chance == pytest.approx(often.item(), abs=0.05)


def test_every_epoch_trains(tmp_path):
    one, three = fresh(), fresh()
    train_stage(one, rows(), settings("heads", epochs=1), tmp_path / "one")
    train_stage(three, rows(), settings("heads", epochs=3), tmp_path / "three")
    with torch.no_grad():
        given = rows().with_format("torch")[:]
        one.training_state = three.training_state = at_progress("heads", 0.0, one.config)
        assert three(**given)["loss"] < 0.9 * one(**given)["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_continuation_is_the_backbones_own(family):
    backbone = make_backbone(family)
    prompts = [[3, 4, 5], [7], [9, 8, 7, 6], [5, 5]]
    found = continue_prompts(backbone, Padding(), prompts, num_tokens=6)
    for prompt, row in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = backbone.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
        assert row["input_ids"] == expected[0].tolist()
        assert row["labels"] == [-100] * len(prompt) + expected[0, len(prompt) :].tolist()


class Padding:
    """The part of a tokenizer that continuing prompts needs."""

    def pad(self, batch, *, padding_side, return_tensors):
        assert padding_side == "left" and return_tensors == "pt"
        longest = max(map(len, batch["input_ids"]))
        return Batch(
            input_ids=torch.tensor([[2] * (longest - len(row)) + row for row in batch["input_ids"]]),
            attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch["input_ids"]]),
        )


class Batch(dict):
    def to(self, device):
        return self


def test_heads_learn_to_draft_what_a_simple_backbone_says(tmp_path):
    """A backbone that counts up: after training most drafts are accepted, and the router knows."""
    backbone = counting_backbone()
    torch.manual_seed(1)
    model = MultiTokenMoE(backbone, MultiTokenConfig(num_heads=3, k_max=3))
    counted = [[(start + step) % 20 + 3 for step in range(16)] for start in range(20)]
    data = Dataset.from_list([{"input_ids": r, "attention_mask": [1] * 16, "labels": r} for r in counted])
    train_stage(model, data, settings("heads", epochs=20, batch=10), tmp_path / "s1")
    train_stage(model, data, settings("router", epochs=20, batch=10), tmp_path / "s2")
    prompt = torch.tensor([[3, 4, 5]])
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 21, "do_sample": False}
    decoding = generate(model.eval(), prompt, plan=FixedPlan(3), **asked)
    assert torch.equal(decoding.sequences, backbone.generate(prompt, **asked))
    assert decoding.report.tokens_per_pass > 3
    fast = generate(model, prompt, mode="fast", **asked)
    assert torch.equal(fast.sequences, decoding.sequences)
    assert fast.report.tokens_per_pass > 3


def counting_backbone():
    """Says n + 1 after n, within 3..22: its embedding is one-hot, its blocks add nothing, its lm_head shifts."""
    backbone = make_backbone("llama", end=None)
    with torch.no_grad():
        for parameter in backbone.model.layers.parameters():
            parameter.zero_()
        backbone.get_input_embeddings().weight.copy_(torch.eye(VOCABULARY, 32))
        head = nn.Parameter(torch.zeros(VOCABULARY, 32))
        for token in range(3, 23):
            head[(token - 3 + 1) % 20 + 3, token] = 5.0
        backbone.lm_head.weight = head
        backbone.model.norm.weight.fill_(1.0)
    return backbone
