"""Each equivalence check passes on the code as it is and fails on one fault of the kind it is there for."""

import pytest
import torch
from moe_testing import tiny_base
from peft.tuners.lora import moe_context, moe_frame, moe_layer, moe_router
from tiny_models import tiny_model

from dylo_moe.equivalence import explicit_checks as explicit
from dylo_moe.equivalence import mixing_checks as mixing
from dylo_moe.equivalence import router_checks as router
from dylo_moe.equivalence.case import TOKEN_DRAWS, explicit_case, random_tokens, routed_case
from dylo_moe.equivalence.models import open_model
from dylo_moe.equivalence.validate import run_checks, validate

FAMILIES = {
    "gpt2": lambda: tiny_base("gpt2"),
    "olmoe": lambda: tiny_base("olmoe"),
    "qwen3": lambda: tiny_model("qwen3"),
    "gemma2": lambda: tiny_model("gemma2"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_base("llama").save_pretrained(folder)
    return open_model(str(folder))


def run(source, check, scope=None):
    with explicit_case(source) if scope is None else routed_case(source, scope) as case:
        return run_checks(case, [check])


# -- faults, each put in the place of what is right ------------------------------------------------------------------


def wrong_routing(change):
    """Routed layers that get their weights changed by a function."""

    def put(monkeypatch):
        right = moe_layer.routed_forward

        def wrong(layer, x, *args, routing_weights, **kwargs):
            return right(layer, x, *args, routing_weights=change(routing_weights), **kwargs)

        monkeypatch.setattr(moe_layer, "routed_forward", wrong)

    return put


def wrong_gradient(monkeypatch):
    right = moe_layer.routed_forward

    def wrong(layer, x, **kwargs):
        result = right(layer, x, **kwargs)
        return result + 0.1 * (result - result.detach())

    monkeypatch.setattr(moe_layer, "routed_forward", wrong)


def weights_that_stay(monkeypatch):
    right = moe_context.RoutingContext.set_explicit
    monkeypatch.setattr(
        moe_context.RoutingContext,
        "set_explicit",
        lambda self, weights, *args: None if weights is None else right(self, weights, *args),
    )


def base_that_changes(monkeypatch):
    """A LoRA layer whose base is not the base model's, also with adapters disabled."""
    from peft.tuners.lora.layer import Linear

    right = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: right(self, x, *args, **kwargs) * 1.0001)


def gate_that_reads(change):
    """A gate that scores something else than each token's own hidden state."""

    def put(monkeypatch):
        right = moe_router.Gate.forward
        monkeypatch.setattr(moe_router.Gate, "forward", lambda self, x: right(self, change(x)))

    return put


def mean_of_sequence(x):
    return x.mean(dim=1, keepdim=True).expand_as(x)


def nothing_while_decoding(x):
    return -3 * x if x.shape[1] == 1 else x


def padding_that_counts(monkeypatch):
    monkeypatch.setattr(moe_frame.Frame, "mask_for", lambda self, x: None)


def checkpoints_that_do_not_know_routing(monkeypatch):
    monkeypatch.setattr(moe_context.RoutedCheckpoint, "__call__", lambda self, run, *args: self.function(run, *args))


def columns_that_do_not_follow(monkeypatch):
    monkeypatch.setattr(moe_context.RoutingContext, "in_order_of", lambda self, active, weights: weights)


def gates_that_are_not_loaded(monkeypatch):
    right = router.load_adapters

    def wrong(base, folder):
        model = right(base, folder)
        with torch.no_grad():
            next(iter(model.base_model.moe_router.parameters())).mul_(1.001)
        return model

    monkeypatch.setattr(router, "load_adapters", wrong)


def experts_that_are_scaled(monkeypatch):
    """An expert run alone while a router is attached gets another size than plain LoRA."""
    from peft.tuners.lora.layer import Linear

    right = Linear.forward

    def wrong(self, x, *args, **kwargs):
        attached = self.routing_port is not None and self.routing_port.site is not None
        return right(self, x, *args, **kwargs) * (1.01 if attached and len(self.active_adapters) == 1 else 1.0)

    monkeypatch.setattr(Linear, "forward", wrong)


def scores_of_another_input(monkeypatch):
    right = moe_router.select_experts
    monkeypatch.setattr(moe_router, "select_experts", lambda scores, **chosen: right(scores.flip(1), **chosen))


REVERSED = wrong_routing(lambda weights: weights.flip(-1))
FAULTS = {
    "zero weights": (explicit.zero_weights, None, wrong_routing(lambda weights: weights + 1e-6)),
    "one-hot rows": (explicit.one_hot_rows, None, REVERSED),
    "constant weights": (explicit.constant_weights, None, wrong_routing(lambda weights: weights * 1.1)),
    "layer by layer": (explicit.layers_against_the_loop, None, wrong_routing(lambda weights: weights * 1.01)),
    "whole model": (explicit.model_against_the_loop, None, wrong_routing(lambda weights: weights * 1.01)),
    "gradients": (explicit.gradients_against_the_loop, None, wrong_gradient),
    "permuted with columns": (explicit.renamed_experts, None, REVERSED),
    "next plain call": (explicit.routing_off, None, weights_that_stay),
    "bare base model": (explicit.routing_off, None, base_that_changes),
    "one expert a sequence": (mixing.one_expert_a_sequence, None, REVERSED),
    "order of the gap": (mixing.gap_of_the_two, None, wrong_routing(lambda weights: weights * 1.5)),
    "last linear": (mixing.last_linear, None, REVERSED),
    "scores of a gate": (router.gates_against_plain_scores, "layer", scores_of_another_input),
    "recorded weights": (router.layers_against_the_loop, "block", wrong_routing(lambda weights: weights * 1.01)),
    "causality": (router.causality, "block", gate_that_reads(mean_of_sequence)),
    "prefill and decode": (router.prefill_and_decode, "block", gate_that_reads(mean_of_sequence)),
    "generation": (router.generation, "block", gate_that_reads(nothing_while_decoding)),
    "padding": (router.padding, "model", gate_that_reads(mean_of_sequence)),
    "padding in losses": (router.padding_and_losses, "layer", padding_that_counts),
    "checkpointing": (router.gradient_checkpointing, "block", checkpoints_that_do_not_know_routing),
    "another order": (router.permuted_experts, "model", columns_that_do_not_follow),
    "routing off": (router.routing_off, "layer", experts_that_are_scaled),
    "saving": (router.save_and_load, "layer", gates_that_are_not_loaded),
}


@pytest.mark.parametrize(("check", "scope", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_check_fails_on_the_fault_it_is_there_for_and_passes_without(source, monkeypatch, check, scope, fault):
    sound = run(source, check, scope)
    assert sound and {result.verdict for result in sound} <= {"pass", "measured"}, sound
    with monkeypatch.context() as broken:
        fault(broken)
        found = run(source, check, scope)
    assert "fail" in {result.verdict for result in found}, found
    assert run(source, check, scope) == sound


@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_holds_on_other_kinds_of_models(family, tmp_path):
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(tmp_path)
    results = validate(open_model(str(tmp_path)))
    assert {result.verdict for result in results} == {"pass", "measured", "skipped"}
    skipped = {result.check: result.why for result in results if result.verdict == "skipped"}
    if family == "gemma2":
        assert "caps its logits" in skipped.pop("one pass for each expert, only the last linear adapted")
    assert all(check.startswith("KV cache") and "two_pass" in why for check, why in skipped.items())
    head = [result for result in results if "only the last linear adapted" in result.check]
    assert head[0].verdict == ("skipped" if family == "gemma2" else "pass")


def test_a_check_that_raises_has_failed_and_hides_none_of_the_others(source):
    def raises(case):
        """A check that breaks."""
        yield case.skip("first", "it is only a test")
        raise RuntimeError("made to\nfail")

    with explicit_case(source) as case:
        results = run_checks(case, [raises, explicit.zero_weights])
    assert [result.verdict for result in results] == ["skipped", "fail", "pass"]
    assert (results[1].check, results[1].why) == ("A check that breaks", "raised RuntimeError: made to fail")


def test_weights_that_are_not_numbers_fail(source, monkeypatch):
    wrong_routing(lambda weights: weights * torch.nan)(monkeypatch)
    with explicit_case(source) as case:
        case.rounding = 1e-6
        assert {result.verdict for result in run_checks(case, [explicit.one_hot_rows])} == {"fail"}


def test_a_property_that_the_base_model_lacks_is_skipped_and_the_figure_is_named(source):
    with routed_case(source, "layer") as case:
        # a model that mixes each token with the last one, whatever stands in between
        norm = case.model.base_model.model.model.norm
        handle = norm.register_forward_hook(lambda module, args, output: output + output[:, -1:])
        (result,) = run_checks(case, [router.causality])
        handle.remove()
    assert result.verdict == "skipped"
    assert "the base model itself does not keep it" in result.why


def test_a_gradient_fault_is_named_by_the_tensor_nearest_to_the_loss(source, monkeypatch):
    right = moe_layer.routed_forward

    def wrong(layer, x, **kwargs):
        result = right(layer, x, **kwargs)
        return (
            result + (result - result.detach()) if layer.routing_port.layer_name.endswith("0.mlp.up_proj") else result
        )

    monkeypatch.setattr(moe_layer, "routed_forward", wrong)
    (result,) = run(source, explicit.gradients_against_the_loop)
    assert result.verdict == "fail"
    assert "nearest to the loss in base_model.model.model.layers.0.mlp.up_proj.lora_" in result.where


def test_tokens_are_drawn_until_no_choice_of_the_router_is_close(source):
    def margin(case, ids):
        scores = []
        gates = list(case.model.base_model.moe_router.gates.values())
        handles = [gate.register_forward_hook(lambda module, args, output: scores.append(output)) for gate in gates]
        with torch.no_grad():
            case.logits(ids)
        for handle in handles:
            handle.remove()
        best = [score.sort(dim=-1, descending=True).values for score in scores]
        return min((top[..., 1] - top[..., 2]).min().item() for top in best)

    with routed_case(source, "layer") as case:
        draws = [random_tokens(source.base, seed=seed) for seed in range(TOKEN_DRAWS)]
        margins = [margin(case, ids) for ids in draws]
        assert margin(case, case.ids) == max(margins) > min(margins)


def test_special_tokens_are_never_drawn(source):
    drawn = torch.cat([random_tokens(source.base, seed=seed) for seed in range(40)])
    assert set(drawn.unique().tolist()) == set(range(3, 64))
