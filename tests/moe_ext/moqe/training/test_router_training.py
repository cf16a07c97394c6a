import json
import shutil

import numpy as np
import pytest
import torch
from moqe_testing import refused
from safetensors.torch import load_file

from moe_ext.moqe.__main__ import main
from moe_ext.moqe.mixture.expert_set import load_experts
from moe_ext.moqe.mixture.router import Router, RouterConfig
from moe_ext.moqe.options import TrainOptions
from moe_ext.moqe.training.losses import balance_loss, choice_loss, fit_static_weights
from moe_ext.moqe.training.router_training import RouterTraining, reading_order, train_router
from moe_ext.moqe.training.rows import Row, collate_rows
from moe_ext.moqe.training.state_cache import StateCache, batches_of_states, collate_states
from moe_ext.moqe.training.train import losses_behind_prefix


@pytest.fixture
def experts(expert_folders):
    return load_experts(expert_folders[:2])


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 5, 12, 7, 12, 6, 8, 11]
    return [
        Row([0, *torch.randint(2, 4000, (n,), generator=generator).tolist()], n, "own", k)
        for k, n in enumerate(lengths)
    ]


@pytest.fixture
def cache(experts, rows, tmp_path):
    made = StateCache(tmp_path / "outputs", experts, rows, max_bytes=1e9)
    made.fill()
    return made


def command_line(tiny_sources, expert_folders, out, **changed):
    chosen = {
        "data_dir": tiny_sources,
        "save_dir": out,
        "row_length": 16,
        "batch_size": 4,
        "max_tokens": 400,
        "validation_tokens": 40,
        "rank": 4,
        "learning_rate": 0.01,
        "save_steps": 2,
        **changed,
    }
    words = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    return ["--train", "--expert_paths", *map(str, expert_folders[:2]), *words]


def result(out):
    return load_file(out / "moqe" / "router.safetensors")


# The cache


def test_the_cache_holds_what_the_experts_compute(cache, experts, rows):
    for number, row in enumerate(rows):
        expected = experts.states(torch.tensor([row.tokens]), torch.ones(1, len(row.tokens), dtype=torch.long))
        for kept, computed in zip(cache.states(number), expected, strict=True):
            torch.testing.assert_close(kept, computed[0])


def test_an_expert_is_judged_by_every_token_behind_the_prefix(cache, experts, rows):
    prefix = 4
    found = losses_behind_prefix(cache, prefix, batch_size=3)
    for number, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        for expert, states in enumerate(cache.states(number)):
            chances = experts.logits_of(expert, states).float().log_softmax(dim=-1)
            expected = -sum(chances[place - 1, tokens[place]] for place in range(prefix, len(tokens)))
            torch.testing.assert_close(found[number, expert], expected)


def test_what_does_not_fit_is_computed_again(experts, rows, cache, tmp_path, caplog):
    small = StateCache(tmp_path / "small", experts, rows, max_bytes=30 * 2 * 32 * 4)
    small.fill()
    assert 0 < len(small.order) < len(rows)
    assert sum(file.stat().st_size for file in (tmp_path / "small").glob("*.states")) <= 30 * 2 * 32 * 4
    assert "do not fit" in caplog.text
    for number in range(len(rows)):
        for kept, other in zip(small.states(number), cache.states(number), strict=True):
            torch.testing.assert_close(kept, other)


def test_a_cache_that_was_broken_off_goes_on(experts, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.moqe.training.state_cache.ROWS_AT_ONCE", 3)
    broken, computed = StateCache(tmp_path / "outputs", experts, rows, max_bytes=1e9), []
    compute = broken._compute

    def stop_at_the_third(some, number=None):
        computed.append(list(some))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(some, number)

    monkeypatch.setattr(broken, "_compute", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        broken.fill()
    again, later = StateCache(tmp_path / "outputs", experts, rows, max_bytes=1e9), []
    compute_again = again._compute
    monkeypatch.setattr(again, "_compute", lambda some, number=None: later.append(some) or compute_again(some, number))
    again.fill()
    assert later[0] == computed[2]  # the first expert's third batch; the first two are kept
    whole = StateCache(tmp_path / "whole", experts, rows, max_bytes=1e9)
    whole.fill()
    for file, other in zip(again.files, whole.files, strict=True):
        assert np.array_equal(file, other)


# Losses


def test_accumulated_batches_weigh_every_token_alike(experts, cache):
    torch.manual_seed(0)
    router = Router(RouterConfig(rank=4, balance=0.0), input_size=32, num_experts=2)
    torch.nn.init.normal_(router.score.weight)
    training = RouterTraining(router, experts)
    gradients = []
    for parts in ([range(8)], [range(3), range(3, 8)]):
        batches = [collate_states(cache, list(part)) for part in parts]
        num_items = sum(int((batch["labels"] != -100).sum()) for batch, _ in batches)
        for batch, states in batches:
            training(**batch, states=states, num_items_in_batch=num_items)["loss"].backward()
        gradients.append(router.score.weight.grad.clone())
        router.zero_grad()
    torch.testing.assert_close(*gradients)


def test_the_trainer_accumulates_to_the_same_steps(experts, cache, tmp_path):
    found = []
    for size, accumulated in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        router = Router(RouterConfig(rank=4), input_size=32, num_experts=2)
        options = TrainOptions(
            data_dir="prose",
            expert_paths=["a", "b"],
            save_dir="x",
            batch_size=size,
            gradient_accumulation_steps=accumulated,
        )
        steps = train_router(
            RouterTraining(router, experts),
            [*range(8), *range(8)],
            lambda rows: (lambda batch, states: {**batch, "states": states})(*collate_states(cache, rows)),
            options,
            tmp_path / f"run-{size}",
            run={},
        )
        assert steps == 4
        found.append(router.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-5, rtol=1e-4)


def test_balance_is_nothing_for_equal_use_and_most_for_one_expert():
    assert balance_loss(torch.full((4, 3), 1 / 3)).item() == pytest.approx(0.0, abs=1e-6)
    assert balance_loss(torch.eye(3)[[1, 1]]).item() == pytest.approx(2.0)


def test_the_balance_term_changes_the_loss_and_is_off_by_default(experts, cache):
    batch, states = collate_states(cache, [0, 1])
    losses = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        router = Router(RouterConfig(rank=4, balance=weight), input_size=32, num_experts=2)
        torch.nn.init.normal_(router.score.weight, std=3.0)
        losses[weight] = RouterTraining(router, experts)(**batch, states=states)["loss"].item()
    assert losses[1.0] > losses[0.0] + 1e-3
    assert RouterConfig().balance == 0.0


def test_choosing_one_expert_still_gives_every_score_a_gradient():
    scores = torch.zeros(1, 4, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0]])
    loss = choice_loss(scores, torch.tensor([[6.0, 3.0, 4.5]]), mask, prefix_length=2)
    assert loss.item() == pytest.approx(2 * np.log(3))  # of two predicted tokens, from equal scores
    loss.backward()
    assert (scores.grad[0, :2, 1] < 0).all()  # towards the expert that costs least
    assert (scores.grad[0, :2, 0] > 0).all()
    assert (scores.grad[0, 2:] == 0).all()


def test_a_router_that_was_sure_of_the_wrong_expert_still_learns():
    scores = torch.tensor([[[30.0, 0.0, 0.0]]], requires_grad=True)
    choice_loss(scores, torch.tensor([[9.0, 3.0, 9.0]]), torch.ones(1, 2), prefix_length=1).backward()
    assert scores.grad[0, 0, 1] < -0.9


def test_the_static_weights_are_better_than_equal_ones(experts, cache):
    whole = list(batches_of_states(cache, list(range(8)), 8))
    fitted = fit_static_weights(experts, whole * 40)
    assert sum(fitted) == pytest.approx(1.0)

    def loss(weights):
        batch, states = whole[0]
        logits = sum(w * experts.logits_of(e, s) for e, (w, s) in enumerate(zip(weights, states, strict=True)))
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"]).item()

    grid = [loss([share, 1 - share]) for share in np.linspace(0, 1, 21)]
    assert loss(fitted) <= min(grid) + 1e-4  # convex in the weights: the best of a grid is the best there is


# The order, the schedule


def test_the_smaller_set_comes_first_and_every_pass_is_shuffled_anew():
    order = reading_order(3, 5, small_epochs=2, epochs=1.4, seed=0)
    assert [sorted(order[:3]), sorted(order[3:6]), sorted(order[6:11])] == [[0, 1, 2], [0, 1, 2], [3, 4, 5, 6, 7]]
    assert len(order) == 13
    assert order != reading_order(3, 5, small_epochs=2, epochs=1.4, seed=1)


def test_a_run_that_is_broken_off_ends_with_the_same_bits(tiny_sources, expert_folders, tmp_path):
    changed = {"noise": 0.3, "temperature_start": 2.0, "gradient_accumulation_steps": 2, "logging_steps": 1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command_line(tiny_sources, expert_folders, whole, **changed)) == 0
    kept = sorted((whole / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(kept) == 2
    # As a run leaves it that was killed behind its last checkpoint but one.
    (broken / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "run.json", broken / "run.json")
    shutil.copytree(kept[0], broken / "checkpoints" / kept[0].name)
    assert main(command_line(tiny_sources, expert_folders, broken, **changed)) == 0
    for name, tensor in result(whole).items():
        assert torch.equal(tensor, result(broken)[name]), name
    # The same from a checkpoint that is named.
    named = tmp_path / "named"
    options = {**changed, "checkpoint_path": kept[0]}
    assert main(command_line(tiny_sources, expert_folders, named, **options)) == 0
    assert all(torch.equal(tensor, result(named)[name]) for name, tensor in result(whole).items())
    state = json.loads((kept[1] / "trainer_state.json").read_text())
    rates = [line["learning_rate"] for line in state["log_history"] if "learning_rate" in line]
    # The schedule counts optimiser steps, not batches: at the last it is nearly through.
    assert len(rates) == state["global_step"] == state["max_steps"]
    assert max(rates) == pytest.approx(0.01, rel=0.05) and rates[-1] < 0.15 * max(rates)


def test_a_cut_off_checkpoint_is_not_gone_on_from(tiny_sources, expert_folders, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert main(command_line(tiny_sources, expert_folders, whole)) == 0
    newest = max((whole / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / "optimizer.pt").unlink()
    said = refused(command_line(tiny_sources, expert_folders, tmp_path / "other", checkpoint_path=newest), capsys)
    assert "no whole checkpoint" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": "sequence", "prefix_length": 4},
        {"optimizer": "adamw_8bit"},
        {"gradient_checkpointing": "true"},
        {"top_k": 1},
        {"cache_gb": 0.00001},
    ],
)
def test_every_way_of_training_changes_the_router(tiny_sources, expert_folders, tmp_path, changed):
    assert main(command_line(tiny_sources, expert_folders, tmp_path / "out", max_tokens=150, **changed)) == 0
    assert result(tmp_path / "out")["score.weight"].abs().max() > 0


def test_a_curriculum_is_read_before_the_rest(tiny_sources, expert_folders, tmp_path):
    small = tmp_path / "small.jsonl"
    small.write_text("\n".join(json.dumps({"text": f"small text {n}"}) for n in range(20)))
    line = command_line(tiny_sources, expert_folders, tmp_path / "out", curriculum=small, curriculum_epochs=2)
    assert main(line) == 0
    noted = json.loads((tmp_path / "out" / "moqe" / "moqe.json").read_text())["training"]
    assert noted["curriculum"] == str(small)


def test_rows_of_one_batch_are_padded_on_the_right():
    batch = collate_rows([Row([0, 5], 1, "own", 0), Row([0, 5, 6], 2, "own", 1)], pad=1)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
