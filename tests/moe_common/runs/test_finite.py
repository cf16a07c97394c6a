"""Numbers that are lost stop a run, and are named."""

import pytest
import torch

from moe_common.runs.finite import NotFiniteError, check_loss, check_weights, first_not_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_lost_weight_is_named_with_its_step(value):
    weights = {
        "a": torch.ones(3),
        "b": torch.tensor([1.0, value]),
        "c": torch.tensor([NAN]),
        "ids": torch.ones(2).int(),
    }
    with pytest.raises(NotFiniteError, match="^b is not finite after step 7"):
        check_weights(weights.items(), 7)
    assert first_not_finite(weights.items()) == "b"


def test_large_weights_are_not_lost_ones():
    check_weights([("a", torch.tensor([1e38, 1e38])), ("b", torch.ones(2, dtype=torch.bfloat16))], 1)
    check_weights([], 1)


def test_a_lost_loss_names_the_weight_that_lost_it_where_there_is_one():
    check_loss(2.5, 1)
    with pytest.raises(NotFiniteError, match="loss of step 2 is nan: embedding is not finite"):
        check_loss(torch.tensor(NAN), 2, [("norm", torch.ones(2)), ("embedding", torch.tensor([NAN]))])
    with pytest.raises(NotFiniteError, match="loss of step 2 is inf: all weights are finite"):
        check_loss(INF, 2, [("norm", torch.ones(2))])
