"""Time a training step of the demo with OpenMP threads that spin while they wait and with ones that sleep.

Each is measured alone and beside a neighbour that keeps one core busy. The policy is read when OpenMP is loaded, so
every measurement has a process of its own; they are taken in turns.
"""

import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from moe_common.runs.options import PlainParser

POLICIES = {"default": None, "sleeping": "PASSIVE"}


def main(argv: list[str] | None = None) -> int:
    parser = PlainParser(__doc__.split("\n\n")[0], example="python scripts/compare_waiting.py --rounds 3")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--steps", type=int, default=4, help="steps of a process, after one to warm up")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step; the demo's has 16")
    options = parser.parse_args(argv)
    print("neighbour | default, s | sleeping, s | sleeping over default")
    for name, is_busy in {"none": False, "one busy core": True}.items():
        seconds = compare(options.rounds, options.steps, options.rows, is_busy=is_busy)
        print(f"{name} | {seconds['default']:.2f} | {seconds['sleeping']:.2f} | ", end="", flush=True)
        print(f"{seconds['sleeping'] / seconds['default']:.2f}")
    return 0


def compare(rounds: int, steps: int, rows: int, *, is_busy: bool) -> dict[str, float]:
    """Median seconds of a step under each policy."""
    spawn = multiprocessing.get_context("spawn")
    neighbour = spawn.Process(target=burn, daemon=True)
    if is_busy:
        neighbour.start()
    taken = {name: [] for name in POLICIES}
    try:
        for turn in range(rounds):
            for name in sorted(POLICIES, reverse=turn % 2 == 1):
                os.environ.pop("OMP_WAIT_POLICY", None)
                if POLICIES[name]:
                    os.environ["OMP_WAIT_POLICY"] = POLICIES[name]
                with ProcessPoolExecutor(1, mp_context=spawn) as process:
                    taken[name] += process.submit(seconds_of_steps, steps, rows).result()
    finally:
        if is_busy:
            neighbour.kill()
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def burn() -> None:
    while True:
        pass


def seconds_of_steps(steps: int, num_rows: int) -> list[float]:
    """Of each training step of the demo's mixture, on a batch of random tokens."""
    import torch

    from dylo_moe.training.adapters import MixtureConfig, add_mixture
    from dylo_moe.training.data import DataConfig
    from dylo_moe.training.trainer import TrainingConfig
    from moe_common.models.base_model import load_base_model
    from moe_common.runs.allocator import keep_freed_memory

    keep_freed_memory()
    training = TrainingConfig()
    base, tokenizer = load_base_model()
    model = add_mixture(base, MixtureConfig()).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    rows = torch.randint(len(tokenizer), (num_rows, DataConfig.max_seq_length))
    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=training.autocast_bf16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return taken[1:]


if __name__ == "__main__":
    sys.exit(main())
