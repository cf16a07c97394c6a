"""The layer that is broken is the one that is named, not those behind it."""

import pytest
from moe_testing import tiny_base
from peft.tuners.lora import moe_layer

from dylo_moe.equivalence.case import explicit_case, random_weights, routed_case
from dylo_moe.equivalence.first_difference import LayerDifference, first_difference, layer_differences
from dylo_moe.equivalence.models import open_model

BROKEN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_base("llama").save_pretrained(folder)
    return open_model(str(folder))


def break_a_layer(monkeypatch, name=BROKEN):
    right = moe_layer.routed_forward

    def wrong(layer, x, **kwargs):
        result = right(layer, x, **kwargs)
        return result + 1e-2 if layer.routing_port.layer_name == name else result

    monkeypatch.setattr(moe_layer, "routed_forward", wrong)


def test_layers_are_compared_in_the_order_in_which_they_run(source):
    with explicit_case(source) as case:
        weights = random_weights(3)
        found = layer_differences(case.model, lambda: case.logits(routing_weights=weights), weights=weights)
    assert [entry.layer.removeprefix("model.layers.") for entry in found] == [
        f"{block}.{part}"
        for block in (0, 1)
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert not any(entry.differs for entry in found)
    # of float32 sums of up to 48 products of order one
    assert all(0 <= entry.difference <= entry.tolerance < 1e-3 for entry in found)


def test_a_broken_layer_is_found_under_weights_of_the_caller(source, monkeypatch):
    break_a_layer(monkeypatch)
    with explicit_case(source) as case:
        weights = random_weights(*case.ids.shape, 3)
        found = layer_differences(case.model, lambda: case.logits(routing_weights=weights), weights=weights)
    assert [entry.layer for entry in found if entry.differs] == [BROKEN]
    assert "first in " + BROKEN in first_difference(found)


@pytest.mark.parametrize("scope", ["layer", "block", "model", "two_pass"])
def test_a_broken_layer_is_found_under_every_router(source, monkeypatch, scope):
    with routed_case(source, scope) as case:
        assert not any(entry.differs for entry in layer_differences(case.model, case.logits))
        break_a_layer(monkeypatch)
        found = layer_differences(case.model, case.logits)
    assert {entry.layer for entry in found if entry.differs} == {BROKEN}


def test_one_column_in_another_s_place_is_found(source, monkeypatch):
    right = moe_layer.routed_forward

    def wrong(layer, x, *, routing_weights, **kwargs):
        if layer.routing_port.layer_name == BROKEN:
            routing_weights = routing_weights[..., [1, 0, 2]]
        return right(layer, x, routing_weights=routing_weights, **kwargs)

    monkeypatch.setattr(moe_layer, "routed_forward", wrong)
    with routed_case(source, "block") as case:
        found = layer_differences(case.model, case.logits)
    assert [entry.layer for entry in found if entry.differs] == [BROKEN]


def test_looking_leaves_no_hook(source):
    with explicit_case(source) as case:
        weights = random_weights(3)
        layer_differences(case.model, lambda: case.logits(routing_weights=weights), weights=weights)
        assert not any(module._forward_hooks for module in case.model.modules())


def test_where_no_layer_differs_the_fault_is_said_to_lie_between_them():
    sound = [LayerDifference(layer=name, difference=1e-7, tolerance=1e-6) for name in "ab"]
    assert "all 2 adapted layers equal the plain loop" in first_difference(sound)


def test_a_difference_that_is_not_a_number_differs():
    assert LayerDifference(layer="a", difference=float("nan"), tolerance=1.0).differs
    assert LayerDifference(layer="a", difference=0.0, tolerance=0.0).excess == 0.0
