"""A model that is checked, what its checks share, and how a difference is judged.

with explicit_case(source) as case:
    result = case.judge("zero weights", largest_difference(...))
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from dylo_moe.equivalence.first_difference import first_difference, layer_differences
from dylo_moe.equivalence.models import Source
from dylo_moe.equivalence.rounding import SAFETY, UNIT, rounding_effect

# Small on purpose: a check needs several tokens and two sequences, not a speed.
BATCH, LENGTH = 2, 12
# Drawn this often, the tokens are those on which a top-k router is furthest from a tie.
TOKEN_DRAWS = 6

Verdict = Literal["pass", "fail", "skipped", "measured"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One check.

    Args:
        check: what was compared with what.
        verdict: "measured" is a figure that is reported and not judged; "skipped" says why in `why`.
        difference: the largest found, in `unit`.
        tolerance: the largest allowed; 0.0 asks for equal bits.
        why: where the tolerance comes from, or why there is none.
        unit: what `difference` counts.
        router: scope of the router that ran, where one did.
        where: for a failed check, the layer that differs first.
    """

    check: str
    verdict: Verdict
    difference: float | None = None
    tolerance: float | None = None
    why: str = ""
    unit: str = "logits"
    router: str | None = None
    where: str | None = None


BITS = "the same sums in the same order: bit for bit"


@dataclass(kw_only=True)
class Case:
    """A model to check and what the checks of it share.

    Args:
        model: in eval mode, its experts active.
        names: the experts, in the order of the columns.
        ids: token ids, [batch, seq].
        rounding: what rounding alone does to the logits of `ids`.
        router: scope of the router, None for a model without.
    """

    model: PeftModel
    names: list[str]
    ids: Tensor
    rounding: float = 0.0
    router: str | None = None

    @property
    def tolerance(self) -> float:
        return SAFETY * self.rounding

    @property
    def rounding_reason(self) -> str:
        return f"{SAFETY} x measured rounding"

    def logits(self, ids: Tensor | None = None, **inputs) -> Tensor:
        """Logits `[batch, seq, vocab]` of one forward, of `ids` unless others are given."""
        return self.model(input_ids=self.ids if ids is None else ids, **inputs).logits

    def judge(
        self,
        check: str,
        difference: float,
        *,
        tolerance: float | None = None,
        why: str | None = None,
        unit: str = "logits",
        suspect: Callable[[], object] | None = None,
        weights: Tensor | None = None,
    ) -> Result:
        """A result that passes if the difference is within the tolerance, by default that of rounding.

        Args:
            suspect: the routed forward in which a fault is looked for if there is one; None looks for none.
            weights: the `routing_weights` of `suspect`, None if the router decides.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        passed = difference <= tolerance
        where = None
        if not passed and suspect is not None:
            self.model.eval()
            where = first_difference(layer_differences(self.model, suspect, weights=weights))
        return Result(
            check=check,
            verdict="pass" if passed else "fail",
            difference=difference,
            tolerance=tolerance,
            why=self.rounding_reason if why is None else why,
            unit=unit,
            router=self.router,
            where=where,
        )

    def skip(self, check: str, why: str) -> Result:
        return Result(check=check, verdict="skipped", why=why, router=self.router)

    @contextmanager
    def active(self, names: list[str] | str) -> Iterator[None]:
        """Activate other adapters for a while."""
        tuner = self.model.base_model
        before = tuner.active_adapter
        tuner.set_adapter(names)
        try:
            yield
        finally:
            tuner.set_adapter(before)


@contextmanager
def explicit_case(source: Source) -> Iterator[Case]:
    """The experts of a source without a router, on random tokens."""
    names = list(source.experts)
    case = Case(model=source.plain(), names=names, ids=random_tokens(source.base))
    weights = random_weights(*case.ids.shape, len(names)).to(case.ids.device)
    try:
        with torch.no_grad():
            case.rounding = rounding_of_logits(case.model, lambda: case.logits(routing_weights=weights))
        yield case
    finally:
        case.model.unload()


@contextmanager
def routed_case(source: Source, scope: str) -> Iterator[Case]:
    """The experts of a source with its router of this scope, on random tokens far from the router's ties."""
    model = source.routed[scope](source.base)
    ids = random_tokens(source.base)
    case = Case(model=model, names=list(model.base_model.moe_router.expert_names), ids=ids, router=scope)
    try:
        case.ids = tokens_far_from_ties(case)
        with torch.no_grad():
            case.rounding = rounding_of_logits(model, case.logits)
        yield case
    finally:
        case.model.unload()  # not `model`: a check may have put a reloaded one in its place


def rounding_of_logits(model: PeftModel, run: Callable[[], Tensor]) -> float:
    """What rounding does to the logits of a forward, at least one unit of the largest of them."""
    return max(rounding_effect(model, run), UNIT * run().abs().max().item())


def random_tokens(base, *, seed: int = 0) -> Tensor:
    """Token ids `[BATCH, LENGTH]` of the base model's vocabulary, none of them special."""
    vocabulary = base.get_input_embeddings().weight.shape[0]
    config = base.config.get_text_config()
    vocabulary = min(vocabulary, config.vocab_size)
    special = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given = getattr(config, name, None)
        special |= set(given if isinstance(given, list) else [given])
    allowed = torch.tensor([token for token in range(vocabulary) if token not in special])
    drawn = torch.randint(len(allowed), (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    return allowed[drawn].to(base.device)


def random_weights(*shape: int, seed: int = 7) -> Tensor:
    """Weights of either sign that do not sum to one."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def tokens_far_from_ties(case: Case) -> Tensor:
    """Of several draws the tokens on which no top-k choice is close.

    A router that keeps the k best experts jumps where two scores tie, and there rounding decides: no tolerance fits.
    """
    router = case.model.base_model.moe_router
    kept = router.kept_experts
    if kept is None or kept >= len(case.names):
        return case.ids
    margins = []
    handles = [gate.register_forward_hook(lambda module, args, scores: found.append(scores)) for gate in gates(router)]
    draws = [random_tokens(case.model.base_model.model, seed=seed) for seed in range(TOKEN_DRAWS)]
    try:
        for ids in draws:
            found: list[Tensor] = []
            case.logits(ids)
            best = [scores.float().topk(kept + 1, dim=-1).values for scores in found]
            margins.append(min((top[..., -2] - top[..., -1]).min().item() for top in best))
    finally:
        for handle in handles:
            handle.remove()
    return draws[max(range(TOKEN_DRAWS), key=margins.__getitem__)]


def gates(router) -> list:
    """The gates of a router, one that serves several sites once."""
    return list(dict.fromkeys(router.gates.values()))
