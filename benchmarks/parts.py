"""The parts of the suite that time or weigh a pass: forward, training, memory, scaling, scope.

A part is a function `(setting, rounds) -> {"groups": [...], "checks": [...]}`. A group answers one question: its rows
were timed in turns with each other, and `reference` names the row that the others are divided by.
"""

from collections.abc import Callable, Iterable

from benchmarks.measure import (
    check_against_the_loop,
    check_gradients,
    check_logits,
    forward_of,
    measure,
    step_of,
)
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.models import Setting, make_base, random_tokens
from benchmarks.ways import Run, Way, all_ways, base_alone, lora, routed, xlora

EXPERTS = (4, 8, 16, 32, 64, 128)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
RANKS = (4, 8, 16, 32, 64)
SCOPES = ("layer", "block", "model", "two_pass")


def forward(setting: Setting, rounds: int) -> dict:
    """A forward pass without gradients of every way, over the base."""
    ways = all_ways(setting.size.rank)
    runs = build(ways, setting, training=False)
    input_ids = _input_ids(setting)
    actions = {name: forward_of(run, input_ids) for name, run in runs.items()}
    outputs = {name: action() for name, action in actions.items()}
    for logits in outputs.values():
        check_logits(logits, input_ids, setting.size.vocab)
    checks = [check_against_the_loop(way, outputs, setting.dtype) for way in ways if way.loop]
    title = "Forward pass without gradients, over the base model"
    return {"groups": [group("forward", title, "base", ways, actions, rounds)], "checks": checks}


def training(setting: Setting, rounds: int) -> dict:
    """A training step (forward, loss, backward; no optimizer) of every way, over one LoRA."""
    size = setting.size
    ways = trainable([*all_ways(size.rank), xlora(4, rank=size.rank, trains_adapters=False)], setting)
    runs = build(ways, setting, training=True)
    actions = {name: step_of(run, _input_ids(setting), setting) for name, run in runs.items()}
    for name, action in actions.items():
        action()
        check_gradients(runs[name])
    title = f"Training step (forward, loss, backward), over one LoRA of rank {size.rank}"
    return {"groups": [group("training", title, f"lora-r{size.rank}", ways, actions, rounds)], "checks": []}


def memory(setting: Setting, rounds: int) -> dict:
    """Peak memory of a forward and of a training step, and the bytes kept for backward, whatever `rounds`: exact."""
    size, base, input_ids = setting.size, make_base(setting), _input_ids(setting)
    rows = []
    for way in all_ways(size.rank):
        row = {"way": way.name, "label": way.label, "limit": way.limit}
        run = way.build(base, training=False)
        action = forward_of(run, input_ids)
        action()  # what is made once and kept is made here
        row["forward_peak"] = peak_bytes(action, setting.device)
        if way in trainable([way], setting):
            run = way.build(base, training=True)
            step = step_of(run, input_ids, setting)
            step()
            row["saved"] = saved_bytes(step, run.model.parameters())
            for parameter in run.parameters():
                parameter.grad = None
            row["training_peak"] = peak_bytes(step, setting.device)
        rows.append(row)
    title = "Memory of the tensors of a pass, above parameters and inputs"
    return {
        "groups": [{"name": "memory", "title": title, "reference": f"lora-r{size.rank}", "rows": rows}],
        "checks": [],
    }


def scaling(setting: Setting, rounds: int) -> dict:
    """What grows: experts at top-2, tokens, rank."""
    rank = setting.size.rank
    return {
        "groups": [*_by_experts(setting, rounds, rank), _by_tokens(setting, rounds, rank), *_by_rank(setting, rounds)],
        "checks": [],
    }


def scope(setting: Setting, rounds: int) -> dict:
    """Where the router looks: 8 experts over one LoRA of the same arithmetic."""
    rank = setting.size.rank
    limit = lora(8 * rank)
    top2 = [routed(8, 2, rank=rank, scope=name) for name in SCOPES]
    dense = [routed(8, rank=rank, scope=name) for name in SCOPES]
    return {
        "groups": [
            _timed("scope-forward", "Forward pass by scope", limit, [*dense, *top2], setting, rounds, training=False),
            _timed("scope-training", "Training step by scope", limit, top2, setting, rounds, training=True),
        ],
        "checks": [],
    }


def group(
    name: str,
    title: str,
    reference: str,
    ways: Iterable[Way],
    actions: dict[str, Callable[[], object]],
    rounds: int,
) -> dict:
    """Time the actions of these ways in turns, and put the rows under a title."""
    by_name = {way.name: way for way in ways}
    rows = measure(actions, rounds=rounds)
    rows = [row | {"label": by_name[row["way"]].label, "limit": by_name[row["way"]].limit} for row in rows]
    return {"name": name, "title": title, "reference": reference, "rows": rows}


def build(ways: Iterable[Way], setting: Setting, *, training: bool) -> dict[str, Run]:
    """The ways by name, over one base."""
    base = make_base(setting)
    return {way.name: way.build(base, training=training) for way in ways}


def trainable(ways: Iterable[Way], setting: Setting) -> list[Way]:
    """Those that have something to train, and can in this number format."""
    base = base_alone().name
    return [way for way in ways if way.name != base and (way.autocasts or setting.dtype == "float32")]


def _timed(
    name: str, title: str, reference: Way, ways: list[Way], setting: Setting, rounds: int, *, training: bool
) -> dict:
    ways = [reference, *ways]
    runs, input_ids = build(ways, setting, training=training), _input_ids(setting)
    actions = {
        way: step_of(run, input_ids, setting) if training else forward_of(run, input_ids) for way, run in runs.items()
    }
    return group(name, f"{title}, over {reference.label}", reference.name, ways, actions, rounds)


def _by_experts(setting: Setting, rounds: int, rank: int) -> list[dict]:
    # A token's own two experts do the arithmetic of this one.
    reference, ways = lora(2 * rank), [routed(experts, 2, rank=rank) for experts in EXPERTS]
    groups = [
        _timed("experts-forward", "Forward pass at top-2", reference, ways, setting, rounds, training=False),
        _timed("experts-training", "Training step at top-2", reference, ways, setting, rounds, training=True),
    ]
    for timed in groups:
        for row, experts in zip(timed["rows"], (None, *EXPERTS), strict=True):
            row["x"] = experts
    return groups


def _by_tokens(setting: Setting, rounds: int, rank: int) -> dict:
    ways = [base_alone(), lora(8 * rank), routed(8, 2, rank=rank)]
    runs, rows = build(ways, setting, training=False), []
    for tokens in TOKENS:
        input_ids = random_tokens(setting.size.vocab, tokens, setting.device)
        actions = {name: forward_of(run, input_ids) for name, run in runs.items()}
        timed = group("tokens", "", "base", ways, actions, rounds)
        rows += [row | {"x": tokens} for row in timed["rows"]]
    title = "Forward pass by tokens, over the base model at as many tokens"
    return {"name": "tokens-forward", "title": title, "reference": "base", "rows": rows}


def _by_rank(setting: Setting, rounds: int) -> list[dict]:
    groups = []
    for name, step in (("forward", "Forward pass"), ("training", "Training step")):
        ways = {rank: [lora(8 * rank), routed(8, 2, rank=rank)] for rank in RANKS}
        base, input_ids, actions, kinds = make_base(setting), _input_ids(setting), {}, {}
        for rank, (limit, mixture) in ways.items():
            for kind, way in (("lora", limit), ("routed", mixture)):
                run = way.build(base, training=name == "training")
                made = step_of(run, input_ids, setting) if name == "training" else forward_of(run, input_ids)
                actions[f"{kind}/{rank}"] = made
                kinds[f"{kind}/{rank}"] = {"way": kind, "label": way.label, "limit": None, "x": rank}
        rows = [row | kinds[row["way"]] for row in measure(actions, rounds=rounds)]
        title = f"{step} by rank of an expert, top-2 of 8, over one LoRA of 8 times that rank"
        groups.append({"name": f"rank-{name}", "title": title, "reference": "lora", "rows": rows})
    return groups


def _input_ids(setting: Setting):
    return random_tokens(setting.size.vocab, setting.size.tokens, setting.device)
