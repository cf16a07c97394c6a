import itertools

import pytest
import torch
from multi_token_testing import make_model
from tiny_models import tiny_model

from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE
from moe_ext.multi_token.training.data import Task
from moe_ext.multi_token.training.policy import SILENT, Windows, act, divergence, judge
from moe_ext.multi_token.training.ppo import PPOSettings, advantages, play, ppo_losses, train_ppo

CLASSES = 6
END = 1


def tiny_heads(num_heads: int = 2, **settings) -> MultiTokenMoE:
    backbone = tiny_model(
        vocab_size=CLASSES,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=END,
        bos_token_id=0,
        pad_token_id=None,
        initializer_range=0.5,
    )
    return MultiTokenMoE(backbone, MultiTokenConfig(num_heads=num_heads, **settings))


def own_tokens(model, prompt, count):
    tokens = torch.tensor([prompt])
    written = model.backbone.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return written[0, len(prompt) :].tolist()


def one_task(model) -> Task:
    """An answer that opens as the backbone would and goes on with two tokens that it would not write."""
    prompt = [3, 2, 4]
    first, second = own_tokens(model, prompt, 2)
    assert first != END
    other = next(token for token in (2, 3, 4, 5) if token not in (first, second))
    return Task(prompt, [first, other, END])


@pytest.mark.timeout(120)
def test_the_best_policy_of_a_known_problem_is_found(tmp_path):
    """One question; its answer takes one pass when both heads speak, say the right token, and end the text."""
    model = tiny_heads()
    task = one_task(model)
    settings = PPOSettings(steps=120, episodes=16, lr=1e-2, w_kl=0.0, longest=6, save_steps=1000)
    before = play(model, task, settings, greedy=True)
    train_ppo(model, [task], settings, tmp_path)
    after = play(model, task, settings, greedy=True)
    assert before.written != task.reference
    assert after.written == task.reference
    assert after.parts == {"accuracy": 1.0, "order": 1.0, "efficiency": 1.0, "stop": 1.0}


def test_a_large_weight_on_the_divergence_keeps_the_policy_of_stage_2(tmp_path):
    moved = {}
    for weight in (0.0, 100.0):
        model = tiny_heads()
        task = one_task(model)
        settings = PPOSettings(steps=8, episodes=6, lr=1e-3, w_kl=weight, longest=6, save_steps=1000)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        train_ppo(model, [task], settings, tmp_path / str(weight))
        windows = play(model, task, settings).windows
        then = tiny_heads()
        then.load_state_dict(start)
        moved[weight] = float(divergence(judge(model, windows), judge(then, windows)).mean())
    assert moved[100.0] < 0.2 * moved[0.0]


def test_a_broken_run_ends_with_the_numbers_of_a_whole_one(tmp_path):
    settings = {"episodes": 4, "lr": 1e-3, "longest": 6, "save_steps": 3}
    whole = tiny_heads()
    task = one_task(whole)
    train_ppo(whole, [task], PPOSettings(steps=6, **settings), tmp_path / "whole")
    broken = tiny_heads()
    train_ppo(broken, [task], PPOSettings(steps=4, **settings), tmp_path / "broken")
    again = tiny_heads()
    train_ppo(again, [task], PPOSettings(steps=6, **settings), tmp_path / "broken")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_probabilities_of_all_that_can_happen_in_a_window_add_up_to_one():
    model = make_tiny_policy()
    state, first = torch.randn(1, 16), torch.tensor([3])
    every = [(SILENT, SILENT)]
    every += [(said, SILENT) for said in range(CLASSES + 1)]
    every += list(itertools.product(range(CLASSES), range(CLASSES + 1)))
    spoken = torch.tensor(every)
    windows = Windows(state.repeat(len(every), 1), first.repeat(len(every)), spoken)
    total = judge(model, windows).log_prob_N.exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_heads_with_a_vocabulary_of_their_own_say_nothing_beyond_it():
    model = make_tiny_policy(draft_vocabulary=2)
    model.draft_only(torch.tensor([2, 4]))
    state, first = torch.randn(1, 16), torch.tensor([3])
    torch.manual_seed(0)
    drawn = {tuple(act(model, state, first).spoken_NH[0].tolist()) for _ in range(200)}
    every = [(SILENT, SILENT), *((said, SILENT) for said in (2, 4, CLASSES))]
    every += itertools.product((2, 4), (2, 4, CLASSES))
    assert drawn <= set(every)
    windows = Windows(state.repeat(len(every), 1), first.repeat(len(every)), torch.tensor(every))
    torch.testing.assert_close(judge(model, windows).log_prob_N.exp().sum(), torch.tensor(1.0))


def test_what_is_drawn_has_the_probability_that_is_judged():
    model = make_tiny_policy()
    state, first = torch.randn(1, 16), torch.tensor([3])
    torch.manual_seed(0)
    drawn = [tuple(act(model, state, first).spoken_NH[0].tolist()) for _ in range(1500)]
    common = max(set(drawn), key=drawn.count)
    windows = Windows(state, first, torch.tensor([common]))
    expected = float(judge(model, windows).log_prob_N.exp())
    assert drawn.count(common) / len(drawn) == pytest.approx(expected, abs=4 * (expected / 1500) ** 0.5)


def test_a_policy_does_not_diverge_from_itself_and_does_from_another():
    model, other = make_tiny_policy(), make_tiny_policy(seed=5)
    windows = act(model, torch.randn(1, 16), torch.tensor([3]))
    own, theirs = judge(model, windows), judge(other, windows)
    assert float(divergence(own, own)) == pytest.approx(0.0, abs=1e-6)
    assert float(divergence(own, theirs)) > 0


def make_tiny_policy(seed: int = 1, **settings) -> MultiTokenMoE:
    model = tiny_heads(**settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for block in model.heads.blocks:
            block.off.bias.zero_()
    return model


def test_advantages_are_those_of_the_sum_written_out():
    value = torch.tensor([0.2, -0.1, 0.5])
    reward, trace = 1.5, 0.9
    deltas = [-0.1 - 0.2, 0.5 + 0.1, 1.5 - 0.5]
    expected = [
        deltas[0] + trace * deltas[1] + trace**2 * deltas[2],
        deltas[1] + trace * deltas[2],
        deltas[2],
    ]
    torch.testing.assert_close(advantages(value, reward, trace), torch.tensor(expected))


def test_a_ratio_beyond_the_clip_gives_no_gradient_in_the_direction_it_went():
    old = torch.zeros(3)
    new = torch.tensor([0.5, 0.5, 0.05], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0])
    losses = ppo_losses(
        log_prob_N=new,
        old_log_prob_N=old,
        advantage_N=advantage,
        value_N=torch.zeros(3),
        return_N=torch.ones(3),
        clip=0.2,
    )
    losses["policy"].backward()
    assert new.grad[0] == 0  # far enough already
    assert new.grad[1] > 0 and new.grad[2] < 0
    assert losses["value"] == 1
    assert float(losses["clipped"]) == pytest.approx(2 / 3)


def test_every_family_of_backbones_can_play(tmp_path):
    for family in ("gpt2", "llama"):
        model = make_model(family)
        episode = play(model, Task([3, 4], [5, 1]), PPOSettings(steps=1, longest=8))
        assert len(episode.written) >= 1
