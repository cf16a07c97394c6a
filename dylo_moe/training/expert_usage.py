"""Which experts a mixture uses for which domain, measured block by block and drawn.

Shape letters: D domains, L decoder blocks, E experts.
"""

import re
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from moe_common.runs.drawing import load_pyplot
from moe_common.runs.whole_files import whole_file
from moe_common.text.batches import batches_of

BLOCK = re.compile(r"\.(\d+)(\.|$)")


@torch.no_grad()
def usage_by_block(model, blocks: Dataset, *, batch_size: int = 8) -> np.ndarray:
    """Each expert's share of the token assignments in every decoder block.

    Args:
        model: a PeftModel with an attached router.
        blocks: rows as `moe_common.text.batches.collate` takes them, all of one kind.
        batch_size: rows at once.

    Returns:
        usage_LE; rows sum to one. A router with one gate for the whole model gives a single row.
    """
    was_training = model.training
    model.eval()
    assigned: dict[int, np.ndarray] = {}
    try:
        for batch in batches_of(blocks, batch_size, model.device):
            batch.pop("labels", None)  # the loss is not wanted, and `logits_to_keep` leaves it without logits
            model(**batch, logits_to_keep=1)
            for site, measured in model.routing_summary().items():
                found = BLOCK.search(site)
                usage_E = np.array(list(measured["usage"].values())) * measured["tokens"]
                index = int(found.group(1)) if found else 0
                assigned[index] = assigned.get(index, 0) + usage_E
    finally:
        model.train(was_training)
    usage_LE = np.stack([assigned[index] for index in sorted(assigned)])
    return usage_LE / usage_LE.sum(axis=1, keepdims=True)


def draw_usage(usage: dict[str, np.ndarray], expert_names: list[str], path: Path) -> None:
    """Write a picture (PNG): a panel for each domain, experts across, decoder blocks upwards.

    Args:
        usage: usage_LE for each domain.
        expert_names: labels of the columns.
        path: where the picture goes; written whole or not at all.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    plt = load_pyplot()
    num_blocks = len(next(iter(usage.values())))
    figure, axes = plt.subplots(
        1, len(usage), figsize=(1.2 + 2.6 * len(usage), 1.6 + 0.42 * num_blocks), sharey=True, layout="constrained"
    )
    highest = max(usage_LE.max() for usage_LE in usage.values())
    for axis, (domain, usage_LE) in zip(np.atleast_1d(axes), usage.items(), strict=True):
        image = axis.imshow(usage_LE, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=highest)
        for (block, expert), share in np.ndenumerate(usage_LE):
            ink = "white" if share > 0.6 * highest else "black"
            axis.text(expert, block, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axis.set_title(Path(domain).name)
        axis.set_xticks(range(len(expert_names)), [name.removeprefix("expert_") for name in expert_names])
        axis.set_yticks(range(num_blocks))
        axis.set_xlabel("expert")
    np.atleast_1d(axes)[0].set_ylabel("decoder block")
    figure.colorbar(image, ax=axes, label="share of tokens", format=lambda share, _: f"{100 * share:.0f} %")
    figure.suptitle("Experts used, in % of each domain's held-out tokens")
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
