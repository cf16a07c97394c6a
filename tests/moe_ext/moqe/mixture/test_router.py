import pytest
import torch

from moe_common.models.base_model import load_base_model
from moe_ext.moqe.mixture import router as router_module
from moe_ext.moqe.mixture.router import Router, RouterConfig


def make_router(**changed):
    torch.manual_seed(0)
    router = Router(RouterConfig(rank=8, num_layers=2, **changed), input_size=6, num_experts=3).eval()
    torch.nn.init.normal_(router.score.weight)
    return router


@pytest.fixture
def embedding():
    return torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))


def scores_after_an_edit(router, embedding, place):
    edited = embedding.clone()
    edited[:, place] = edited[:, place].flip(-1)  # adding a number to all would be normalised away
    mask = torch.ones(embedding.shape[:2], dtype=torch.long)
    with torch.no_grad():
        return router(embedding, mask), router(edited, mask)


@pytest.mark.parametrize("place", [1, 5, 8])
def test_editing_a_later_token_changes_no_earlier_decision(embedding, place):
    before, after = scores_after_an_edit(make_router(), embedding, place)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.allclose(before[:, place:], after[:, place:])


def test_without_the_mask_earlier_decisions_would_change(embedding, monkeypatch):
    def no_mask(attention_mask, num_heads):
        batch, length = attention_mask.shape
        return torch.zeros(batch, num_heads, length, length)

    monkeypatch.setattr(router_module, "attention_bias", no_mask)
    before, after = scores_after_an_edit(make_router(), embedding, 5)
    assert not torch.allclose(before[:, :5], after[:, :5])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(embedding, side):
    router = make_router()
    padding, mask = torch.full((2, 4, 6), 7.0), torch.ones(2, 9, dtype=torch.long)
    none = torch.zeros(2, 4, dtype=torch.long)
    parts, masks = ([padding, embedding], [none, mask]) if side == "left" else ([embedding, padding], [mask, none])
    with torch.no_grad():
        alone = router(embedding, mask)
        padded = router(torch.cat(parts, 1), torch.cat(masks, 1))
    kept = padded[:, 4:] if side == "left" else padded[:, :9]
    torch.testing.assert_close(kept, alone)
    assert torch.isfinite(padded).all()


def scores_written_out(router, embedding):
    """The router one row, token and head at a time."""

    def norm(module, vector):
        centred = vector - vector.mean()
        normed = centred / (centred.square().mean() + module.eps).sqrt()
        return normed if module.weight is None else normed * module.weight + module.bias

    def look_back(layer, hidden, head):
        size = hidden.shape[1] // layer.num_heads
        own = slice(head * size, (head + 1) * size)
        joined = [layer.query_key_value(norm(layer.attention_norm, vector)).chunk(3) for vector in hidden]
        found = []
        for place in range(len(hidden)):
            slope = 2.0 ** (-8.0 * (head + 1) / layer.num_heads)
            likeness = [
                joined[place][0][own] @ joined[before][1][own] / size**0.5 - slope * (place - before)
                for before in range(place + 1)
            ]
            shares = torch.stack(likeness).softmax(0)
            found.append(sum(share * joined[before][2][own] for before, share in enumerate(shares)))
        return torch.stack(found)

    rows = []
    for row in embedding:
        hidden = torch.stack([router.down(norm(router.norm, vector)) for vector in row])
        for layer in router.encoder.layers:
            seen = torch.cat([look_back(layer, hidden, head) for head in range(layer.num_heads)], dim=1)
            hidden = hidden + layer.output(seen)
            inner = [layer.up(norm(layer.forward_norm, vector)) for vector in hidden]
            hidden = hidden + torch.stack([layer.down(torch.nn.functional.gelu(vector)) for vector in inner])
        rows.append(torch.stack([router.score(norm(router.encoder.norm, vector)) for vector in hidden]))
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_the_scores_are_those_written_out_in_training_and_in_use(embedding, training, with_gradients):
    router = make_router().train(training)
    expected = scores_written_out(router, embedding)
    with torch.set_grad_enabled(with_gradients):
        found = router(embedding, torch.ones(2, 9, dtype=torch.long))
    torch.testing.assert_close(found, expected.detach() if not with_gradients else expected)


def test_a_new_router_mixes_all_experts_alike(embedding):
    router = Router(RouterConfig(), input_size=6, num_experts=3)
    weights = router.weights(router(embedding, torch.ones(2, 9, dtype=torch.long)))
    torch.testing.assert_close(weights, torch.full((2, 9, 3), 1 / 3))


def test_top_k_keeps_the_highest_and_they_sum_to_one():
    weights = make_router(top_k=2).weights(torch.tensor([[3.0, 1.0, 2.0]]))
    kept = torch.tensor([3.0, 2.0]).softmax(0)
    torch.testing.assert_close(weights, torch.tensor([[kept[0], 0.0, kept[1]]]))


def test_the_highest_alone_still_lets_every_score_learn():
    router = make_router(top_k=1).train()
    scores = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    weights = router.weights(scores)
    torch.testing.assert_close(weights.detach(), torch.tensor([[1.0, 0.0, 0.0]]))
    (weights * torch.tensor([5.0, 1.0, 2.0])).sum().backward()
    assert (scores.grad.abs() > 0).all()


def test_top_k_of_all_experts_is_dense():
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    torch.testing.assert_close(make_router(top_k=3).weights(scores), make_router().weights(scores))


def test_a_lower_temperature_decides_more_sharply():
    scores = torch.tensor([[1.0, 0.0, 0.0]])
    assert make_router(temperature=0.1).weights(scores)[0, 0] > make_router().weights(scores)[0, 0] + 0.3


def test_noise_is_for_training_alone(embedding):
    router, mask = make_router(noise=1.0), torch.ones(2, 9, dtype=torch.long)
    assert torch.equal(router(embedding, mask), router(embedding, mask))
    router.train()
    assert not torch.equal(router(embedding, mask), router(embedding, mask))


def test_the_choice_is_that_of_the_last_token_of_the_prefix():
    router = make_router(mode="sequence", prefix_length=3)
    scores = torch.zeros(3, 6, 3)
    scores[0, 2, 1] = scores[1, 4, 2] = scores[2, 1, 1] = 1.0
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    # The second row begins behind two places of padding; the third is shorter than the prefix.
    assert router.choice(scores, mask).tolist() == [1, 2, 1]


def test_recomputing_gives_the_same_gradients(embedding):
    mask, gradients = torch.ones(2, 9, dtype=torch.long), []
    for recomputed in (False, True):
        router = make_router().train()
        router.gradient_checkpointing = recomputed
        router(embedding, mask).square().sum().backward()
        gradients.append([parameter.grad for parameter in router.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_the_default_router_is_far_smaller_than_one_percent_of_the_base():
    base, _ = load_base_model()
    router = Router(RouterConfig(), input_size=base.config.hidden_size, num_experts=4)
    share = sum(p.numel() for p in router.parameters()) / sum(p.numel() for p in base.parameters())
    assert share < 0.002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, r"rank.*\b9\b.*num_heads"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"prefix_length": 0}, "prefix_length is 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**options)


def test_more_experts_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match=r"top_k.*\b4\b.*\b3 experts"):
        Router(RouterConfig(top_k=4), input_size=6, num_experts=3)
