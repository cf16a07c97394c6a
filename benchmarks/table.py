"""The short table: what routing costs on a model of the user's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks.measure import Ratio, check_gradients, check_logits, forward_of, measure, ratio, step_of
from benchmarks.models import Setting, random_tokens
from benchmarks.ways import Way, base_alone, lora, passes, routed, xlora

RANK = 16
REFERENCE = f"lora-r{RANK}"


@dataclass(frozen=True)
class Row:
    """One way on this model.

    Args:
        way: label.
        forward, forward_flops: seconds and counted operations of a forward pass, over the base model's.
        training, training_flops: those of a training step over one LoRA's; None for the base, which trains nothing.
    """

    way: str
    forward: Ratio
    forward_flops: float
    training: Ratio | None = None
    training_flops: float | None = None


def speed_table(make_base: Callable[[], PreTrainedModel], *, num_tokens: int = 512, rounds: int = 15) -> list[Row]:
    """Time the ways to run experts of rank 16 over a model, in turns in this process.

    Args:
        make_base: gives the model, a causal LM; it is called once, its parameters are shared and frozen.
        num_tokens: length of the one sequence of a pass.
        rounds: how often each way is timed, at least 2.

    Returns:
        A row for: base, one LoRA, plain LoRAs of the arithmetic of 4 and 8 experts, routed top-2 of 4 and of 8, 4 and
        8 separate passes, X-LoRA with 4 adapters (left out on a quantised base, whose layers it cannot adapt).
    """
    if num_tokens < 2 or rounds < 2:
        raise ValueError(f"num_tokens is {num_tokens} and rounds is {rounds}, but both must be at least 2.")
    base = make_base().requires_grad_(False)
    parameter = next(base.parameters())
    device = parameter.device
    dtype = "bfloat16" if parameter.dtype == torch.bfloat16 else "float32"
    setting = Setting(device=device.type, dtype=dtype)
    vocab = base.config.get_text_config().vocab_size
    input_ids = random_tokens(vocab, num_tokens, device)
    ways = _ways(quantised=getattr(base, "is_quantized", False))

    runs = {way.name: way.build(base, training=False) for way in ways}
    forward = {name: forward_of(run, input_ids) for name, run in runs.items()}
    for action in forward.values():
        logits = action()
        check_logits(logits, input_ids, logits.shape[-1])
    forward_rows = {row["way"]: row for row in measure(forward, rounds=rounds)}

    runs = {way.name: way.build(base, training=True) for way in ways if way.name != "base"}
    steps = {name: step_of(run, input_ids, setting) for name, run in runs.items()}
    for name, step in steps.items():
        step()
        check_gradients(runs[name])
    training_rows = {row["way"]: row for row in measure(steps, rounds=rounds)}
    return [_row(way, forward_rows, training_rows) for way in ways]


def as_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table: medians, in brackets the quartiles."""
    lines = [
        f"| experts of rank {RANK} | forward, time over base | operations | training step, time over one LoRA | "
        "operations |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        training = "" if row.training is None else str(row.training)
        operations = "" if row.training_flops is None else f"{row.training_flops:.2f}"
        lines.append(f"| {row.way} | {row.forward} | {row.forward_flops:.2f} | {training} | {operations} |")
    return "\n".join(lines)


def _ways(*, quantised: bool) -> list[Way]:
    ways = [base_alone(), lora(RANK)]
    for experts in (4, 8):
        ways += [lora(experts * RANK), routed(experts, 2, rank=RANK), passes(experts, rank=RANK)]
    return ways if quantised else [*ways, xlora(4, rank=RANK)]


def _row(way: Way, forward: dict[str, dict], training: dict[str, dict]) -> Row:
    mine, base = forward[way.name], forward["base"]
    row = Row(way.label, ratio(mine["seconds"], base["seconds"]), mine["flops"] / base["flops"])
    if way.name not in training:
        return row
    mine, lora_row = training[way.name], training[REFERENCE]
    found = ratio(mine["seconds"], lora_row["seconds"])
    return Row(row.way, row.forward, row.forward_flops, found, mine["flops"] / lora_row["flops"])
