"""How fast a routed pass is against the base model and against one pass for each expert, measured in turns."""

import statistics
import time
from collections.abc import Callable

import torch


@torch.no_grad()
def tokens_per_second(model, expert_names: list[str], input_ids: torch.Tensor, *, rounds: int = 9) -> dict[str, float]:
    """Tokens/s of three ways to run the same batch, each the median of `rounds` turns taken one after another.

    Args:
        model: a PeftModel that holds a mixture, which is active.
        expert_names: its experts.
        input_ids: the batch, [batch, seq].

    Returns:
        `base` (adapters disabled), `routed` (one pass of the mixture) and `separate` (one pass for each expert alone).
    """
    was_training, mixture = model.training, model.active_adapter
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()

    def base() -> None:
        with model.disable_adapter():
            model(input_ids=input_ids)

    def routed() -> None:
        model(input_ids=input_ids)

    def separate() -> None:
        for name in expert_names:
            model.set_adapter(name)
            model(input_ids=input_ids)
        model.set_adapter(mixture)

    ways = {"base": base, "routed": routed, "separate": separate}
    try:
        seconds = time_in_turns(ways, rounds=rounds)
    finally:
        model.set_adapter(mixture)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        model.train(was_training)
    return {name: input_ids.numel() / statistics.median(taken) for name, taken in seconds.items()}


def time_in_turns(ways: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; every round runs all ways, in alternating order, after one warm-up."""
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        order = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for name in order:
            _synchronize()
            start = time.perf_counter()
            ways[name]()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
