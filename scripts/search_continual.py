"""Choose the settings of `train.py --continual` on validation text, the baselines' with the same care.

    python scripts/search_continual.py --continual prose code math --output_dir runs/search

The mixture and the LoRA on all at once are judged by the mean validation perplexity over all skills in the end. The
LoRA in sequence is judged by that of each skill when it has just been learnt: whoever finetunes in sequence does not
know what is to come, and judged by the end it would choose to learn next to nothing. The peak learning rate is doubled
and halved, from 2e-3 on, until the best one has a worse neighbour on either side; so is the weight decay of the
router, which is fitted anew in the best mixture. No test text is read. What is on disk is not made again: a search
that was interrupted goes on when it is started again with the same options.
"""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from dylo_moe.continual.baselines import train_in_sequence, train_joint
from dylo_moe.continual.report import NAMES, mean_perplexity
from dylo_moe.continual.router_replay import RouterReplay, refit_router
from dylo_moe.continual.run import ContinualConfig, read_texts, run
from dylo_moe.model import DyLoRA_MoE
from moe_common.models.base_model import load_base_model
from moe_common.models.perplexity import measure_blocks
from moe_common.runs.allocator import keep_freed_memory
from moe_common.runs.bracketing import bracket, lowest
from moe_common.runs.commands import run_command
from moe_common.runs.options import OptionParser
from moe_common.runs.run_folder import RunFolder
from moe_common.runs.whole_files import write_text

logger = logging.getLogger("search_continual")

FIRST_RATE, FIRST_DECAY = 2e-3, 0.1
TABLE = "search.md"
IN_THE_END = "the same, in the end"  # shown beside the option it belongs to, not chosen by

Nll = dict[str, float]  # nats a token of each skill in the end


def search(config: ContinualConfig) -> dict[tuple[str, str], dict[float, Nll]]:
    """Measure all settings.

    Args:
        config: the settings that are not searched.

    Returns:
        For each system and option, what each of its values came to.

    Raises:
        ValueError: unknown or too little data, or an output folder with a search of other settings.
    """
    output = Path(config.output_dir)
    config = replace(config, eval_split="validation", baselines=False, router_weight_decay=FIRST_DECAY)
    # of no effect on the mixture, but named here so that a search does not depend on what an earlier one has chosen
    config = replace(config, sequential_learning_rate=FIRST_RATE, joint_learning_rate=FIRST_RATE)

    def mixture(rate: float) -> dict:
        return run(replace(config, learning_rate=rate, output_dir=str(output / f"mixture-{rate:g}")))

    def refitted(decay: float) -> Nll:
        model = DyLoRA_MoE.from_pretrained(best, load_base_model(config.model_name)[0].to(config.device))
        refit_router(model, RouterReplay.load(best), weight_decay=decay)
        return {skill: measure_blocks(model, text.measured).mean_nll for skill, text in texts.items()}

    measured = {}
    rates = searched(lambda rate: mixture(rate)["mean_nll"]["mixture"][-1], FIRST_RATE, "mixture, learning rate")
    measured["mixture", "learning_rate"] = rates
    texts = read_texts(config, load_base_model(config.model_name)[1])
    best = output / f"mixture-{lowest(rates, mean_perplexity):g}" / "mixture" / f"{len(config.continual):02d}"
    measured["mixture", "router_weight_decay"] = searched(refitted, FIRST_DECAY, "mixture, router weight decay")
    size = mixture(lowest(rates, mean_perplexity))["trained_parameters"]["mixture"]

    in_the_end = {}

    def in_sequence(rate: float) -> Nll:
        settings = replace(config, sequential_learning_rate=rate)
        folder = output / f"sequential-{rate:g}"
        visits = train_in_sequence(settings, folder, texts=texts, num_parameters=size)["mean_nll"]
        in_the_end[rate] = visits[-1]
        return {skill: nll[skill] for skill, nll in zip(config.continual, visits, strict=True)}

    def on_all(rate: float) -> Nll:
        settings = replace(config, joint_learning_rate=rate)
        return train_joint(settings, output / f"joint-{rate:g}", texts=texts, num_parameters=size)["mean_nll"]

    measured["sequential", "sequential_learning_rate"] = searched(in_sequence, FIRST_RATE, "in sequence, rate")
    measured["sequential", IN_THE_END] = dict(sorted(in_the_end.items()))
    measured["joint", "joint_learning_rate"] = searched(on_all, FIRST_RATE, "all at once, rate")
    return measured


def searched(measure: Callable[[float], Nll], first: float, name: str) -> dict[float, Nll]:
    """`bracket` by the mean perplexity, with a line in the log for each value of the setting of this name."""

    def logged(value: float) -> Nll:
        nll = measure(value)
        logger.info("%s %g: mean validation perplexity %.2f", name, value, mean_perplexity(nll))
        return nll

    return bracket(logged, first, score=mean_perplexity)


def as_text(measured: dict[tuple[str, str], dict[float, Nll]]) -> str:
    """A Markdown table of all settings, and the best of each as options of train.py."""
    skills = list(next(iter(next(iter(measured.values())).values())))
    lines = ["Validation perplexity in the end; in sequence, of each skill when just learnt", ""]
    lines += [f"| | option | value | {' | '.join(Path(skill).name for skill in skills)} | mean |"]
    lines += ["|" + " --- |" * (len(skills) + 4)]
    for (system, option), by_value in measured.items():
        for value, nll in by_value.items():
            cells = [NAMES[system], option, f"{value:g}", *(f"{math.exp(nll[skill]):.2f}" for skill in skills)]
            lines.append(f"| {' | '.join(cells)} | {mean_perplexity(nll):.2f} |")
    best = [
        f"--{option} {lowest(by_value, mean_perplexity):g}"
        for (_, option), by_value in measured.items()
        if option != IN_THE_END
    ]
    return "\n".join([*lines, "", f"best: {' '.join(best)}"]) + "\n"


def search_and_write(config: ContinualConfig) -> str:
    table = Path(config.output_dir) / TABLE
    searched_over = ("learning_rate", "sequential_learning_rate", "joint_learning_rate", "router_weight_decay")
    unused = ("output_dir", "eval_split", "baselines")
    with RunFolder(config.output_dir, "search_continual.py", asdict(config), free=(*searched_over, *unused)):
        text = as_text(search(config))
        write_text(table, text)
    return f"{text}\ntable   {table}"


def main(argv: list[str] | None = None) -> int:
    about, _, example = __doc__.splitlines()[:3]
    parser = OptionParser((ContinualConfig,), description=about, epilog=f"example:\n{example.strip()}")
    keep_freed_memory()
    return run_command(parser, search_and_write, argv)


if __name__ == "__main__":
    sys.exit(main())
