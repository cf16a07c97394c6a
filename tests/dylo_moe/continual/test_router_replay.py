"""Replay for the router: the fit against plain gradient descent, what it leaves alone, what is kept on disk."""

import pytest
import torch
from tiny_models import tiny_mixture, tokens

from dylo_moe.continual.router_replay import RouterReplay, _fit, refit_router


def skilled(num_experts=3, **arguments):
    """A mixture that knows a skill for each expert, and blocks of each: skills differ in the tokens they use."""
    model = tiny_mixture(num_experts, **arguments)
    replay = RouterReplay()
    for number, name in enumerate(model.experts.get_all_adapter_names()):
        model.skills.add(f"skill {number}", torch.rand(1, 32), expert=name)
        replay.keep(f"skill {number}", 3 + 20 * number + tokens(6, 12, seed=number) % 20)
    return model, replay


@torch.no_grad()
def share_sent_home(model, replay) -> float:
    """The mean weight that each skill's tokens give their own expert."""
    shares = []
    for column, ids in enumerate(replay.blocks.values()):
        model.eval()(ids.long())
        shares.append(model.last_routing_weights[..., column].mean())
    return torch.stack(shares).mean().item()


@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_replayed_tokens_go_to_the_experts_of_their_skills(scope):
    model, replay = skilled(router_scope=scope)
    assert share_sent_home(model, replay) < 0.5
    share = refit_router(model, replay, weight_decay=1e-3)
    assert share > 0.9
    assert share_sent_home(model, replay) > 0.85


def test_only_the_gates_change():
    model, replay = skilled()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    refit_router(model, replay, weight_decay=1e-3)
    assert model.training
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "moe_router" in name}


def test_a_new_expert_leaves_the_tokens_of_the_old_skills_where_they_were():
    model, replay = skilled(2)
    refit_router(model, replay, weight_decay=1e-3)
    home = share_sent_home(model, replay)
    model.skills.add("skill 2", torch.rand(1, 32), expert=model.experts.create_expert())
    replay.keep("skill 2", 43 + tokens(6, 12, seed=9) % 20)
    refit_router(model, replay, weight_decay=1e-3)
    for column in (0, 1):
        with torch.no_grad():
            model(replay.blocks[f"skill {column}"].long())
        assert model.last_routing_weights[..., 2].mean() < 0.15
    assert share_sent_home(model, replay) > home - 0.1


def test_the_order_in_which_skills_came_does_not_matter():
    weights = []
    for order in ([0, 1, 2], [2, 0, 1]):
        model, replay = skilled()
        replay.blocks = {f"skill {i}": replay.blocks[f"skill {i}"] for i in order}
        refit_router(model, replay, weight_decay=1e-3)
        weights.append(torch.cat([gate.weight for gate in model.router.attached.gates.values()]))
    # both stop near the one optimum; float32 sums in another order
    torch.testing.assert_close(*weights, rtol=0.05, atol=0.05)


def test_the_fit_is_the_regression_that_plain_gradient_descent_finds():
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    gate = torch.nn.Linear(5, 3, bias=False)
    slow = gate.weight.detach().clone().double().requires_grad_()
    right = _fit(gate, x, targets, temperature=2.0, weight_decay=0.01)
    for _ in range(4000):
        p = torch.softmax(x.double() @ slow.T / 2.0, dim=-1)
        loss = -p[torch.arange(60), targets].log().mean() + 0.01 * slow.square().sum()
        (gradient,) = torch.autograd.grad(loss, slow)
        slow = (slow - 0.5 * gradient).detach().requires_grad_()
    torch.testing.assert_close(gate.weight.double(), slow, rtol=0, atol=5e-3)
    assert right == ((x @ slow.float().T).argmax(-1) == targets).float().mean().item()


def test_more_weight_decay_leaves_the_router_less_sure():
    sure = []
    for weight_decay in (1e-3, 0.1, 1.0):
        model, replay = skilled()
        refit_router(model, replay, weight_decay=weight_decay)
        sure.append(share_sent_home(model, replay))
    assert sure == sorted(sure, reverse=True) and sure[0] > sure[-1] + 0.1


def test_one_expert_needs_no_fit():
    model, replay = skilled(1)
    before = [p.clone() for p in model.router.attached.parameters()]
    assert refit_router(model, replay, weight_decay=1e-3) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.router.attached.parameters(), strict=True))


def test_what_is_kept_comes_back_from_disk_and_its_bytes_are_counted(tmp_path):
    replay = RouterReplay()
    replay.keep("rain/file.txt", tokens(4, 8))
    replay.keep("rain/file.txt", tokens(2, 8))  # in place of the first
    replay.save(tmp_path)
    loaded = RouterReplay.load(tmp_path)
    assert list(loaded.blocks) == ["rain/file.txt"]
    assert torch.equal(loaded.blocks["rain/file.txt"].long(), tokens(2, 8))
    assert loaded.num_bytes == 2 * 8 * 4


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"replay\.safetensors.*damaged"):
        RouterReplay.load(tmp_path)
    (tmp_path / "replay.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"replay\.safetensors.*damaged"):
        RouterReplay.load(tmp_path)


def test_a_skill_without_blocks_or_without_its_expert_is_refused():
    model, replay = skilled()
    with pytest.raises(ValueError, match=r"'rain'.*\[0, 8\]"):
        replay.keep("rain", tokens(0, 8))
    model.experts.remove_expert("expert_1")
    with pytest.raises(ValueError, match="'skill 1'.*'expert_1'.*expert_0, expert_2"):
        refit_router(model, replay, weight_decay=1e-3)
