"""Train a mixture of LoRA experts on several domains and compare it with one LoRA of the same size.

dylo-moe-train --config configs/demo.yaml                # the committed base, prose + code + math, ~5 minutes
dylo-moe-train --num_experts 8 --datasets prose,notes.jsonl --num_epochs 2 --output_dir runs/mine
dylo-moe-train --data_prep_only --datasets notes.jsonl   # what the data holds; trains nothing
dylo-moe-train --continual prose code math               # skills one after another; has options of its own
dylo-moe-train --continual --help
"""

from pathlib import Path

from dylo_moe.continual import run as continual
from dylo_moe.training import comparison, comparison_report
from dylo_moe.training.adapters import MixtureConfig
from dylo_moe.training.comparison import RunConfig
from dylo_moe.training.data import DataConfig
from dylo_moe.training.trainer import TrainingConfig
from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.commands import run_command
from moe_common.runs.options import OptionParser, names_option


def main(argv: list[str] | None = None) -> int:
    """Train what the options ask for and print the table; returns 0, 2 refused, 130 stopped."""
    grows = names_option("continual", argv)
    classes = (continual.ContinualConfig,) if grows else (MixtureConfig, DataConfig, TrainingConfig, RunConfig)
    description, examples = __doc__.split("\n\n")
    parser = OptionParser(
        classes,
        description=continual.__doc__.splitlines()[0] if grows else description,
        epilog=f"examples:\n{examples}",
    )
    keep_freed_memory()
    return run_command(parser, _grow if grows else _train, argv)


def _train(mixture: MixtureConfig, data: DataConfig, training: TrainingConfig, config: RunConfig) -> str:
    if config.data_prep_only:
        return comparison.report_data(data, training, config)
    results = comparison.run(mixture, data, training, config)
    return comparison_report.as_text(results, Path(config.output_dir)) if results else ""


def _grow(config: continual.ContinualConfig) -> str:
    return continual.as_text(continual.run(config), Path(config.output_dir))
