"""Keeps old routing in place when a mixture grows: a few blocks of each skill, replayed to the router alone.

Of every skill a few blocks of its text are kept, as token ids, with the expert that learnt it. When an expert comes,
the gates are fitted anew to send each skill's tokens to its own expert. That is a logistic regression for each gate,
and convex: there is one best answer, whatever order the skills came in, and no learning rate. What a gate sees depends
on what the gates below decided, so the blocks are run again after each fit, a few times. No expert changes.

Shape letters: N blocks, L tokens in a block, T tokens, I width of a gate's input, E experts.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_common.runs.whole_files import whole_file

ROUNDS = 3
FILE = "replay.safetensors"


class RouterReplay:
    """Blocks of each skill, as they are kept on disk."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}

    def keep(self, skill: str, input_ids_NL: Tensor) -> None:
        """Keep blocks of a skill, in place of those kept of it before.

        Raises:
            ValueError: there is no block.
        """
        if input_ids_NL.dim() != 2 or input_ids_NL.numel() == 0:
            raise ValueError(f"The replay of '{skill}' needs blocks of tokens, got {list(input_ids_NL.shape)}.")
        self.blocks[skill] = input_ids_NL.to(torch.int32)

    @property
    def num_bytes(self) -> int:
        """What is kept of all skills, in bytes."""
        return sum(ids.numel() * ids.element_size() for ids in self.blocks.values())

    def save(self, folder: Path) -> None:
        """Write `replay.safetensors`, whole or not at all."""
        with whole_file(folder / FILE) as partial:
            save_file(self.blocks, partial)

    @classmethod
    def load(cls, folder: Path) -> "RouterReplay":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing or damaged.
        """
        replay = cls()
        try:
            replay.blocks = load_file(folder / FILE)
        except (SafetensorError, OSError) as wrong:
            raise ValueError(
                f"{folder / FILE} is missing or damaged ({wrong}). Run the skill before it again."
            ) from wrong
        return replay


def refit_router(model, replay: RouterReplay, *, weight_decay: float = 0.1, batch_size: int = 8) -> float:
    """Fit the gates so that the replayed tokens go to the experts of their skills.

    Args:
        model: a `DyLoRA_MoE` whose library names the expert of each replayed skill.
        replay: the blocks.
        weight_decay: of the regression; larger leaves the router less sure of itself, and lets the experts of other
            skills help a little with text of a known one.
        batch_size: blocks at once.

    Returns:
        The share of replayed tokens whose own expert weighs most in the end, mean over the gates.

    Raises:
        ValueError: a replayed skill has no expert.
    """
    names = model.experts.get_all_adapter_names()
    columns = {}
    for skill in replay.blocks:
        expert = model.skills[skill].expert
        if expert not in names:
            raise ValueError(f"The skill '{skill}' is learnt by '{expert}', but the experts are {', '.join(names)}.")
        columns[skill] = names.index(expert)
    gates = model.router.attached.gates
    share = 1.0
    for _ in range(ROUNDS if len(names) > 1 else 0):
        inputs, targets_T = _gate_inputs(model, replay, columns, batch_size)
        right = [
            _fit(gates[key], x_TI, targets_T, model.router.temperature, weight_decay) for key, x_TI in inputs.items()
        ]
        share = sum(right) / len(right)
    return share


@torch.no_grad()
def _gate_inputs(
    model, replay: RouterReplay, columns: dict[str, int], batch_size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """What every gate sees of the replayed tokens as the router is now, normalised as gates do, and their columns."""
    seen: dict[str, list[Tensor]] = {key: [] for key in model.router.attached.gates}

    def note(key: str):
        def hook(gate: nn.Module, args: tuple[Tensor]) -> None:
            x_TI = args[0].flatten(0, -2).to(gate.weight.dtype)
            seen[key].append(x_TI * torch.rsqrt(x_TI.square().mean(dim=-1, keepdim=True) + 1e-6))

        return hook

    handles = [gate.register_forward_pre_hook(note(key)) for key, gate in model.router.attached.gates.items()]
    was_training, targets = model.training, []
    model.eval()
    try:
        for skill, ids_NL in replay.blocks.items():
            for rows in ids_NL.long().split(batch_size):
                model(input_ids=rows.to(model.device), logits_to_keep=1)
                targets.append(torch.full((rows.numel(),), columns[skill]))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {key: torch.cat(states) for key, states in seen.items()}, torch.cat(targets)


def _fit(gate: nn.Module, x_TI: Tensor, targets_T: Tensor, temperature: float, weight_decay: float) -> float:
    """Multinomial logistic regression of a gate's weight by L-BFGS; returns the share of tokens it sends right."""
    targets_T = targets_T.to(x_TI.device)
    weight_EI = gate.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight_EI], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_TE = x_TI @ weight_EI.T / temperature
        total = nn.functional.cross_entropy(logits_TE, targets_T) + weight_decay * weight_EI.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        gate.weight.copy_(weight_EI)
        return ((x_TI @ weight_EI.T).argmax(dim=-1) == targets_T).float().mean().item()
