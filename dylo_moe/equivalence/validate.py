"""Check that routed LoRA computes what it says, on any causal language model.

results = validate(open_model("base"))

What is compared with what: `equivalence_explicit` (weights given by the caller, against PEFT itself and a plain loop),
`equivalence_mixing` (one routed pass against one pass for each expert) and `equivalence_router` (what holds for every
router).
"""

import logging
import warnings
from collections.abc import Callable, Iterator

from dylo_moe.equivalence.case import Case, Result, explicit_case, routed_case
from dylo_moe.equivalence.explicit_checks import EXPLICIT_CHECKS
from dylo_moe.equivalence.mixing_checks import MIXING_CHECKS
from dylo_moe.equivalence.models import Source
from dylo_moe.equivalence.router_checks import ROUTER_CHECKS

logger = logging.getLogger(__name__)


def validate(source: Source) -> list[Result]:
    """Run every check on a model: with weights given by the caller, then with each of its routers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.info("checking weights given by the caller")
        with explicit_case(source) as case:
            results = run_checks(case, [*EXPLICIT_CHECKS, *MIXING_CHECKS])
        for scope in source.routed:
            logger.info("checking a router of scope %s", scope)
            with routed_case(source, scope) as case:
                results += run_checks(case, ROUTER_CHECKS)
    return results


def run_checks(case: Case, checks: list[Callable[[Case], Iterator[Result]]]) -> list[Result]:
    """Run checks on one model, each from the same state; one that raises has failed."""
    results = []
    for check in checks:
        try:
            results += check(case)
        except Exception as error:  # whatever a broken build raises is a finding, and hides none of the others
            name = check.__doc__.splitlines()[0].rstrip(".")
            why = " ".join(f"raised {type(error).__name__}: {error}".split())
            logger.debug("%s", name, exc_info=True)
            results.append(Result(check=name, verdict="fail", why=why, router=case.router))
        case.model.eval()
    return results
