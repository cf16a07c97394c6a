"""What holds for every router: causality, KV cache, padding, gradient checkpointing, saving, renaming, routing off."""

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft.tuners.lora.moe_router import gate_key
from peft.tuners.lora.moe_selection import select_experts
from torch import Tensor, nn

from dylo_moe.equivalence.case import BITS, Case, Result, random_tokens
from dylo_moe.equivalence.explicit_checks import LAYER_REASON, gradient_difference, judge_gradients
from dylo_moe.equivalence.first_difference import LAMBDA, layer_differences
from dylo_moe.equivalence.loop import lora_layers
from dylo_moe.equivalence.models import load_adapters
from dylo_moe.equivalence.rounding import UNIT, largest_difference, rounding_effect

NEW_TOKENS = 8
# Of a batch of two, the second sequence is this much shorter, and both get as much padding once more.
PADDING = 4
# A property that the base model lacks as well excuses the routed model, but not one that lacks it this much more.
MUCH_MORE = 10


@torch.no_grad()
def layers_against_the_loop(case: Case) -> Iterator[Result]:
    """Routed layers = a plain loop with the weights that the router recorded."""
    found = layer_differences(case.model, case.logits)
    worst = max(found, key=lambda entry: entry.excess)
    yield case.judge(
        "router: layers = float64 loop with its weights",
        worst.difference,
        tolerance=worst.tolerance,
        why=LAYER_REASON,
        unit="layer output",
        suspect=case.logits,
    )


@torch.no_grad()
def gates_against_plain_scores(case: Case) -> Iterator[Result]:
    """Weights of a layer's own gate = its scores written out in float64."""
    check = "router: weights of a layer's own gate = plain scores"
    router, tuner = case.model.base_model.moe_router, case.model.base_model
    layers = {name: layer for name, layer in lora_layers(case.model).items() if layer.routing_port.site == name}
    if not layers:  # a gate of another scope is called by itself, and its weights are what it returned
        return
    if not router.built_in:
        yield case.skip(check, "the gates are not this library's own")
        return
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: inputs.update({name: (args[0], module)}))
        for name, layer in layers.items()
    ]
    try:
        with tuner.record_routing() as recorded:
            case.logits()
    finally:
        for handle in handles:
            handle.remove()
    worst = (0.0, 0.0, 0.0)
    for name, (x, layer) in inputs.items():
        gate = router.gates[gate_key(name)]
        x = (layer.base_layer(x) if len(layer.lora_embedding_A) else x).double()
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        weight = gate.weight.double()
        scores = (x @ weight.t()).abs() if gate.absolute else x @ weight.t()
        config = router.config
        chosen = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        expected = select_experts(scores, selection=config.selection, **chosen).weights
        # An error of the scores moves a softmax by at most as much; renormalising what top-k keeps can double it.
        unit = torch.finfo(gate.weight.dtype).eps
        bound = (x.abs() @ weight.abs().t()).max().item() * LAMBDA * x.shape[-1] ** 0.5 * unit / config.temperature
        difference = largest_difference(recorded[name][0], expected)
        worst = max(worst, (difference / bound, difference, bound))
    yield case.judge(check, worst[1], tolerance=worst[2], why=LAYER_REASON, unit="of a weight")


@torch.no_grad()
def causality(case: Case) -> Iterator[Result]:
    """Causality: a changed token changes no logit before it."""
    position = case.ids.shape[1] // 2
    changed = case.ids.clone()
    others = random_tokens(case.model.base_model.model, seed=11)
    changed[:, position] = torch.where(others[:, position] == case.ids[:, position], others[:, 0], others[:, position])

    def difference() -> float:
        return largest_difference(case.logits(changed)[:, :position], case.logits()[:, :position])

    yield _or_excused(case, "causality: a changed token changes no logit before it", difference, suspect=case.logits)


@torch.no_grad()
def prefill_and_decode(case: Case) -> Iterator[Result]:
    """Prefill and decoding with the KV cache = the full forward."""
    check = "KV cache: prefill + decode = full forward"
    if case.router == "two_pass":
        yield case.skip(check, "a two_pass router has no KV cache, and says so")
        return
    if getattr(case.model(input_ids=case.ids, use_cache=True), "past_key_values", None) is None:
        yield case.skip(check, "this model returns no KV cache")
        return
    start, length = case.ids.shape[1] // 2, case.ids.shape[1]

    def difference() -> float:
        output = case.model(input_ids=case.ids[:, :start], use_cache=True)
        steps = [output.logits]
        for t in range(start, length):
            output = case.model(
                input_ids=case.ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True
            )
            steps.append(output.logits)
        return largest_difference(torch.cat(steps, dim=1), case.logits())

    yield _or_excused(case, check, difference, suspect=case.logits)


@torch.no_grad()
def generation(case: Case) -> Iterator[Result]:
    """generate with and without the KV cache gives the same tokens."""
    check = "KV cache: generate gives the same tokens without it"
    if case.router == "two_pass":
        yield case.skip(check, "a two_pass router has no KV cache, and says so")
        return
    ties = 0

    def difference() -> float:
        nonlocal ties
        cached, uncached = (_generate(case, use_cache=use_cache) for use_cache in (True, False))
        wrong, ties = 0, 0
        for ours, theirs in zip(cached, uncached, strict=True):
            if torch.equal(ours, theirs):
                continue
            first = (ours != theirs).nonzero()[0].item()
            logits = case.logits(theirs[None, :first])[0, -1]
            tied = (logits[ours[first]] - logits[theirs[first]]).abs().item() <= case.tolerance
            ties, wrong = ties + tied, wrong + (0 if tied else int((ours != theirs).sum()))
        return float(wrong)

    result = _or_excused(
        case,
        check,
        difference,
        suspect=case.logits,
        tolerance=0.0,
        why=f"{NEW_TOKENS} greedy tokens a sequence: none may differ",
        unit="tokens",
    )
    if ties:
        result = replace(result, why=f"{result.why}; {ties} sequences end at a tie of two tokens within rounding")
    yield result


def _generate(case: Case, *, use_cache: bool) -> Tensor:
    return case.model.generate(
        input_ids=case.ids,
        attention_mask=torch.ones_like(case.ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=use_cache,
        pad_token_id=0,
    )


@torch.no_grad()
def padding(case: Case) -> Iterator[Result]:
    """Left and right padding change no logit of a real token."""
    for side in ("left", "right"):
        ids, mask = padded(case.ids, side, extra=PADDING)

        def difference(ids=ids, mask=mask) -> float:
            together, worst = case.logits(ids, **_mask_inputs(case, mask)), 0.0
            for row, real in zip(range(len(ids)), mask.bool(), strict=True):
                alone = case.logits(ids[row][real][None])[0]
                worst = max(worst, largest_difference(together[row][real], alone))
            return worst

        yield _or_excused(
            case,
            f"{side} padding changes no logit of a real token",
            difference,
            suspect=lambda ids=ids, mask=mask: case.logits(ids, **_mask_inputs(case, mask)),
        )


def padding_and_losses(case: Case) -> Iterator[Result]:
    """Padding changes no loss."""
    for side in ("left", "right"):

        def losses(extra: int, side=side) -> dict[str, Tensor]:
            ids, mask = padded(case.ids, side, extra=extra)
            # A first token is predicted from nothing, or from the padding on its left: leave it out.
            labels = ids.masked_fill((mask == 0) | (mask.cumsum(-1) == 1), -100)
            return _losses(case.model(input_ids=ids, labels=labels, **_mask_inputs(case, mask)))

        def difference(losses=losses) -> float:
            with _counting_losses(case):
                return gradient_difference(losses(PADDING), losses(0))

        check = f"{side} padding changes no loss, the router's included"
        with _counting_losses(case):
            if len(losses(0)) < 2:
                yield Result(check=check, verdict="fail", router=case.router, why="the router added no loss")
                continue
            rounding = max(UNIT, rounding_effect(case.model, lambda losses=losses: losses(0), gradient_difference))
        yield _or_excused(
            case,
            check,
            difference,
            rounding=rounding,
            unit="of the loss",
        )


def padded(ids: Tensor, side: str, *, extra: int) -> tuple[Tensor, Tensor]:
    """Two sequences, the second `PADDING` tokens shorter, padded to a common length and `extra` tokens more.

    Returns:
        The token ids, with other tokens in the place of padding, and the attention mask.
    """
    batch, length = ids.shape
    wide_ids, mask = ids.new_zeros(batch, length + extra), ids.new_zeros(batch, length + extra)
    for row, real in enumerate([length] + [length - PADDING] * (batch - 1)):
        where = slice(length + extra - real, None) if side == "left" else slice(0, real)
        wide_ids[row, where], mask[row, where] = ids[row, :real], 1
    filling = ids.flip(0).repeat(1, 2)[:, : length + extra]  # what stands in the padding is no matter
    return torch.where(mask.bool(), wide_ids, filling), mask


def _mask_inputs(case: Case, mask: Tensor) -> dict[str, Tensor]:
    """The mask, and the positions that real tokens have without padding if the model takes positions."""
    takes = inspect.signature(case.model.base_model.model.forward).parameters
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask, **({"position_ids": positions} if "position_ids" in takes else {})}


def _losses(output) -> dict[str, Tensor]:
    return {name: output[name].detach() for name in output if name == "loss" or name.startswith("router_")}


@contextmanager
def _counting_losses(case: Case) -> Iterator[None]:
    """Let the model add its router's losses while everything in it, dropout included, stays in eval mode."""
    counting = (case.model.base_model.model, case.model.base_model.moe_router)
    for module in counting:
        module.training = True  # of these two alone: their submodules stay in eval mode
    try:
        yield
    finally:
        for module in counting:
            module.training = False


def gradient_checkpointing(case: Case) -> Iterator[Result]:
    """Gradient checkpointing: the loss and gradients of a run without."""
    model, base = case.model, case.model.base_model.model
    names = [f"gradient checkpointing, {'re' if kind else 'non-re'}entrant: the same" for kind in (True, False)]
    if not getattr(base, "supports_gradient_checkpointing", False):
        yield from (case.skip(name, "this model has no gradient checkpointing") for name in names)
        return
    parameters = {n: p for n, p in model.named_parameters() if "lora_" in n or "moe_router" in n}
    trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    runs = []
    counter = next(iter(lora_layers(model).values())).register_forward_hook(lambda *_: runs.append(1))

    def loss_and_gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)  # the same dropout and jitter in each run
        output = model(input_ids=case.ids, labels=case.ids, use_cache=False)
        output.loss.backward()
        found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {**_losses(output), **found}

    for parameter in parameters.values():
        parameter.requires_grad_(True)
    model.train()
    try:
        expected = loss_and_gradients()
        runs_without = len(runs)
        rounding = max(UNIT, rounding_effect(model, loss_and_gradients, gradient_difference))
        for name, use_reentrant in zip(names, (True, False), strict=True):
            runs.clear()
            with _checkpointing(base, use_reentrant=use_reentrant):
                found = loss_and_gradients()
            if len(runs) <= runs_without:
                yield case.skip(name, "the first adapted layer was not recomputed, so nothing was tested")
                continue
            missing = expected.keys() ^ found.keys()
            if missing:
                yield Result(
                    check=name,
                    verdict="fail",
                    router=case.router,
                    why=f"{len(missing)} gradients are there in one run only, first {min(missing)}",
                )
                continue
            yield judge_gradients(case, name, found, expected, rounding)
    finally:
        counter.remove()
        model.eval()
        for name, parameter in parameters.items():
            parameter.requires_grad_(trained[name])


@contextmanager
def _checkpointing(base: nn.Module, *, use_reentrant: bool) -> Iterator[None]:
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    try:
        yield
    finally:
        base.disable_input_require_grads()
        base.gradient_checkpointing_disable()


@torch.no_grad()
def permuted_experts(case: Case) -> Iterator[Result]:
    """Experts activated in another order: the same output."""
    check = "experts activated in another order: the same"
    if len(case.names) < 2:
        yield case.skip(check, "there is one expert")
        return
    before = case.logits()
    with case.active([*case.names[1:], case.names[0]]):
        yield case.judge(check, largest_difference(case.logits(), before))


@torch.no_grad()
def routing_off(case: Case) -> Iterator[Result]:
    """Routing off: disabled and detached, the base model and plain LoRA are as they were."""
    tuner, first = case.model.base_model, case.names[0]
    with case.active(first):
        attached = case.logits()
    with case.model.disable_adapter():
        disabled = case.logits()
    case.logits()
    with case.model.disable_adapter():
        difference = largest_difference(case.logits(), disabled)
    zeros = torch.zeros(len(case.names), device=case.ids.device)
    difference = max(difference, largest_difference(case.logits(routing_weights=zeros), disabled))
    yield case.judge("routing off: disable_adapter() = weights all zero", difference, tolerance=0.0, why=BITS)
    check = "routing off: one expert alone = router detached"
    if len(case.names) < 2:
        yield case.skip(check, "there is one expert: alone it is the mixture")
        return
    router = tuner.moe_router
    with tempfile.TemporaryDirectory() as folder:
        tuner.save_router(folder)
        tuner.detach_router()
        try:
            tuner.set_adapter(first)
            detached = case.logits()
        finally:
            tuner.set_adapter(case.names)
            tuner.load_router(folder, gate=None if router.built_in else next(iter(router.gates.values())))
            if getattr(tuner, "mixture_name", None):
                tuner.set_adapter(tuner.mixture_name)
    yield case.judge(
        check,
        largest_difference(attached, detached),
        tolerance=0.0,
        why=BITS,
    )


@torch.no_grad()
def save_and_load(case: Case) -> Iterator[Result]:
    """save_pretrained, then loaded anew: bit-equal logits."""
    before, base = case.logits(), case.model.base_model.model
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        case.model.unload()
        case.model = load_adapters(base, Path(folder))
    yield case.judge(
        "saved and loaded: the same logits", largest_difference(case.logits(), before), tolerance=0.0, why=BITS
    )


def _or_excused(
    case: Case,
    check: str,
    difference: Callable[[], float],
    *,
    suspect: Callable[[], object] | None = None,
    rounding: float | None = None,
    **judged,
) -> Result:
    """Judge a property; where the bare base model lacks it too, say so instead of failing."""
    if rounding is not None:
        scale = replace(case, rounding=rounding)
        judged = {"tolerance": scale.tolerance, "why": scale.rounding_reason, **judged}
    result = case.judge(check, difference(), suspect=suspect, **judged)
    if result.verdict == "fail":
        with case.model.disable_adapter():
            of_base = difference()
        if of_base > result.tolerance and result.difference <= MUCH_MORE * of_base:
            return case.skip(check, f"the base model itself does not keep it: {of_base:.1e} without adapters")
    return result


ROUTER_CHECKS = [
    gates_against_plain_scores,
    layers_against_the_loop,
    causality,
    prefill_and_decode,
    generation,
    padding,
    padding_and_losses,
    gradient_checkpointing,
    permuted_experts,
    routing_off,
    save_and_load,
]
