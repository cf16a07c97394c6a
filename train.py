"""Train a mixture of LoRA experts on several domains and compare it with one LoRA of the same size.

python train.py                                             # the committed base, prose + code + math, ~5 minutes
python train.py --num_experts 8 --datasets prose,notes.jsonl --output_dir runs/mine
"""

import logging
import sys
import warnings
from pathlib import Path

from transformers import HfArgumentParser

from dylo_moe.adapters import MixtureConfig
from dylo_moe.allocator import keep_freed_memory
from dylo_moe.downloads import DownloadError
from dylo_moe.first_mixture import RunConfig, as_text, run
from dylo_moe.training import TrainingConfig


def main(argv: list[str] | None = None) -> int:
    parser = HfArgumentParser((MixtureConfig, TrainingConfig, RunConfig), description=__doc__.splitlines()[0])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    keep_freed_memory()
    try:
        mixture, training, config = parser.parse_args_into_dataclasses(argv)
        results = run(mixture, training, config)
    except (ValueError, FileNotFoundError, DownloadError) as refused:
        parser.error(str(refused))
    print(as_text(results, Path(config.output_dir)))
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated.*", category=FutureWarning)
    sys.exit(main())
