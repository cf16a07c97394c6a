"""Routing by weights that the caller gives, against what PEFT itself computes and against a plain loop."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dylo_moe.equivalence.case import BITS, Case, Result, random_weights
from dylo_moe.equivalence.first_difference import LAMBDA, first_difference, layer_differences
from dylo_moe.equivalence.loop import looped, lora_layers
from dylo_moe.equivalence.rounding import SAFETY, UNIT, largest_difference, rounding_effect

# Rows of a mixed batch: each holds another expert, so that many experts would make a large batch.
MOST_ROWS = 8
LAYER_REASON = f"rounding bound of the layer's sums, {LAMBDA:.0f} sqrt(n) u"


@torch.no_grad()
def zero_weights(case: Case) -> Iterator[Result]:
    """All weights zero = disable_adapter()."""
    weights = torch.zeros(*case.ids.shape, len(case.names), device=case.ids.device)
    routed = case.logits(routing_weights=weights)
    with case.model.disable_adapter():
        base = case.logits()
    yield case.judge(
        "all weights zero = disable_adapter()",
        largest_difference(routed, base),
        tolerance=0.0,
        why="adds exact zeros: bit for bit",
        suspect=lambda: case.logits(routing_weights=weights),
        weights=weights,
    )


@torch.no_grad()
def one_hot_rows(case: Case) -> Iterator[Result]:
    """One-hot rows = adapter_names, a mixed batch."""
    names = [*case.names[: MOST_ROWS - 1], "__base__"]
    ids = case.ids[torch.arange(len(names)) % len(case.ids)]
    weights = torch.zeros(len(names), len(case.names), device=ids.device)
    weights[range(len(names) - 1), range(len(names) - 1)] = 1.0
    yield case.judge(
        "one-hot rows = adapter_names, a mixed batch",
        largest_difference(case.logits(ids, routing_weights=weights), case.logits(ids, adapter_names=names)),
        suspect=lambda: case.logits(ids, routing_weights=weights),
        weights=weights,
    )


@torch.no_grad()
def constant_weights(case: Case) -> Iterator[Result]:
    """Constant weights = add_weighted_adapter(combination_type="cat")."""
    check = 'constant weights = add_weighted_adapter, "cat"'
    configs = case.model.peft_config
    faults = {name: _why_cat_is_wrong(configs[name]) for name in case.names}
    sound = [name for name, fault in faults.items() if fault is None]
    left_out = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
    if not sound:
        yield case.skip(check, f"PEFT's cat is no oracle for these experts ({left_out})")
        return
    values = random_weights(len(case.names), seed=1)
    weights = torch.where(torch.tensor([name in sound for name in case.names]), values, 0.0).to(case.ids.device)
    routed = case.logits(routing_weights=weights)
    chosen = [values[case.names.index(name)].item() for name in sound]
    case.model.base_model.add_weighted_adapter(sound, chosen, "cat_of_the_check", combination_type="cat")
    try:
        with case.active("cat_of_the_check"):
            joined = case.logits()
    finally:
        case.model.base_model.delete_adapter("cat_of_the_check")
        case.model.base_model.set_adapter(case.names)
    yield case.judge(
        check,
        largest_difference(routed, joined),
        why=case.rounding_reason + (f"; weight 0 for {left_out}" if left_out else ""),
        suspect=lambda: case.logits(routing_weights=weights),
        weights=weights,
    )


def _why_cat_is_wrong(config) -> str | None:
    if config.use_rslora:
        return "cat is wrong for rsLoRA"
    if config.lora_bias:
        return "cat drops LoRA biases"
    if config.rank_pattern:
        return "cat does not know rank_pattern"
    return None


@torch.no_grad()
def layers_against_the_loop(case: Case) -> Iterator[Result]:
    """Weights for each token = a plain loop over the experts, in each layer."""
    for shape, text in _weight_shapes(case):
        weights = random_weights(*shape).to(case.ids.device)
        found = layer_differences(case.model, lambda w=weights: case.logits(routing_weights=w), weights=weights)
        worst = max(found, key=lambda entry: entry.excess)
        yield case.judge(
            f"weights for each {text} = float64 loop, {len(found)} layers each",
            worst.difference,
            tolerance=worst.tolerance,
            why=LAYER_REASON,
            unit="layer output",
            suspect=lambda w=weights: case.logits(routing_weights=w),
            weights=weights,
        )


@torch.no_grad()
def model_against_the_loop(case: Case) -> Iterator[Result]:
    """Weights for each token = a plain loop in every layer, the whole model."""
    for shape, text in _weight_shapes(case):
        weights = random_weights(*shape).to(case.ids.device)
        routed = case.logits(routing_weights=weights)
        with looped(case.model, weights, case.names):
            expected = case.logits()
        yield case.judge(
            f"weights for each {text} = loop in every layer, the model",
            largest_difference(routed, expected),
            suspect=lambda w=weights: case.logits(routing_weights=w),
            weights=weights,
        )


def _weight_shapes(case: Case) -> list[tuple[tuple[int, ...], str]]:
    batch, length = case.ids.shape
    experts = len(case.names)
    return [((experts,), "call"), ((batch, experts), "sequence"), ((batch, length, experts), "token")]


def gradients_against_the_loop(case: Case) -> Iterator[Result]:
    """Gradients in A, B and the weights = those of the loop."""
    factors = {name: p for name, p in case.model.named_parameters() if _is_factor_of(name, case.names)}
    trained = {name: p.requires_grad for name, p in factors.items()}
    weights = random_weights(*case.ids.shape, len(case.names)).to(case.ids.device).requires_grad_()
    wanted = {"routing_weights": weights, **factors}

    def gradients(**inputs) -> dict[str, Tensor]:
        loss = case.model(input_ids=case.ids, labels=case.ids, **inputs).loss
        # An expert that no layer of a checkpoint uses for these tokens has no gradient: zero, in both ways.
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(wanted, found, strict=True))

    for parameter in factors.values():
        parameter.requires_grad_(True)
    try:
        routed = gradients(routing_weights=weights)
        with looped(case.model, weights, case.names):
            expected = gradients()
        rounding = rounding_effect(case.model, lambda: gradients(routing_weights=weights), gradient_difference)
    finally:
        for name, parameter in factors.items():
            parameter.requires_grad_(trained[name])
    rounding = max(rounding, UNIT)
    check = "gradients in A, B and the weights = those of the loop"
    yield judge_gradients(case, check, routed, expected, rounding, weights=weights.detach())


def judge_gradients(
    case: Case,
    check: str,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    rounding: float,
    *,
    weights: Tensor | None = None,
) -> Result:
    """Judge two sets of gradients by name.

    A fault is looked for in the forward first, with `weights` or the router's own; where all layers are right there,
    the parameter nearest to the loss is named, because gradients flow from there.
    """
    tolerance = SAFETY * rounding
    result = case.judge(
        check,
        gradient_difference(ours, theirs),
        tolerance=tolerance,
        why=f"{SAFETY} x measured rounding of the gradients",
        unit="of the gradient",
    )
    if result.verdict == "pass":
        return result
    inputs = {} if weights is None else {"routing_weights": weights}
    case.model.eval()
    layers = layer_differences(case.model, lambda: case.logits(**inputs), weights=weights)
    if any(layer.differs for layer in layers):
        return replace(result, where=first_difference(layers))
    scale = largest_of(theirs)
    wrong = [name for name in ours if not _relative(ours[name], theirs[name], scale[kind_of(name)]) <= tolerance]
    where = f"backward pass, nearest to the loss in {wrong[-1]} ({len(wrong)} of {len(ours)} tensors differ)"
    return replace(result, where=where)


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, each over the largest entry of its kind (loss, gate, A, B)."""
    scale = largest_of(theirs)
    return max(_relative(ours[name], theirs[name], scale[kind_of(name)]) for name in theirs)


def largest_of(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute entry of each kind of gradient."""
    largest: dict[str, float] = {}
    for name, gradient in gradients.items():
        largest[kind_of(name)] = max(largest.get(kind_of(name), 0.0), gradient.detach().abs().max().item())
    return largest


def kind_of(name: str) -> str:
    """lora_A, lora_B, moe_router and so on: gradients of one kind are of one size."""
    kinds = ("moe_router", "lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B")
    return next((kind for kind in kinds if f".{kind}." in name), name)


def _relative(ours: Tensor, theirs: Tensor, scale: float) -> float:
    difference = largest_difference(ours, theirs)
    return difference / scale if scale else difference


def _is_factor_of(parameter: str, names: list[str]) -> bool:
    return "lora_" in parameter and not set(parameter.split(".")).isdisjoint(names)


@torch.no_grad()
def renamed_experts(case: Case) -> Iterator[Result]:
    """Experts permuted together with their columns: the same output."""
    check = "experts permuted with their columns: the same"
    if len(case.names) < 2:
        yield case.skip(check, "there is one expert")
        return
    weights = random_weights(*case.ids.shape, len(case.names)).to(case.ids.device)
    before = case.logits(routing_weights=weights)
    order = [*range(1, len(case.names)), 0]
    moved = weights[..., order]
    with case.active([case.names[i] for i in order]):
        yield case.judge(
            check,
            largest_difference(case.logits(routing_weights=moved), before),
            suspect=lambda: case.logits(routing_weights=moved),
            weights=moved,
        )


@torch.no_grad()
def routing_off(case: Case) -> Iterator[Result]:
    """Routing off: a plain call after a routed one, and the bare base model."""
    # Weights that no earlier check used: what was left behind before would otherwise hide what is left behind now.
    weights = random_weights(*case.ids.shape, len(case.names), seed=23).to(case.ids.device)
    plain = case.logits()
    with case.model.disable_adapter():
        base = case.logits()
    case.logits(routing_weights=weights)
    with case.model.disable_adapter():
        base_after = case.logits()
    difference = max(largest_difference(case.logits(), plain), largest_difference(base_after, base))
    yield case.judge("a routed call leaves the next plain call as it was", difference, tolerance=0.0, why=BITS)

    base_model = case.model.base_model.model
    layers = lora_layers(case.model)
    wrapped = {name: _replace(base_model, name, layer.base_layer) for name, layer in layers.items()}
    try:
        bare = base_model(input_ids=case.ids).logits
    finally:
        for name, layer in wrapped.items():
            _replace(base_model, name, layer)
    yield case.judge(
        "disable_adapter() = the bare base model", largest_difference(base, bare), tolerance=0.0, why=BITS
    )


def _replace(model, name: str, module):
    """Put another module in the place of a submodule; returns what stood there."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    before = getattr(parent, child)
    setattr(parent, child, module)
    return before


EXPLICIT_CHECKS = [
    zero_weights,
    one_hot_rows,
    constant_weights,
    layers_against_the_loop,
    model_against_the_loop,
    gradients_against_the_loop,
    renamed_experts,
    routing_off,
]
