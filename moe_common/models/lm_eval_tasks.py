"""Tasks of the evaluation harness lm-eval on a model that is loaded already (extra `eval`).

Task files of one's own (a folder of YAML files, with data files beside them) need no hub; the harness's own tasks
fetch their data from it.
"""

from typing import Any


def find_tasks(names: list[str], *, include_path: str | None):
    """The harness's list of tasks, those of one's own included, which holds all that are named.

    Args:
        names: of tasks or groups.
        include_path: folder with further task files.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: a task that the harness does not know.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"Tasks are run by lm-eval, of which the package {missing.name} is not installed. Install it with: "
            "pip install '.[eval]'"
        ) from missing
    manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        where = f" nor a task file in {include_path}" if include_path else ""
        raise ValueError(
            f"{', '.join(unknown)} is no task of lm-eval{where}. List them with: lm-eval ls tasks; or name the folder "
            "of your own with --include_path."
        )
    return manager


def run_tasks(
    model, tokenizer, names: list[str], manager, *, limit: int | None, batch_size: int
) -> dict[str, dict[str, float]]:
    """Run tasks by name.

    Args:
        model: a causal language model, with or without PEFT adapters; it stays as it is.
        tokenizer: its tokenizer.
        names: of tasks or groups that the manager holds.
        manager: what `find_tasks` gave.
        limit: only the first so many examples of each.
        batch_size: examples at once.

    Returns:
        For each task its metrics by name.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    measured: dict[str, Any] = simple_evaluate(
        model=harness, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}
        for task, metrics in measured["results"].items()
    }
