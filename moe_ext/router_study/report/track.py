"""Where a study can be watched: TensorBoard or Weights & Biases; neither is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from moe_ext.router_study.analysis.measure import Measured

ReportTo = Literal["none", "tensorboard", "wandb"]


def scalars_of(measured: Mapping[str, Measured], labels: list[str]) -> dict[str, float]:
    """The figures that have one number a layer, as `figure/layer`."""
    return {
        f"{name}/{label}": float(value)
        for name, found in measured.items()
        if found.axes == ("layer",)
        for label, value in zip(labels, found.value, strict=True)
    }


def log_scalars(report_to: ReportTo, scalars: Mapping[str, float], *, name: str, folder: str | Path) -> None:
    """Log once.

    Args:
        report_to: which of the two; `none` does nothing.
        name: of the run.
        folder: where the files of TensorBoard go.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    if report_to == "none":
        return
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder)) as writer:
            for scalar, value in scalars.items():
                writer.add_scalar(scalar, value)
        return
    import wandb

    with wandb.init(project="router_study", name=name) as run:
        run.log(dict(scalars))


def check_installed(report_to: ReportTo) -> None:
    """Refuse before anything is computed.

    Raises:
        ModuleNotFoundError: the package of that place is not installed.
    """
    try:
        if report_to == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        elif report_to == "wandb":
            import wandb  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"report_to is {report_to}, but it is not installed. Install it with: pip install '.[track]'"
        ) from missing
