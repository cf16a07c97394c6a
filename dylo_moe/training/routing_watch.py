"""Watch what a mixture's gates do while it trains: usage and entropy of each layer, and experts that get no tokens.

A mixture that has collapsed onto a few experts has a falling loss all the same. An expert counts as starved at a gate
when, over all tokens since the last line of the log, it got less than a tenth of an even share.
"""

import logging
import math

logger = logging.getLogger(__name__)

STARVED_SHARE = 0.1  # of an even share
FEWEST_TOKENS = 1000  # an expert that is passed over in fewer may only be unlucky


class RoutingWatch:
    """Adds up what the gates did and reports it whenever the log is written.

    Args:
        model: a PeftModel; without an attached router nothing is ever reported.
    """

    def __init__(self, model) -> None:
        self.model = model
        self.starved: set[tuple[str, str]] = set()
        self.totals: dict[str, dict] = {}

    @property
    def has_router(self) -> bool:
        return getattr(self.model.base_model, "moe_router", None) is not None

    def look(self) -> None:
        """Add the last forward pass; call after each one that is to count."""
        if not self.has_router:
            return
        for gate, seen in self.model.routing_summary().items():
            total = self.totals.setdefault(gate, {"tokens": 0, "entropy": 0.0, "usage": {}, "balance": 0.0})
            tokens = seen["tokens"]
            total["tokens"] += tokens
            total["entropy"] += tokens * seen["entropy"]
            total["balance"] += tokens * seen["balance"]
            for expert, share in seen["usage"].items():
                total["usage"][expert] = total["usage"].get(expert, 0.0) + tokens * share

    def report(self) -> dict[str, float]:
        """What the gates did since the last call, and a warning for each expert that has newly starved.

        Returns:
            `router_balance` and `router_entropy` (nats), means over the gates, and for each gate
            `routing/GATE/entropy` and `routing/GATE/usage/EXPERT` (shares that sum to one); empty when nothing ran.
        """
        measured = {}
        for gate, total in self.totals.items():
            if tokens := total["tokens"]:
                usage = {expert: share / tokens for expert, share in total["usage"].items()}
                measured[gate] = (usage, total["entropy"] / tokens, total["balance"] / tokens, tokens)
        self.totals = {}
        if not measured:
            return {}
        logs = {
            "router_balance": _mean([balance for _, _, balance, _ in measured.values()]),
            "router_entropy": _mean([entropy for _, entropy, _, _ in measured.values()]),
        }
        for gate, (usage, entropy, _, tokens) in measured.items():
            self._warn_of_the_starved(gate, usage, tokens)
            logs[f"routing/{gate}/entropy"] = entropy
            logs |= {f"routing/{gate}/usage/{expert}": share for expert, share in usage.items()}
        return logs

    def _warn_of_the_starved(self, gate: str, usage: dict[str, float], tokens: int) -> None:
        threshold = STARVED_SHARE / len(usage)
        for expert, share in usage.items():
            if share >= threshold:
                self.starved.discard((gate, expert))
            elif tokens >= FEWEST_TOKENS and (gate, expert) not in self.starved:
                self.starved.add((gate, expert))
                logger.warning(
                    "%s is starved in %s: it got %.2f %% of the last %s tokens, an even share is %.0f %%. Raise "
                    "--balance_coefficient, or use fewer experts",
                    expert,
                    gate,
                    100 * share,
                    f"{tokens:,}",
                    100 / len(usage),
                )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
