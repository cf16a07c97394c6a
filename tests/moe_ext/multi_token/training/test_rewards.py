import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.multi_token.training.rewards import RewardWeights, common_subsequence, reward_parts

TOKENS = st.lists(st.integers(0, 3), max_size=7)


def every_subsequence(tokens):
    return {pick for size in range(len(tokens) + 1) for pick in itertools.combinations(tokens, size)}


@given(first=TOKENS, second=TOKENS)
def test_the_common_subsequence_is_the_longest_of_all(first, second):
    both = every_subsequence(first) & every_subsequence(second)
    assert common_subsequence(first, second) == max(map(len, both))


def parts(written, reference, num_passes=1):
    return reward_parts(written, reference, num_passes=num_passes, num_heads=3, end_ids=[9])


def test_the_right_answer_in_one_pass_gets_everything():
    assert parts([1, 2, 3, 9], [1, 2, 3, 9]) == {"accuracy": 1.0, "order": 1.0, "efficiency": 1.0, "stop": 1.0}


def test_the_right_tokens_in_a_wrong_order_lose_order_alone():
    found = parts([3, 2, 1, 9], [1, 2, 3, 9])
    assert found["accuracy"] == 1.0
    assert found["order"] == 0.5


def test_a_token_a_pass_is_not_efficient():
    assert parts([1, 2, 3, 9], [1, 2, 3, 9], num_passes=4)["efficiency"] == 0.0


def test_an_answer_that_does_not_end_is_no_clean_stop():
    assert parts([1, 2, 3], [1, 2, 3, 9])["stop"] == 0.0


def test_saying_more_than_the_answer_costs_accuracy():
    assert parts([1, 2, 3, 1, 1, 9], [1, 2, 3, 9])["accuracy"] == pytest.approx(0.8)


@given(written=TOKENS, reference=TOKENS)
def test_accuracy_and_order_lie_between_nothing_and_all(written, reference):
    found = parts(written, reference)
    assert 0 <= found["accuracy"] <= 1
    assert 0 <= found["order"] <= 1


def test_each_weight_counts_for_its_part():
    held = {"accuracy": 0.1, "order": 0.2, "efficiency": 0.3, "stop": 0.4}
    weights = RewardWeights(accuracy=1, order=10, efficiency=100, stop=1000)
    assert weights.total(held) == pytest.approx(0.1 + 2 + 30 + 400)
