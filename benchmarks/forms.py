"""The two forms of a routed layer, each forced on the whole model: by these figures `moe_path.sparse_pays` chooses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft.tuners.lora import moe_layer

from benchmarks.measure import forward_of, measure, step_of
from benchmarks.models import Setting, make_base, random_tokens
from benchmarks.ways import routed

EXPERTS = (8, 16, 32, 64)
TOKENS = (1, 32, 512)
FORMS = {"stacked": False, "sparse": True}


def forms(setting: Setting, rounds: int) -> dict:
    """A pass at top-2 with every layer in the sparse form, over the same with every layer in the stacked form."""
    groups = []
    for training, title in ((False, "Forward pass"), (True, "Training step")):
        base = make_base(setting)
        runs = {count: routed(count, 2, rank=setting.size.rank).build(base, training=training) for count in EXPERTS}
        for tokens in TOKENS:
            input_ids = random_tokens(setting.size.vocab, tokens, setting.device)
            actions, kinds = {}, {}
            for experts, run in runs.items():
                action = step_of(run, input_ids, setting) if training else forward_of(run, input_ids)
                for form, sparse in FORMS.items():
                    name = f"{form}/{experts}"
                    actions[name] = _forced(action, sparse)
                    kinds[name] = {"way": form, "label": f"{form}, top-2 of {experts}", "limit": None, "x": experts}
            rows = [row | kinds[row["way"]] for row in measure(actions, rounds=rounds)]
            groups.append(
                {
                    "name": f"experts-forms-{title.split()[0].lower()}-{tokens}",
                    "title": f"{title} of {tokens} tokens by form of the routed layers, over the stacked form",
                    "reference": "stacked",
                    "rows": rows,
                }
            )
    return {"groups": groups, "checks": []}


def _forced(action: Callable[[], object], sparse: bool) -> Callable[[], None]:
    def run() -> None:
        with _every_layer(sparse):
            action()

    return run


@contextmanager
def _every_layer(sparse: bool) -> Iterator[None]:
    rule = moe_layer.sparse_pays
    moe_layer.sparse_pays = lambda *args: sparse
    try:
        yield
    finally:
        moe_layer.sparse_pays = rule
