"""DyLoRA-MoE: a mixture of LoRA experts that grows with the skills it meets, on top of the PEFT fork's routed LoRA.

    from dylo_moe import DyLoRA_MoE

    model = DyLoRA_MoE("base", num_experts=4)

What else you need, import from the module that holds it:

    dylo_moe.model        the mixture (`DyLoRA_MoE`), with its `ExpertManager` and its `DynamicHybridRouter`
    dylo_moe.skills       the skills it has met (`SkillLibrary`); `dylo_moe.continual.novelty` tells known from new
    dylo_moe.continual.run    skills learnt one after another (`run`)
    dylo_moe.training.trainer     train an adapter: resumable, routing watched (`train_adapter`, `TrainingConfig`)
    dylo_moe.xlora        an X-LoRA of PEFT, taken over exactly (`load_xlora`)
    dylo_moe.evaluate.command     perplexity by domain, lm-eval, HumanEval (`python -m dylo_moe.evaluate`)

Text and base models come from the package `moe_common`.
"""

import importlib

# Imported when first asked for: `import dylo_moe` alone loads neither torch nor transformers.
_WHERE = {
    "DyLoRA_MoE": "dylo_moe.model",
    "DynamicHybridRouter": "dylo_moe.router",
    "ExpertManager": "dylo_moe.experts",
    "NoveltyDetector": "dylo_moe.continual.novelty",
    "SkillLibrary": "dylo_moe.skills",
    "TwoPhaseLRScheduler": "dylo_moe.continual.lr_schedule",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'dylo_moe' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
