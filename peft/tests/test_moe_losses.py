# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The router's losses, what they are measured on, how they reach the model's loss, and what is reported of a forward."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from moe_testing import FAMILIES, SCOPES, tiny_base, tiny_mixture, tokens, trainable_gradients
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft.tuners.lora import moe_context
from peft.tuners.lora.moe_losses import CarryLoss, gate_statistics, router_losses, summarize
from peft.tuners.lora.moe_router import site_of
from peft.tuners.lora.moe_selection import select_experts


NAMES = ("router_balance_loss", "router_z_loss", "router_entropy")
every_scope = pytest.mark.parametrize("scope", SCOPES)
SELECTIONS = {
    "dense": {"selection": "dense"},
    "top_k": {"selection": "top_k", "top_k": 2},
    "top_p": {"selection": "top_p", "top_p": 0.7},
}
every_selection = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def measured_one_token_at_a_time(logits, routing, mask=None):
    """The oracle: tokens, usage, probability, entropy, balance and z of a gate by plain loops."""
    num_experts = logits.shape[-1]
    rows = zip(
        logits.reshape(-1, num_experts).tolist(), routing.weights.reshape(-1, num_experts).tolist(),
        [True] * (logits.numel() // num_experts) if mask is None else mask.flatten().tolist(),
    )  # fmt: skip
    dense = bool((routing.weights > 0).all())
    tokens, z, entropy = 0, 0.0, 0.0
    usage, probability = [0.0] * num_experts, [0.0] * num_experts
    for row, weights, real in rows:
        if not real:
            continue
        tokens += 1
        total = sum(math.exp(score) for score in row)
        z += math.log(total) ** 2
        kept = [i for i, weight in enumerate(weights) if weight > 0]
        for i, score in enumerate(row):
            p = math.exp(score) / total
            entropy -= p * math.log(p)
            probability[i] += p
            usage[i] += weights[i] if dense else (1 / len(kept) if i in kept else 0.0)
    usage, probability = [u / tokens for u in usage], [p / tokens for p in probability]
    balance = num_experts * sum(u * p for u, p in zip(usage, probability))
    return SimpleNamespace(
        tokens=tokens, usage=usage, probability=probability, entropy=entropy / tokens, balance=balance, z=z / tokens
    )


class TestAgainstTheTokenLoop:
    @every_selection
    @pytest.mark.parametrize("masked", [False, True], ids=["all_real", "padded"])
    def test_the_losses_of_a_gate(self, selection, masked):
        logits = scores(3, 7, 4)
        mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
        routing = select_experts(logits, **selection)
        expected = measured_one_token_at_a_time(logits, routing, mask)
        losses = router_losses({"gate": gate_statistics(logits, routing, mask)})
        assert losses["router_balance_loss"].item() == pytest.approx(expected.balance, rel=1e-9)
        assert losses["router_z_loss"].item() == pytest.approx(expected.z, rel=1e-9)
        assert losses["router_entropy"].item() == pytest.approx(expected.entropy, rel=1e-9)

    @every_selection
    @pytest.mark.parametrize("masked", [False, True], ids=["all_real", "padded"])
    def test_the_summary_of_a_gate(self, selection, masked):
        logits = scores(3, 7, 4)
        mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
        routing = select_experts(logits, **selection)
        expected = measured_one_token_at_a_time(logits, routing, mask)
        summary = summarize({"gate": gate_statistics(logits, routing, mask)}, ["a", "b", "c", "d"])["gate"]
        assert summary["tokens"] == expected.tokens
        assert list(summary["usage"].values()) == pytest.approx(expected.usage, rel=1e-9)
        assert list(summary["probability"].values()) == pytest.approx(expected.probability, rel=1e-9)
        assert summary["entropy"] == pytest.approx(expected.entropy, rel=1e-9)
        assert summary["balance"] == pytest.approx(expected.balance, rel=1e-9)

    def test_the_losses_of_several_gates_are_their_mean(self):
        gates = {}
        for seed in range(3):
            logits = scores(2, 5, 4, seed=seed)
            gates[f"gate {seed}"] = gate_statistics(logits, select_experts(logits, selection="dense"))
        together = router_losses(gates)
        alone = [router_losses({name: vector}) for name, vector in gates.items()]
        for name in NAMES:
            assert together[name].item() == pytest.approx(sum(losses[name].item() for losses in alone) / 3, rel=1e-12)

    def test_what_stands_in_the_padding_may_be_infinite(self):
        logits = scores(2, 3, 4).requires_grad_()
        mask = torch.tensor([[True, True, False], [True, True, True]])
        broken = torch.where(mask[..., None], logits, torch.full_like(logits, float("nan")))
        routing = select_experts(broken, selection="dense")
        losses = router_losses({"gate": gate_statistics(broken, routing, mask)})
        assert all(torch.isfinite(loss) for loss in losses.values())

    def test_a_batch_of_padding_alone_gives_zero(self):
        logits = scores(2, 3, 4)
        mask = torch.zeros(2, 3, dtype=torch.bool)
        losses = router_losses({"gate": gate_statistics(logits, select_experts(logits, selection="dense"), mask)})
        assert all(loss.item() == 0.0 for loss in losses.values())

    @pytest.mark.parametrize("name", NAMES)
    def test_each_loss_is_differentiable_in_the_scores(self, name):
        def loss(logits):
            routing = select_experts(logits, selection="dense")
            # The usage is a constant by definition (Fedus et al.): take it out of what is differentiated numerically.
            routing = routing._replace(weights=torch.full_like(routing.weights, 0.25) + fixed)
            return router_losses({"gate": gate_statistics(logits, routing)})[name]

        fixed = scores(5, 4, seed=9) / 10
        assert torch.autograd.gradcheck(loss, (scores(5, 4).requires_grad_(),))

    def test_the_balance_of_an_even_load_is_one(self):
        logits = torch.zeros(8, 4)
        losses = router_losses({"gate": gate_statistics(logits, select_experts(logits, selection="dense"))})
        assert losses["router_balance_loss"].item() == pytest.approx(1.0)

    def test_the_balance_of_one_expert_for_all_is_their_number(self):
        logits = torch.tensor([50.0, 0.0, 0.0, 0.0]).expand(8, 4)
        losses = router_losses({"gate": gate_statistics(logits, select_experts(logits, selection="top_k", top_k=1))})
        assert losses["router_balance_loss"].item() == pytest.approx(4.0)

    def test_the_balance_loss_pushes_scores_of_overused_experts_down(self):
        logits = torch.tensor([[3.0, 0.0, 0.0]]).repeat(6, 1).requires_grad_()
        routing = select_experts(logits, selection="top_k", top_k=1)
        router_losses({"gate": gate_statistics(logits, routing)})["router_balance_loss"].backward()
        assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


class TestAgainstTheModel:
    """What a forward reports is what the loop says of the logits and weights that its gates gave."""

    @pytest.mark.parametrize("family", FAMILIES)
    @every_scope
    def test_the_summary_is_that_of_the_token_loop(self, family, scope):
        model = tiny_mixture(family, scope, top_k=2)
        seen = {}
        for key, gate in model.base_model.moe_router.gates.items():
            gate.register_forward_hook(lambda m, args, output, key=key: seen.update({site_of(key): output}))
        ids = tokens(2, 7)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        summary = model.routing_summary()
        assert summary.keys() == seen.keys()
        for site, logits in seen.items():
            routing = select_experts(logits, selection="top_k", top_k=2)
            expected = measured_one_token_at_a_time(logits, routing, mask)
            assert summary[site]["tokens"] == expected.tokens == 11
            assert list(summary[site]["usage"].values()) == pytest.approx(expected.usage, abs=1e-6)
            assert list(summary[site]["probability"].values()) == pytest.approx(expected.probability, abs=1e-6)
            assert summary[site]["entropy"] == pytest.approx(expected.entropy, abs=1e-5)
            assert summary[site]["balance"] == pytest.approx(expected.balance, abs=1e-5)

    @every_scope
    def test_the_summary_names_gates_and_experts(self, scope):
        model = tiny_mixture("llama", scope)
        with torch.no_grad():
            model(input_ids=tokens(1, 4))
        for measured in model.routing_summary().values():
            assert list(measured["usage"]) == ["expert_0", "expert_1", "expert_2"]
            assert sum(measured["usage"].values()) == pytest.approx(1.0, abs=1e-5)
            assert sum(measured["probability"].values()) == pytest.approx(1.0, abs=1e-5)

    def test_the_summary_holds_plain_numbers_that_json_can_hold(self):
        model = tiny_mixture("llama")
        with torch.no_grad():
            model(input_ids=tokens(1, 4))
        json.dumps(model.routing_summary())

    @torch.no_grad()
    def test_the_summary_is_the_same_measured_at_once_or_when_asked(self, monkeypatch):
        model, ids = tiny_mixture("llama", router_selection="hybrid", top_k=2), tokens(2, 7)
        model(input_ids=ids)
        when_asked = model.train().routing_summary()  # of the forward in eval, which was sparse
        monkeypatch.setattr(moe_context, "KEPT_LOGITS", 0)
        model.eval()(input_ids=ids)
        assert not model.base_model._routing_context()._kept_logits
        assert model.routing_summary() == when_asked

    def test_the_summary_is_of_the_last_forward_alone(self):
        model = tiny_mixture("llama")
        with torch.no_grad():
            model(input_ids=tokens(2, 6))
            model(input_ids=tokens(1, 4))
        assert {measured["tokens"] for measured in model.routing_summary().values()} == {4}

    def test_a_forward_that_raises_leaves_no_summary_of_the_one_before(self):
        model = tiny_mixture()
        model(input_ids=tokens(2, 6))
        with pytest.raises(IndexError):
            model(input_ids=tokens(2, 6) + 1000)  # no such tokens
        assert model.routing_summary() == {}

    def test_the_summary_before_any_forward_is_empty(self):
        assert tiny_mixture("llama").routing_summary() == {}

    def test_the_summary_without_a_router_is_refused(self):
        model = tiny_mixture("llama")
        model.detach_router()
        with pytest.raises(ValueError, match="No router is attached, so there is nothing to summarise"):
            model.routing_summary()

    def test_a_forward_of_a_single_expert_leaves_an_empty_summary(self):
        model = tiny_mixture("llama")
        with torch.no_grad():
            model(input_ids=tokens(1, 4))
            model.base_model.set_adapter("expert_1")
            model(input_ids=tokens(1, 4))
        assert model.routing_summary() == {}

    @every_scope
    def test_recorded_weights_sum_to_one_and_have_a_row_for_each_token(self, scope):
        model = tiny_mixture("llama", scope, top_k=2)
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=tokens(2, 6))
            model(input_ids=tokens(1, 3))
        for weights in recorded.values():
            assert [tuple(w.shape) for w in weights] == [(2, 6, 3), (1, 3, 3)]
            for w in weights:
                torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:-1]))

    def test_recording_ends_with_its_block(self):
        model = tiny_mixture("llama")
        with torch.no_grad():
            with model.record_routing() as recorded:
                pass
            model(input_ids=tokens(1, 4))
        assert recorded == {}

    def test_recording_twice_at_once_is_refused(self):
        model = tiny_mixture("llama")
        with model.record_routing(), pytest.raises(ValueError, match="already active"):
            with model.record_routing():
                pass

    def test_routing_losses_are_those_of_the_output(self):
        model = tiny_mixture("llama").train()
        ids = tokens(2, 6)
        output = model(input_ids=ids, labels=ids)
        for name, loss in model.routing_losses().items():
            assert not loss.requires_grad
            assert torch.equal(loss, output[name])

    def test_routing_losses_are_told_in_eval_too(self):
        model = tiny_mixture("llama")
        assert model.routing_losses() == {}
        with torch.no_grad():
            model(input_ids=tokens(2, 6))
        assert set(model.routing_losses()) == set(NAMES)


COEFFICIENTS = {"router_balance_coef": 0.5, "router_z_coef": 0.1, "router_entropy_coef": 0.2}


def total_of(output):
    return 0.5 * output["router_balance_loss"] + 0.1 * output["router_z_loss"] + 0.2 * output["router_entropy"]


def without_router_losses(family="llama", scope="layer", **config):
    off = dict.fromkeys(COEFFICIENTS, 0.0)
    return tiny_mixture(family, scope, **off, **config)


class TestInTheLoss:
    @pytest.mark.parametrize("family", FAMILIES)
    @every_scope
    def test_the_losses_are_added_exactly_once_in_training(self, family, scope):
        ids = tokens(2, 7)
        output = tiny_mixture(family, scope, **COEFFICIENTS).train()(input_ids=ids, labels=ids)
        bare = without_router_losses(family, scope).train()(input_ids=ids, labels=ids)
        assert total_of(output) > 0.1
        torch.testing.assert_close(output.loss, bare.loss + total_of(output).to(bare.loss.dtype), rtol=1e-6, atol=1e-6)

    @every_scope
    def test_nothing_is_added_in_eval(self, scope):
        ids = tokens(2, 7)
        output = tiny_mixture("llama", scope, **COEFFICIENTS)(input_ids=ids, labels=ids)
        bare = without_router_losses("llama", scope)(input_ids=ids, labels=ids)
        assert torch.equal(output.loss, bare.loss)
        assert not any(name in output for name in NAMES)

    def test_nothing_is_added_without_gradients(self):
        ids = tokens(2, 7)
        with torch.no_grad():
            output = tiny_mixture("llama", **COEFFICIENTS).train()(input_ids=ids, labels=ids)
            bare = without_router_losses().train()(input_ids=ids, labels=ids)
        assert torch.equal(output.loss, bare.loss)

    def test_nothing_is_added_while_a_single_expert_runs(self):
        model = tiny_mixture("llama", **COEFFICIENTS).train()
        model.base_model.set_adapter("expert_0")
        ids = tokens(2, 7)
        output = model(input_ids=ids, labels=ids)
        bare = without_router_losses().train()
        bare.base_model.set_adapter("expert_0")
        assert torch.equal(output.loss, bare(input_ids=ids, labels=ids).loss)

    @every_scope
    def test_nothing_is_added_or_measured_while_adapters_are_disabled(self, scope):
        model = tiny_mixture("llama", scope, **COEFFICIENTS).train()
        ids = tokens(2, 7)
        with model.disable_adapter():
            output = model(input_ids=ids, labels=ids)
        assert torch.equal(output.loss, tiny_base("llama").train()(input_ids=ids, labels=ids).loss)
        assert model.routing_summary() == {}

    def test_nothing_is_added_under_explicit_weights(self):
        weights, ids = torch.tensor([0.2, 0.5, 0.3]), tokens(2, 7)
        output = tiny_mixture("llama", **COEFFICIENTS).train()(input_ids=ids, labels=ids, routing_weights=weights)
        bare = without_router_losses().train()(input_ids=ids, labels=ids, routing_weights=weights)
        assert torch.equal(output.loss, bare.loss)

    def test_the_losses_are_returned_by_name_without_labels(self):
        output = tiny_mixture("llama", **COEFFICIENTS).train()(input_ids=tokens(2, 7))
        assert output.loss is None
        assert all(output[name].requires_grad for name in NAMES)

    def test_the_losses_are_in_the_first_place_of_a_tuple(self):
        ids = tokens(2, 7)
        model = tiny_mixture("llama", **COEFFICIENTS).train()
        expected = model(input_ids=ids, labels=ids).loss
        loss, logits, *_ = model(input_ids=ids, labels=ids, return_dict=False)
        assert torch.equal(loss, expected)
        assert logits.shape == (2, 7, 64)

    def test_a_tuple_without_labels_keeps_its_logits(self):
        ids = tokens(2, 7)
        model = tiny_mixture("llama", **COEFFICIENTS).train()
        expected = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, return_dict=False)[0], expected)

    def test_training_lowers_the_balance_loss(self):
        model = tiny_mixture("llama", top_k=1, router_balance_coef=1.0, train_experts=False).train()
        ids = tokens(4, 8)
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
        balances = []
        for _ in range(15):
            output = model(input_ids=ids)
            output["router_balance_loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            balances.append(output["router_balance_loss"].item())
        assert balances[-1] - 1 < 0.5 * (balances[0] - 1)  # 1 is an even load

    def test_gates_that_ran_without_gradients_are_refused(self):
        model = tiny_mixture("llama").train()
        block = model.base_model.model.model.layers[0]
        forward = block.forward
        block.forward = lambda *args, **kwargs: torch.no_grad()(forward)(*args, **kwargs)
        ids = tokens(2, 5)
        with pytest.raises(RuntimeError, match="gates ran without gradients.*gradient_checkpointing_enable"):
            model(input_ids=ids, labels=ids)


class TestAccumulation:
    """Two micro-batches give the gradients of the batch that they make up.

    The z-loss and the entropy are means over tokens, so micro-batches of equal size add up to them exactly. The balance
    loss is a product of two means over the batch, which is not the mean of the micro-batches' products: it balances each
    micro-batch by itself (as in other libraries), so its coefficient is zero here.
    """

    ADDITIVE = {"router_balance_coef": 0.0, "router_z_coef": 0.3, "router_entropy_coef": 0.2}

    def gradients(self, model, batches, **inputs):
        model.zero_grad()
        for ids in batches:
            model(input_ids=ids, labels=ids, **inputs).loss.backward()
        return trainable_gradients(model)

    @every_scope
    def test_micro_batches_add_up_with_num_items_in_batch(self, scope):
        model = tiny_mixture("llama", scope, **self.ADDITIVE).train()
        ids = tokens(4, 7)
        whole = self.gradients(model, [ids])
        parts = self.gradients(model, ids.split(2), num_items_in_batch=torch.tensor(4 * 6))
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)

    def test_the_losses_of_micro_batches_add_up_with_num_items_in_batch(self):
        model = tiny_mixture("llama", **self.ADDITIVE).train()
        ids = tokens(4, 7)
        whole = model(input_ids=ids, labels=ids).loss
        parts = [model(input_ids=part, labels=part, num_items_in_batch=torch.tensor(24)).loss for part in ids.split(2)]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)

    def test_a_micro_batch_weighs_as_much_as_its_labels(self):
        model = tiny_mixture("llama", **COEFFICIENTS).train()
        bare = without_router_losses().train()
        ids = tokens(2, 7)
        labels = ids.clone()
        labels[0, :4] = -100  # 3 + 6 labels are predicted
        inputs = {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(36)}
        output, expected = model(**inputs), bare(**inputs)
        torch.testing.assert_close(output.loss - expected.loss, total_of(output) * 9 / 36, rtol=1e-4, atol=1e-6)

    def test_shifted_labels_are_all_counted(self):
        model = tiny_mixture("llama", **COEFFICIENTS).train()
        bare = without_router_losses().train()
        ids = tokens(2, 7)
        inputs = {"input_ids": ids, "labels": ids, "shift_labels": ids, "num_items_in_batch": torch.tensor(28)}
        output, expected = model(**inputs), bare(**inputs)
        torch.testing.assert_close(output.loss - expected.loss, total_of(output) * 14 / 28, rtol=1e-4, atol=1e-6)

    def test_labels_of_sequences_are_all_counted(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **sizes)
        base = LlamaForSequenceClassification(config)
        model = tiny_mixture(base=base, task_type="SEQ_CLS", target_modules=["q_proj"], **COEFFICIENTS).train()
        inputs = {"input_ids": tokens(4, 6), "labels": torch.tensor([0, 1, 2, 0])}
        output = model(**inputs, num_items_in_batch=torch.tensor(8))
        added = output.loss - nn.functional.cross_entropy(output.logits, inputs["labels"])
        torch.testing.assert_close(added, total_of(output) * 4 / 8, rtol=1e-4, atol=1e-6)


class TestCarriedLoss:
    """Trainers that make their loss from per-token log-probabilities (TRL) get the router's gradients too."""

    def output_of(self, model, ids):
        """What TRL's fused head returns: per-token log-probabilities, zero where there is no label."""
        base = model.get_base_model()

        class Output(dict):
            pass

        def forward(*args, labels=None, **kwargs):
            logits = type(base).forward(base, *args, **kwargs).logits[:, :-1]
            log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            return Output(log_probs=log_probs, loss=-log_probs.mean())

        base.forward = forward
        return model(input_ids=ids, labels=ids)

    def test_the_values_stay_log_probabilities(self):
        ids = tokens(2, 7)
        carried = self.output_of(tiny_mixture("llama", **COEFFICIENTS).train(), ids)["log_probs"]
        plain = self.output_of(without_router_losses().train(), ids)["log_probs"]
        assert torch.equal(carried, plain)

    @pytest.mark.parametrize("share", [1.0, 0.25])
    def test_a_mean_over_tokens_gets_the_gradients_of_outputs_loss(self, share):
        ids = tokens(2, 7)
        model = tiny_mixture("llama", **COEFFICIENTS).train()
        output = self.output_of(model, ids)
        (output["loss"] * share).backward(retain_graph=True)
        expected = trainable_gradients(model)
        model.zero_grad()
        (-output["log_probs"].sum() * share / 12).backward()
        torch.testing.assert_close(trainable_gradients(model), expected, rtol=0, atol=1e-5)

    def test_no_gradient_is_carried_where_none_arrives(self):
        values = torch.randn(2, 3, requires_grad=True)
        loss = torch.tensor(2.0, requires_grad=True)
        CarryLoss.apply(values, None, loss).mul(0.0).sum().backward()
        assert loss.grad.item() == 0.0

    def test_positions_without_a_label_pull_on_nothing(self):
        values = torch.randn(2, 3, requires_grad=True)
        loss = torch.tensor(2.0, requires_grad=True)
        mask = torch.tensor([[True, True, False], [True, False, False]])
        (-CarryLoss.apply(values, mask, loss).sum() / 3).backward()
        assert loss.grad.item() == pytest.approx(1.0)
        assert torch.equal(values.grad, torch.full((2, 3), -1 / 3))


class TestCounting:
    def test_a_layer_that_runs_twice_counts_both(self):
        model = tiny_mixture("llama", target_modules=["q_proj"])
        attention = model.base_model.model.model.layers[0].self_attn

        def run_query_once_more(module, args, kwargs):
            module.q_proj(kwargs["hidden_states"])

        attention.register_forward_pre_hook(run_query_once_more, with_kwargs=True)
        with torch.no_grad():
            model(input_ids=tokens(2, 5))
        counted = {site: measured["tokens"] for site, measured in model.routing_summary().items()}
        assert counted == {"model.layers.0.self_attn.q_proj": 20, "model.layers.1.self_attn.q_proj": 10}

    def test_olmoe_keeps_its_own_router_and_loss(self):
        base = tiny_base("olmoe", output_router_logits=True, router_aux_loss_coef=0.5)
        model = tiny_mixture("olmoe", base=base, **COEFFICIENTS).train()
        bare = tiny_mixture(
            "olmoe",
            base=tiny_base("olmoe", output_router_logits=True, router_aux_loss_coef=0.5),
            **dict.fromkeys(COEFFICIENTS, 0.0),
        ).train()
        ids = tokens(2, 7)
        output, expected = model(input_ids=ids, labels=ids), bare(input_ids=ids, labels=ids)
        assert torch.equal(output.aux_loss, expected.aux_loss)
        torch.testing.assert_close(output.loss, expected.loss + total_of(output), rtol=1e-6, atol=1e-6)
