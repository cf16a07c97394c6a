"""The plain loop of the checks against a plainer one: each token and each expert by itself."""

import pytest
import torch
from moe_oracles import EXPERTS, example, random_weights, token_loop

from dylo_moe.equivalence.loop import expert_update, weights_of_tokens


@pytest.mark.parametrize("kind", ["linear", "transformers Conv1D", "embedding", "scaled embedding"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 3)], ids=str)
def test_the_loop_over_experts_is_the_loop_over_tokens(kind, shape):
    layer, x = example(kind)
    weights = random_weights(*shape)
    update = expert_update(layer, x, weights, list(EXPERTS))
    expected = token_loop(layer, x, weights) - layer.base_layer(x)
    torch.testing.assert_close(update.value, expected, rtol=1e-12, atol=1e-12)  # float64, a dozen terms
    assert (update.magnitude >= update.value.abs() - 1e-12).all()


def test_experts_that_a_layer_lacks_are_skipped():
    layer, x = example("linear")
    weights = random_weights(3)
    alone = expert_update(layer, x, weights[1:2], ["two"]).value
    torch.testing.assert_close(expert_update(layer, x, weights[:2], ["ghost", "two"]).value, alone)
    assert not expert_update(layer, x, weights[:1], ["ghost"]).value.any()


def test_weights_of_sequences_are_repeated_where_a_model_flattens_its_tokens():
    weights = random_weights(2, 3)
    assert torch.equal(weights_of_tokens(weights, (6,)), weights[[0, 0, 0, 1, 1, 1]])
    assert torch.equal(weights_of_tokens(weights, (2, 3)), weights[[0, 0, 0, 1, 1, 1]])
