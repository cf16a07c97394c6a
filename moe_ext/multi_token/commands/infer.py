"""`infer`: continue one prompt, streaming, and say what it took."""

import logging
from pathlib import Path
from time import perf_counter

import torch
from transformers import TextStreamer

from moe_ext.multi_token.decoding.generation import costs_of, generate
from moe_ext.multi_token.decoding.planning import OpenGates, Planner
from moe_ext.multi_token.decoding.quality import negative_log_likelihood
from moe_ext.multi_token.model.storage import load
from moe_ext.multi_token.options import InferOptions
from moe_ext.multi_token.training.data import prompt_tokens

logger = logging.getLogger(__name__)


def infer(options: InferOptions) -> None:
    """Print the continuation to stdout as it comes, and to the log what it took.

    Raises:
        ValueError: no such checkpoint, or one of another backbone.
        FileNotFoundError: a folder that is not there.
    """
    model, tokenizer, meta = load(Path(options.ckpt), backbone_name=options.model, quant=options.quant)
    torch.manual_seed(options.seed)
    as_question = meta.options.get("pairs", False) if options.as_question is None else options.as_question
    tokens = prompt_tokens(options.prompt, tokenizer) if as_question else tokenizer(options.prompt)["input_ids"]
    prompt_BL = torch.tensor([tokens])
    sampling = {"temperature": options.temperature, "do_sample": True} if options.temperature else {"do_sample": False}
    asked = {
        "attention_mask": torch.ones_like(prompt_BL),
        "max_new_tokens": options.max_tokens,
        "stop_strings": options.stop,
        "tokenizer": tokenizer,
        **sampling,
    }
    asked["sources"] = ("heads", "copies") if options.copy and options.mode == "lossless" else ("heads",)
    plan = Planner(costs_of(model, asked["sources"])) if options.mode == "lossless" else OpenGates()
    start = perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=as_question, skip_special_tokens=True)
    decoding = generate(model, prompt_BL, mode=options.mode, plan=plan, streamer=streamer, **asked)
    seconds = perf_counter() - start
    report = decoding.report
    logger.info(
        "%d tokens in %d passes of the backbone (%.2f a pass), %.0f tokens/s",
        report.tokens,
        report.passes,
        report.tokens_per_pass,
        report.tokens / seconds,
    )
    if options.mode == "fast":
        greedy = generate(model, prompt_BL, **asked)
        logger.info(
            "negative log-likelihood under the backbone: %.3f nats a token; of its own output: %.3f",
            negative_log_likelihood(model, decoding.sequences, prompt_BL.shape[1]),
            negative_log_likelihood(model, greedy.sequences, prompt_BL.shape[1]),
        )
