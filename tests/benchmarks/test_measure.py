import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import Ratio, check_gradients, check_logits, count_flops, measure, ratio
from benchmarks.memory import highest_sum, peak_bytes, saved_bytes


def test_the_ratio_is_taken_in_each_round():
    found = ratio([2.0, 40.0, 6.0, 8.0, 10.0], [1.0, 10.0, 1.0, 1.0, 1.0])  # 2, 4, 6, 8, 10
    assert found == Ratio(median=6.0, low=4.0, high=8.0)
    assert str(found) == "6.00 (4.00-8.00)"


def test_a_linear_layer_costs_two_operations_a_weight_and_token_and_twice_that_backward():
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.randn(5, 8, requires_grad=True)
    forward = 2 * 5 * 8 * 16
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * forward


def test_attention_on_a_cpu_is_counted():
    q, k, v = (torch.randn(1, 2, 10, 4) for _ in range(3))
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v)) == 2 * (2 * 2 * 10 * 10 * 4)
    q.requires_grad_(True)
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v).sum().backward()) > 3 * (2 * 2 * 2 * 10 * 10 * 4)


def test_every_action_has_a_row_with_its_rounds():
    layer, x = torch.nn.Linear(8, 16), torch.randn(5, 8)
    rows = measure({"a": lambda: layer(x), "b": lambda: None}, rounds=4)
    assert [row["way"] for row in rows] == ["a", "b"]
    assert [len(row["seconds"]) for row in rows] == [4, 4]
    assert [row["flops"] for row in rows] == [2 * 5 * 8 * 16, 0]


def test_a_missing_or_infinite_gradient_is_refused():
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError, match=r"\b2\b.*gradient.*\(3, 2"):
        check_gradients(layer)
    layer(torch.ones(1, 2)).sum().backward()
    check_gradients(layer)
    layer.bias.grad[0] = torch.inf
    with pytest.raises(RuntimeError, match=r"\b1\b.*gradient"):
        check_gradients(layer)


def test_logits_that_are_not_finite_or_of_another_shape_are_refused():
    ids = torch.zeros(1, 2, dtype=torch.long)
    check_logits(torch.zeros(1, 2, 5), ids, 5)
    for wrong in (torch.zeros(1, 3, 5), torch.full((1, 2, 5), torch.nan)):
        with pytest.raises(RuntimeError, match=r"logits.*\(1, 2, 5\)"):
            check_logits(wrong, ids, 5)


def test_the_highest_sum_is_that_of_the_level_and_not_of_what_was_taken():
    assert highest_sum([5, 3, -5, 4, -7]) == 8
    assert highest_sum([]) == 0


def test_the_peak_of_known_tensors_is_what_lives_at_once():
    def action():
        first = torch.zeros(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB live
        del first
        third = second + 1  # 8 MB live: 12 MB were taken in all
        return third

    assert 8_000_000 <= peak_bytes(action, "cpu") < 8_100_000


def test_memory_inside_an_operator_is_seen():
    x = torch.randn(500, 500)  # a 1 MB result; the softmax of a transposed input makes a contiguous copy first
    assert peak_bytes(lambda: torch.cat([x, x]).t().contiguous().sum(), "cpu") >= 4_000_000


def test_what_is_kept_for_backward_counts_each_storage_once_and_no_parameter():
    layer = torch.nn.Linear(10, 20)
    x = torch.randn(7, 10)

    def action():
        y = layer(x)  # keeps x
        return (y * y).sum()  # keeps y, twice

    assert saved_bytes(action, layer.parameters()) == 4 * (7 * 10 + 7 * 20)
    assert saved_bytes(action, []) == 4 * (7 * 10 + 7 * 20)


@pytest.mark.gpu
def test_the_peak_on_cuda_is_the_allocators():
    taken = peak_bytes(lambda: torch.zeros(1000, 1000, device="cuda"), "cuda")
    assert 4_000_000 <= taken < 8_000_000
