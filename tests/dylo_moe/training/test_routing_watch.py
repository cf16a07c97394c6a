"""What the gates did is added up over the tokens, and a starved expert is named once."""

import pytest
import torch
from peft import LoraConfig, MoELoraConfig, get_peft_model
from tiny_models import tiny_model

from dylo_moe.training.routing_watch import FEWEST_TOKENS, RoutingWatch


@pytest.fixture
def mixture():
    config = MoELoraConfig(num_experts=3, top_k=1, r=2, target_modules="all-linear", router_scope="block")
    return get_peft_model(tiny_model(), config)


def run(model, *, rows: int, length: int = 10) -> None:
    model(input_ids=torch.randint(0, 50, (rows, length)))


def starve(model, block: int) -> None:
    """Let a gate say no to its last expert, whatever it is shown."""
    gates = model.base_model.moe_router.gates
    gate = next(gate for name, gate in gates.items() if name.endswith(str(block)))
    hook = lambda module, inputs, logits: logits - torch.tensor([0.0, 0.0, 1e4])  # noqa: E731
    gate.register_forward_hook(hook)


def test_what_is_reported_is_the_mean_over_all_tokens_seen_not_over_calls(mixture):
    watch = RoutingWatch(mixture)
    counted: dict[str, torch.Tensor] = {}
    expected = {"entropy": 0.0, "balance": 0.0}
    for rows in (1, 7):
        run(mixture, rows=rows)
        watch.look()
        for gate, seen in mixture.routing_summary().items():
            tokens = torch.tensor([share * seen["tokens"] for share in seen["usage"].values()])
            counted[gate] = counted.get(gate, 0) + tokens
            for name in expected:
                expected[name] += seen[name] * seen["tokens"] / (2 * 80)
    logs = watch.report()
    for gate, tokens_E in counted.items():
        found = [logs[f"routing/{gate}/usage/expert_{i}"] for i in range(3)]
        assert found == pytest.approx((tokens_E / 80).tolist(), abs=1e-6)
    entropies = [value for name, value in logs.items() if name.endswith("/entropy")]
    assert len(entropies) == 2
    assert logs["router_entropy"] == pytest.approx(sum(entropies) / 2)
    assert logs["router_entropy"] == pytest.approx(expected["entropy"])
    assert logs["router_balance"] == pytest.approx(expected["balance"])


def test_what_was_reported_is_forgotten(mixture):
    watch = RoutingWatch(mixture)
    run(mixture, rows=2)
    watch.look()
    assert watch.report()
    assert watch.report() == {}


def test_a_starved_expert_is_named_with_its_layer_once_until_it_recovers(mixture, caplog):
    starve(mixture, block=1)
    watch = RoutingWatch(mixture)
    for _ in range(2):
        run(mixture, rows=FEWEST_TOKENS // 10)
        watch.look()
        watch.report()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "expert_2 is starved in model.layers.1"
    ]
    assert "0.00 % of the last 1,000 tokens, an even share is 33 %" in caplog.text


def test_a_few_tokens_starve_nobody(mixture, caplog):
    starve(mixture, block=0)
    watch = RoutingWatch(mixture)
    run(mixture, rows=2)
    watch.look()
    watch.report()
    assert not caplog.records


def test_a_model_without_a_router_has_nothing_to_report(mixture):
    plain = get_peft_model(mixture.unload(), LoraConfig(r=2, target_modules="all-linear"))
    watch = RoutingWatch(plain)
    run(plain, rows=2)
    watch.look()
    assert watch.report() == {}
