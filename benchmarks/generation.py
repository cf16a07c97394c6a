"""Greedy generation with a KV cache: new tokens a second. X-LoRA has no cache; separate passes keep one each."""

from functools import partial

import torch

from benchmarks.models import Setting, random_tokens
from benchmarks.parts import build, group
from benchmarks.ways import Run, base_alone, lora, passes, routed, xlora


def generation(setting: Setting, rounds: int) -> dict:
    """Time `generate` of each way; the rows' `tokens` are the new ones of a call.

    Raises:
        RuntimeError: a routed model generates other tokens with the cache than without it, or too few.
    """
    size = setting.size
    ways = [
        base_alone(),
        lora(size.rank),
        lora(8 * size.rank),
        routed(8, rank=size.rank),
        routed(8, 2, rank=size.rank),
        routed(8, 2, rank=size.rank, scope="block"),
        routed(8, 2, rank=size.rank, scope="model"),
        passes(8, rank=size.rank),
        xlora(4, rank=size.rank),
        xlora(8, rank=size.rank),
    ]
    runs = build(ways, setting, training=False)
    prompt = random_tokens(size.vocab, size.prompt, setting.device)
    expected = size.prompt + size.new_tokens
    for name, run in runs.items():
        generated = run.generate(prompt, size.new_tokens)
        if generated.shape != (1, expected):
            raise RuntimeError(f"{name} generated {generated.shape[1]} tokens with the prompt, not {expected}.")
    checks = [check_against_full_passes(runs["routed-8-top2"], prompt, size.new_tokens, setting.dtype)]
    actions = {name: partial(run.generate, prompt, size.new_tokens) for name, run in runs.items()}
    title = f"Generation of {size.new_tokens} tokens after {size.prompt}, over one LoRA of rank {size.rank}"
    timed = group("generation", title, f"lora-r{size.rank}", ways, actions, rounds)
    for row in timed["rows"]:
        row["tokens"] = size.new_tokens
    return {"groups": [timed], "checks": checks}


@torch.no_grad()
def check_against_full_passes(run: Run, prompt: torch.Tensor, new_tokens: int, dtype: str) -> dict:
    """Every generated token is the likeliest after a full pass over what stands before it.

    The two passes round differently, so a token may also be one whose logit is that close to the likeliest.

    Raises:
        RuntimeError: one is not.
    """
    tokens = run.generate(prompt, new_tokens)
    logits = run.logits(tokens)[0, prompt.shape[1] - 1 : -1].float()
    chosen = tokens[0, prompt.shape[1] :]
    gap = logits.max(dim=-1).values - logits.gather(-1, chosen[:, None])[:, 0]
    found, tolerance = gap.max().item(), (1e-3 if dtype == "float32" else 1e-1)
    if not found <= tolerance:
        raise RuntimeError(f"A token generated with the cache is {found:.3g} below the likeliest without it.")
    return {"check": "generate with the cache = without", "difference": found, "tolerance": tolerance}
