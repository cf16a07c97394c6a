"""Evaluate a trained adapter: perplexity by domain, tasks of lm-eval, and HumanEval.

    python -m dylo_moe.evaluate --checkpoint runs/mixture
    python -m dylo_moe.evaluate --checkpoint runs/mixture --tasks arithmetic --include_path my_tasks
    python -m dylo_moe.evaluate --checkpoint runs/mixture --humaneval --allow_code_execution

A checkpoint is the folder of an adapter, or the folder of a run of `train.py`, which stands for its mixture. The tasks
and HumanEval need the extra `eval`.
"""

import logging
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from dylo_moe.evaluate.humaneval import Outcome, complete_problems, load_problems, run_tests, write_samples
from dylo_moe.model import SETTINGS as GROWING_SETTINGS
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.training.comparison_report import MIXTURE
from dylo_moe.training.data import DataConfig, prepare
from moe_common.models.base_identity import BaseIdentity
from moe_common.models.base_model import Quantization, load_base_model
from moe_common.models.lm_eval_tasks import find_tasks, run_tasks
from moe_common.models.perplexity import measure_blocks
from moe_common.runs.checkpoints import BASE, check_base, weights_of
from moe_common.runs.commands import run_command
from moe_common.runs.options import OptionParser, check_at_least, split_names
from moe_common.runs.run_folder import RUN, Measured, RunFolder
from moe_common.runs.whole_files import check_free, check_writable, read_json
from moe_common.text.packing import keeps_documents_apart

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# Options that change nothing in what is measured, so that an evaluation may be continued with others.
FREE_SETTINGS = ("output", "samples", "allow_code_execution")


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured, of which checkpoint."""

    checkpoint: str = field(metadata={"help": "Folder of an adapter, or of a run of train.py.", "metavar": "FOLDER"})
    model_name: str | None = field(default=None, metadata={"help": "Base model. By default: that of the checkpoint."})
    quant: Quantization = field(default="none", metadata={"help": "Bits in which bitsandbytes holds the base."})
    datasets: str | None = field(
        default=None, metadata={"help": "Comma separated. By default: those of the run, else prose,code,math."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column of your own datasets that holds the text."}
    )
    eval_subset: float = field(default=100.0, metadata={"help": "Percent of the held-out documents to use."})
    eval_blocks: int | None = field(default=None, metadata={"help": "Rows of each dataset, at most; by default all."})
    eval_batch_size: int = field(default=8, metadata={"help": "Rows of a forward pass."})
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens in a row. By default: as in the run, else 256."}
    )
    separate_documents: bool | None = field(
        default=None, metadata={"help": "No attention across documents in a row. By default: as in the run, else yes."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the subsets."})
    tasks: str | None = field(default=None, metadata={"help": "Comma separated tasks of lm-eval (extra eval)."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    limit: int | None = field(
        default=None, metadata={"help": "Examples of each task, the first ones; by default all."}
    )
    humaneval: bool = field(default=False, metadata={"help": "Complete the HumanEval problems (extra eval)."})
    samples: str = field(
        default="humaneval_samples.jsonl", metadata={"help": "File for the completions of HumanEval."}
    )
    allow_code_execution: bool = field(
        default=False, metadata={"help": "Run what the model wrote, to score HumanEval; read the docs first."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results and these options."})

    def __post_init__(self) -> None:
        check_at_least(self, eval_batch_size=1, eval_blocks=1, limit=1)
        if self.include_path and not self.tasks:
            raise ValueError("include_path is set, but no tasks. Name those to run with --tasks.")
        if self.include_path and not Path(self.include_path).is_dir():
            raise FileNotFoundError(f"There is no folder {self.include_path} of task files. Check --include_path.")
        for name in ("output", "samples"):
            if getattr(self, name) and Path(getattr(self, name)).is_dir():
                raise ValueError(f"{name} is {getattr(self, name)}, which is a folder. Give the name of a file.")
        if self.allow_code_execution and not self.humaneval:
            raise ValueError("allow_code_execution is set, but nothing would be executed. Add --humaneval.")
        self.data  # noqa: B018 - checks the values that it is made of

    @property
    def task_names(self) -> list[str]:
        return split_names(self.tasks or "")

    @property
    def folder(self) -> Path:
        """Of the adapter: a run's mixture where a run is named."""
        folder = Path(self.checkpoint).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no checkpoint folder {folder}. Check --checkpoint.")
        for candidate in (folder, folder / MIXTURE):
            if (candidate / ADAPTER_CONFIG).is_file():
                return candidate
        raise ValueError(
            f"{folder} holds no {ADAPTER_CONFIG}, so it is no checkpoint of an adapter. Name the folder of an "
            "adapter, or of a run of train.py."
        )

    @property
    def data(self) -> DataConfig:
        """The held-out text, with what is not given taken from the run that the checkpoint lies in."""
        noted = self.folder.parent / RUN
        settings = read_json(noted).get("settings", {}) if noted.is_file() else {}
        held = settings.get("data", {})
        chosen = {
            name: getattr(self, name) if getattr(self, name) is not None else held[name]
            for name in ("datasets", "max_seq_length", "separate_documents", "text_column")
            if getattr(self, name) is not None or held.get(name) is not None
        }
        kept = {name: held[name] for name in ("as_text", "keep_truncated") if name in held}
        return DataConfig(eval_subset=self.eval_subset, eval_blocks=self.eval_blocks, **chosen, **kept)


def evaluate(config: EvaluateConfig) -> dict:
    """Measure what is asked for, or read what the same evaluation has found; an interrupted one is continued.

    Returns:
        `perplexity`: for each dataset that of the `base` and of the `checkpoint`; `tasks` and `humaneval` where asked.

    Raises:
        ValueError: the checkpoint is of another base model, or a dataset cannot be read.
        FileNotFoundError: a folder, file or model is not there.
        FileExistsError: `output` or `samples` is there, and not of this evaluation.
        ModuleNotFoundError: a task or HumanEval is asked for without the extra `eval`.
    """
    run = _run_of(config)
    if run is None:
        return _measure(config, lambda _, measure: measure())
    if config.output and run.is_done:
        logger.info(run.done)
        return read_json(config.output)
    with run:
        results = _measure(config, run.measured)
        if config.output:
            run.write_result(results)
        else:
            run.forget()
    return results


def _measure(config: EvaluateConfig, measured: Measured) -> dict:
    # Both fail before a model is loaded.
    problems = load_problems(limit=config.limit) if config.humaneval else None
    tasks = find_tasks(config.task_names, include_path=config.include_path) if config.tasks else None
    model, tokenizer = load_checkpoint(config)
    results: dict[str, Any] = {"perplexity": _perplexities(model, tokenizer, config, measured)}
    if tasks is not None:
        how = {"limit": config.limit, "batch_size": config.eval_batch_size}
        run = partial(run_tasks, model, tokenizer, config.task_names, tasks, **how)
        results["tasks"] = measured("tasks", run)
    if problems is not None:
        samples = complete_problems(model, tokenizer, problems, measured)
        write_samples(samples, Path(config.samples))
        results["humaneval"] = {"problems": len(samples), "samples": config.samples}
        if config.allow_code_execution:
            outcomes = run_tests(problems, samples)
            passed = sum(outcome is Outcome.PASSED for outcome in outcomes.values())
            results["humaneval"] |= {
                "pass@1": passed / len(samples),
                "outcomes": {task: outcome.value for task, outcome in outcomes.items()},
            }
    return results


def _run_of(config: EvaluateConfig) -> RunFolder | None:
    """What keeps the findings of an evaluation: beside its results or its completions, where it writes any."""
    beside = config.output or (config.samples if config.humaneval else None)
    if beside is None:
        return None
    option = "--output" if config.output else "--samples"
    settings = {**asdict(config), "weights": weights_of(config.folder)}
    run = RunFolder.beside(beside, "dylo_moe.evaluate", settings, free=FREE_SETTINGS, option=option)
    if config.humaneval and not run.is_begun and not (config.output and run.is_done):
        check_writable(config.samples)
        check_free(Path(config.samples))
    return run


def load_checkpoint(config: EvaluateConfig):
    """The adapter on its base model, in eval mode and on the GPU where there is one, and the tokenizer.

    Raises:
        ValueError: `model_name` is another base than the adapter was trained on.
    """
    folder = config.folder
    adapter = read_json(folder / ADAPTER_CONFIG)
    noted = read_json(folder / BASE) if (folder / BASE).is_file() else {}
    name = config.model_name or noted.get("name") or adapter.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder} does not say which base model it was trained on. Name it with --model_name.")
    base, tokenizer = load_base_model(name, quant=config.quant)
    check_base(folder, BaseIdentity.of(base, name))
    grows = (folder / GROWING_SETTINGS).is_file()
    try:
        model = DyLoRA_MoE.from_pretrained(folder, model=base) if grows else PeftModel.from_pretrained(base, folder)
    except RuntimeError as misfit:
        raise ValueError(
            f"{folder} does not fit the base model '{name}': {str(misfit).splitlines()[0]} It was trained on "
            f"'{adapter.get('base_model_name_or_path')}'. Give that as --model_name."
        ) from misfit
    if config.quant == "none" and torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer


def as_text(results: dict) -> str:
    """The results as tables a person reads."""
    perplexity = results["perplexity"]
    width = max(12, *(len(Path(name).name) for name in perplexity))
    lines = ["Held-out perplexity (lower is better)", "", f"{'':<{width}}{'base':>14}{'checkpoint':>14}"]
    for name, measured in perplexity.items():
        lines.append(f"{Path(name).name:<{width}}{measured['base']:>14.2f}{measured['checkpoint']:>14.2f}")
    for task, metrics in results.get("tasks", {}).items():
        lines.append("")
        lines += [f"{task}: {metric} {value:.4f}" for metric, value in metrics.items()]
    if humaneval := results.get("humaneval"):
        lines += ["", f"HumanEval: {humaneval['problems']} completions lie in {humaneval['samples']}"]
        if "pass@1" in humaneval:
            lines.append(f"HumanEval: pass@1 {humaneval['pass@1']:.3f}")
        else:
            lines.append("HumanEval: nothing was executed; --allow_code_execution runs the tests and scores them")
    return "\n".join(lines)


def _perplexities(model, tokenizer, config: EvaluateConfig, measured: Measured) -> dict[str, dict[str, float]]:
    data = config.data
    apart = data.separate_documents and keeps_documents_apart(model.get_base_model())

    def measure(name: str) -> dict[str, float]:
        logger.info("measuring %s", name)
        rows = prepare(name, "test", tokenizer, data, seed=config.seed, apart=apart, max_rows=config.eval_blocks).rows
        with model.disable_adapter():
            base = measure_blocks(model, rows, batch_size=config.eval_batch_size).perplexity
        found = measure_blocks(model, rows, batch_size=config.eval_batch_size).perplexity
        return {"base": base, "checkpoint": found}

    return {name: measured(f"perplexity of {name}", partial(measure, name)) for name in data.domains}


def evaluate_and_say(config: EvaluateConfig) -> str:
    results = evaluate(config)
    where = f"\n\nresults   {config.output}" if config.output else ""
    return f"{as_text(results)}{where}"


def main(argv: list[str] | None = None) -> int:
    description, examples, *_ = __doc__.split("\n\n")
    parser = OptionParser(
        (EvaluateConfig,),
        prog="python -m dylo_moe.evaluate",
        description=description,
        epilog=f"examples:\n{examples}",
    )
    return run_command(parser, evaluate_and_say, argv)
