"""What the gates decided is what the model did: mixtures of transformers of every family, and routed LoRA."""

import pytest
import torch
from tiny_models import lora_mixture, tiny_model

from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.gates.find import find_gates
from moe_ext.router_study.gates.fused import sigmoid_scores, softmax_scores

IDS = 1 + torch.arange(24).view(2, 12)
ALL = torch.ones(2, 12, dtype=torch.bool)


def test_the_routing_of_a_family_is_what_its_routers_returned(family):
    model = tiny_model(family)
    wrapper = MoEModelWrapper(model)
    logits, routing = wrapper.run(IDS, ALL)
    recorded = model.model(IDS, output_router_logits=True).router_logits
    torch.testing.assert_close(routing.logits_LTE, torch.stack([one.flatten(0, -2).float() for one in recorded]))
    torch.testing.assert_close(routing.probabilities_LTE.sum(dim=-1), torch.ones(len(wrapper.gates), 24))
    torch.testing.assert_close(logits, model(IDS).logits)
    score = sigmoid_scores if family == "deepseek_v3" else softmax_scores
    torch.testing.assert_close(routing.probabilities_LTE, score(routing.logits_LTE))


def test_choices_come_in_the_order_of_their_weights(family):
    _, routing = MoEModelWrapper(tiny_model(family)).run(IDS, ALL)
    chosen = routing.probabilities_LTE.gather(-1, routing.chosen_LTK)
    assert bool((chosen[..., :-1] >= chosen[..., 1:]).all())


def test_listening_leaves_no_hook_behind_even_when_a_pass_fails(family):
    model = tiny_model(family)
    gates = find_gates(model)
    with pytest.raises(IndexError), gates.listening():
        model(torch.tensor([[10_000]]))
    assert all(not module._forward_hooks for module in model.modules())


def test_a_gate_overruled_by_its_own_weights_changes_nothing_and_by_zeros_takes_the_experts_away(family):
    model = tiny_model(family)
    gates, before = find_gates(model), model(IDS).logits
    with gates.overruled(0, lambda weights, logits: weights):
        torch.testing.assert_close(model(IDS).logits, before)
    with gates.overruled(0, lambda weights, logits: torch.zeros_like(weights)):
        without = model(IDS).logits
    with torch.no_grad():
        gates.layers[0].experts.down_proj.zero_()
    torch.testing.assert_close(model(IDS).logits, without)
    assert not torch.allclose(without, before)


def test_some_layers_can_be_studied_alone():
    whole, second = (MoEModelWrapper(tiny_model("olmoe"), layers=layers) for layers in (None, [1]))
    assert second.gates.labels == ["1"]
    torch.testing.assert_close(second.run(IDS, ALL)[1].logits_LTE, whole.run(IDS, ALL)[1].logits_LTE[1:])
    with pytest.raises(ValueError, match=r"layer 2\b.*\b2 layers.*\b0 to 1\b"):
        MoEModelWrapper(tiny_model("olmoe"), layers=[2])


@pytest.mark.parametrize("scope", ["layer", "block", "model", "two_pass"])
def test_the_gates_of_a_lora_mixture_decide_what_it_records_itself(scope):
    model = lora_mixture(router_scope=scope)
    wrapper = MoEModelWrapper(model)
    with torch.no_grad(), model.base_model.record_routing() as records:
        logits, routing = wrapper.run(IDS, ALL)
    assert wrapper.gates.names == list(records)
    for place, (weights,) in enumerate(records.values()):
        torch.testing.assert_close(routing.mask_LTE()[place], (weights.flatten(0, -2) > 0).float())
        assert torch.equal(routing.first_LT[place], weights.flatten(0, -2).argmax(dim=-1))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_dense_lora_router_is_studied_by_its_first_choice():
    wrapper = MoEModelWrapper(lora_mixture(top_k=None))
    _, routing = wrapper.run(IDS, ALL)
    assert wrapper.gates.num_chosen == 1
    assert torch.equal(routing.first_LT, routing.probabilities_LTE.argmax(dim=-1))


def test_a_top_p_router_leaves_the_places_beyond_its_last_expert_empty():
    wrapper = MoEModelWrapper(lora_mixture(top_k=None, top_p=0.4))
    with torch.no_grad():
        for gate in wrapper.gates.modules():
            gate.weight.mul_(10)
    _, routing = wrapper.run(IDS, ALL)
    kept = routing.mask_LTE().sum(dim=-1)
    assert set(kept.unique().tolist()) == {1.0, 2.0}
    assert torch.equal((routing.chosen_LTK < 4).sum(dim=-1).float(), kept)


def test_a_lora_gate_overruled_by_zeros_is_the_layer_without_its_experts():
    model = lora_mixture()
    gates = find_gates(model)
    with torch.no_grad():
        before = model(IDS).logits
        with gates.overruled(0, lambda weights, logits: weights):
            torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
        with gates.overruled(0, lambda weights, logits: torch.zeros_like(weights)):
            without = model(IDS).logits
        for layer in gates.layers_of(0):
            for matrix in layer.lora_B.values():
                matrix.weight.zero_()
        torch.testing.assert_close(model(IDS).logits, without, rtol=1e-4, atol=1e-5)


def test_deciding_anew_of_the_same_scores_gives_the_same_choice():
    for wrapper in (MoEModelWrapper(tiny_model("mixtral")), MoEModelWrapper(lora_mixture())):
        _, routing = wrapper.run(IDS, ALL)
        again = wrapper.gates.decide(routing.logits_LTE)
        assert torch.equal(again.chosen_LTK, routing.chosen_LTK)
        torch.testing.assert_close(again.probabilities_LTE, routing.probabilities_LTE)


def test_a_dense_model_is_refused_and_says_what_was_looked_for():
    with pytest.raises(ValueError, match="LlamaForCausalLM.*dense"):
        MoEModelWrapper(tiny_model(num_hidden_layers=3))


def test_a_pass_that_asks_no_gate_is_an_error():
    wrapper = MoEModelWrapper(tiny_model("olmoe"))
    with wrapper.gates.listening() as heard:
        pass
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.gate\b"):
        wrapper.gates.routing(heard)
