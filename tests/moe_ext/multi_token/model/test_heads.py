import pytest
import torch
from multi_token_testing import make_backbone
from torch.nn.functional import silu

from moe_ext.multi_token.model.heads import TokenHeads
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE
from moe_ext.multi_token.model.router import CopyRouter, HeadRouter, gates_of


def random_heads(kind="sequential"):
    torch.manual_seed(0)
    heads = TokenHeads(3, 8, 16, kind)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return heads


def norm(x, weight):
    return x / (x.pow(2).mean() + 1e-6).sqrt() * weight


def written_out(heads, place, state, token):
    """A head, one position at a time, from its weights."""
    block = heads.blocks[place]
    rows = []
    for one_state, one_token in zip(state, token, strict=True):
        read = norm(one_state, block.state_norm.weight)
        if block.token_norm is not None:
            read = torch.cat([read, norm(one_token, block.token_norm.weight)])
        inner = silu(block.up.weight @ read + block.up.bias)
        rows.append(one_state + block.down.weight @ inner)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_a_head_is_its_formula_at_each_position(kind):
    heads = random_heads(kind)
    first, state, token = torch.randn(3, 5, 8).unbind(0)
    starts = state if kind == "sequential" else first
    for place in range(3):
        torch.testing.assert_close(
            heads.step(place, first, state, token), written_out(heads, place, starts, token), rtol=1e-5, atol=1e-5
        )


def test_an_independent_head_reads_neither_draft_nor_state_of_another():
    heads = random_heads("independent")
    first = torch.randn(2, 8)
    one = heads.step(1, first, torch.randn(2, 8), torch.randn(2, 8))
    assert torch.equal(one, heads.step(1, first, torch.randn(2, 8), torch.randn(2, 8)))


def test_a_sequential_head_reads_the_draft():
    heads = random_heads()
    first, state = torch.randn(2, 2, 8)
    assert not torch.equal(
        heads.step(1, first, state, torch.randn(2, 8)), heads.step(1, first, state, torch.randn(2, 8))
    )


def test_training_starts_from_the_backbones_own_prediction():
    backbone = make_backbone()
    model = MultiTokenMoE(backbone, MultiTokenConfig(num_heads=3))
    tokens = torch.randint(3, 40, (2, 7))
    own = backbone(tokens).logits
    mask = torch.ones_like(tokens)
    first, _ = model.first_states(model.states(tokens, mask), torch.nn.functional.pad(tokens, (0, 1)), mask)
    state = first
    for place in range(3):
        state = model.heads.step(place, first, state, model.embed(tokens))
        logits = model.heads.logits(place, state, model.lm_head)
        torch.testing.assert_close(logits[..., :-1], own)
        assert (logits.argmax(dim=-1) == own.argmax(dim=-1)).all()  # none is OFF


def test_gates_are_chances_that_all_heads_so_far_are_right():
    logits = torch.randn(4, 3)
    chance = torch.sigmoid(logits)
    expected = torch.stack([chance[:, 0], chance[:, 0] * chance[:, 1], chance.prod(dim=1)], dim=1)
    torch.testing.assert_close(gates_of(logits), expected)


def test_the_router_has_three_layers_and_a_logit_for_each_head():
    router = HeadRouter(8, 8, 5)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in router.layers) == 3
    assert router(torch.randn(2, 6, 8)).shape == (2, 6, 5)


def test_the_copy_router_begins_with_what_was_counted():
    router = CopyRouter(8, 8, 2)
    matched = torch.tensor([1, 1, 1, 1, 20, 20])
    right = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 0], [1, 1], [1, 1]]).bool()
    judged = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0], [1, 1], [1, 1]]).bool()
    router.count(matched, right, judged)
    chance = torch.sigmoid(router(torch.randn(3, 8), torch.tensor([1, 20, 2])))
    # (right + 1) / (judged + 2), whatever the state; one half where nothing was counted.
    torch.testing.assert_close(chance, torch.tensor([[3 / 6, 2 / 4], [3 / 4, 3 / 4], [1 / 2, 1 / 2]]))
