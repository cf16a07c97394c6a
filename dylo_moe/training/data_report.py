"""What the datasets of a run hold, counted before anything is trained (`train.py --data_prep_only`)."""

from transformers import PreTrainedTokenizerBase

from dylo_moe.training.data import DataConfig, PreparedData, prepare

SPLITS = ("train", "validation", "test")
COLUMNS = ("examples", "tokens", "rows", "truncated", "left out")


def count_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, apart: bool) -> list[dict]:
    """Count every dataset and split as training and evaluation would read them.

    Args:
        config: the datasets, their subsets and the length of a row.
        tokenizer: the base model's.
        seed: of the subsets.
        apart: whether documents are kept apart; see `dylo_moe.training.data.prepare`.

    Returns:
        For each dataset and split a dict of `dataset`, `split`, `kind` and the counts in COLUMNS. A split in which
        nothing is found has counts of zero and says why under `problem`.
    """
    report = []
    for name in config.domains:
        for split in SPLITS:
            try:
                counted = _counts(prepare(name, split, tokenizer, config, seed=seed, apart=apart))
            except ValueError as refused:
                if split == "train":  # nothing to learn from; a missing held-out part is only reported
                    raise
                counted = {"kind": "", **dict.fromkeys(COLUMNS, 0), "problem": str(refused)}
            report.append({"dataset": name, "split": split, **counted})
    return report


def _counts(prepared: PreparedData) -> dict:
    return {
        "kind": "instruction" if prepared.instruction else "text",
        "examples": prepared.num_examples,
        "tokens": prepared.num_tokens,
        "rows": len(prepared.rows),
        "truncated": prepared.num_truncated,
        "left out": prepared.num_left_out,
    }


def as_text(report: list[dict], config: DataConfig) -> str:
    """The counts as a table, and under it what the columns mean."""
    width = max(len("dataset"), *(len(line["dataset"]) for line in report))
    lines = [f"{'dataset':<{width}}  {'split':<10}  {'kind':<11}" + "".join(f"{name:>12}" for name in COLUMNS)]
    for line in report:
        cells = "".join(f"{line[name]:>12,}" for name in COLUMNS)
        lines.append(f"{line['dataset']:<{width}}  {line['split']:<10}  {line['kind']:<11}{cells}")
    lines.append("")
    lines += [line["problem"] for line in report if "problem" in line]
    kept = "cut to it" if config.keep_truncated else "left out (keep them with --keep_truncated)"
    lines.append(
        f"A row holds {config.max_seq_length} tokens. Text goes on in the next row; examples that are longer than a "
        f"row are {kept}."
    )
    return "\n".join(lines)
