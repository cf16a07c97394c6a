"""`overhead`: what collecting costs on a model."""

from moe_ext.router_study.analysis.overhead import measure_overhead, wide_model
from moe_ext.router_study.collect.wrapper import MoEModelWrapper
from moe_ext.router_study.options import OverheadOptions
from moe_ext.router_study.report.folder import versions

WIDE_NAME = "wide"


def overhead(options: OverheadOptions) -> str:
    """Time passes in turns."""
    if options.model == WIDE_NAME:
        wrapper = MoEModelWrapper(wide_model().to(options.device), name=WIDE_NAME)
    else:
        wrapper = MoEModelWrapper.load(options.model, device=options.device)
    found = measure_overhead(
        wrapper, batch_size=options.batch_size, row_tokens=options.row_tokens, rounds=options.rounds
    )
    return (
        f"{wrapper.name}: a pass that collects takes {found.ratio:.3f} times a plain one (quartiles {found.low:.3f} "
        f"to {found.high:.3f} of {found.rounds} rounds in turns; {found.tokens} tokens, {found.plain * 1000:.0f} and "
        f"{found.collecting * 1000:.0f} ms; {options.device}, {versions()})"
    )
