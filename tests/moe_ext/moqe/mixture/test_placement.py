import pytest
from accelerate import init_empty_weights
from accelerate.utils import compute_module_sizes
from tiny_models import tiny_model

from moe_ext.moqe.mixture.placement import plan_placement


def model_of(num_layers):
    with init_empty_weights():
        return tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers)


SMALL, LARGE = model_of(1), model_of(8)
SMALL_BYTES, LARGE_BYTES = (compute_module_sizes(model)[""] for model in (SMALL, LARGE))


def test_a_small_expert_goes_to_the_freest_device():
    assert plan_placement([SMALL], {0: 2 * SMALL_BYTES, 1: 3 * SMALL_BYTES, "cpu": 9 * SMALL_BYTES}) == [{"": 1}]


def test_what_is_placed_takes_its_room():
    room = int(1.5 * SMALL_BYTES)
    maps = plan_placement([SMALL, SMALL], {0: room, 1: room})
    assert sorted(place[""] for place in maps) == [0, 1]


def test_the_large_expert_is_split_and_the_small_one_is_not():
    maps = plan_placement([SMALL, LARGE], {0: LARGE_BYTES, 1: int(0.8 * LARGE_BYTES), 2: int(0.8 * LARGE_BYTES)})
    assert maps[1] == {"": 0}
    tight = int(0.7 * LARGE_BYTES)
    small, large = plan_placement([SMALL, LARGE], {0: tight, 1: tight})
    assert set(large.values()) == {0, 1}
    assert len(small) == 1
    # No decoder block is cut in two.
    assert all(name.count(".") <= 2 for name in large)


def test_the_cpu_takes_what_nothing_else_has_room_for():
    assert plan_placement([LARGE], {0: SMALL_BYTES, "cpu": 2 * LARGE_BYTES}) == [{"": "cpu"}]


def test_experts_that_do_not_fit_are_refused_with_their_size():
    with pytest.raises(ValueError, match=r"Expert 1\b.*GiB.*free"):
        plan_placement([LARGE], {0: SMALL_BYTES, "cpu": SMALL_BYTES})
