"""Train the small OLMoE-type mixture of experts that is committed in moe_ext/small_moe.

    python scripts/train_small_moe.py --run_folder runs/small_moe

The schedule, the text and the checkpoints are those of scripts/train_base.py: a run that is interrupted continues with
the same command. The model reads the `pretraining` split of the three domains alone, with the committed tokenizer, so
that `train` is new to it: calibration and finetuning text is text it has not seen, as a user's own would be.

The balance loss is that of the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, equation 4), layer by layer.
transformers' own sums the layers' counts before it multiplies, which lets expert 3 starve in one layer as long as
expert 3 of another is overfed.

Shape letters: B blocks, L tokens in a block, T tokens of a batch, E experts, K chosen experts a token.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from train_base import BaseTrainingConfig, train
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from moe_common.models.base_model import COMMITTED_FOLDER as BASE_FOLDER
from moe_common.runs.commands import run_command
from moe_common.runs.options import OptionParser
from moe_common.runs.whole_files import write_json
from moe_common.text.domains import DOMAINS
from moe_common.text.packing import pack_documents

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COUNTED_BLOCKS = 16  # of each domain's validation text, for the share of the tokens that each expert gets


@dataclass(kw_only=True)
class SmallMoeTrainingConfig(BaseTrainingConfig):
    output: str = field(
        default="moe_ext/small_moe", metadata={"help": "Folder that receives the tokenizer, the model and its report."}
    )
    steps: int = field(default=3600, metadata={"help": "Optimiser steps in all, those of earlier runs included."})
    blocks_per_step: int = field(default=8, metadata={"help": "Blocks in an optimiser step."})
    # torch's Muon takes matrices alone, and the experts of a layer are one 3-D parameter.
    optimizer: Literal["muon", "adamw"] = field(
        default="adamw", metadata={"help": "Optimiser of the matrices; experts always have adamw."}
    )
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak rate of every parameter."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of the linear warm-up."})
    balance_coefficient: float = field(default=0.02, metadata={"help": "Weight of the balance loss of each layer."})


def build_model(tokenizer, *, context: int) -> OlmoeForCausalLM:
    """An untrained OLMoE of 4 layers, width 128 and 8 experts of 128, two of them a token: 2.4 million parameters."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        **SHAPE,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.0,  # `balance_loss` takes its place
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = OlmoeForCausalLM(config)
    # On a CPU the loop over experts is a little slower, and `batched_mm` many times.
    model.set_experts_implementation("grouped_mm")
    return model


def balance_loss(router_logits_TE: Tensor, *, top_k: int) -> Tensor:
    """1 when every expert gets the same share of the tokens and of the probability, more when one is preferred."""
    num_experts = router_logits_TE.shape[-1]
    probabilities_TE = router_logits_TE.float().softmax(dim=-1)
    chosen_TK = probabilities_TE.topk(top_k, dim=-1).indices
    share_E = torch.bincount(chosen_TK.flatten(), minlength=num_experts) / chosen_TK.numel()
    return num_experts * (share_E * probabilities_TE.mean(dim=0)).sum()


def balanced_loss(model: OlmoeForCausalLM, tokens_BL: Tensor, *, coefficient: float) -> Tensor:
    """Next-token loss, and beside it the mean balance loss of the layers, so much weighted."""
    outputs = model(input_ids=tokens_BL, labels=tokens_BL, use_cache=False, output_router_logits=True)
    top_k = model.config.num_experts_per_tok
    balance = [balance_loss(logits_TE, top_k=top_k) for logits_TE in outputs.router_logits]
    return outputs.loss + coefficient * torch.stack(balance).mean()


@torch.no_grad()
def expert_shares(folder: Path) -> list[list[float]]:
    """The share of the validation tokens' choices that each expert of each layer gets; balanced is 1 / E."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, counts_of = model.config, [0] * model.config.num_hidden_layers
    for documents in DOMAINS.values():
        blocks = pack_documents(
            (document["text"] for document in documents("validation")),
            tokenizer,
            block_size=config.max_position_embeddings,
            keep_remainder=False,
        )
        tokens_BL = torch.tensor(blocks[:COUNTED_BLOCKS]["input_ids"])
        for layer, logits_TE in enumerate(model(tokens_BL, output_router_logits=True).router_logits):
            chosen_TK = logits_TE.topk(config.num_experts_per_tok, dim=-1).indices
            counts_of[layer] = counts_of[layer] + torch.bincount(chosen_TK.flatten(), minlength=config.num_experts)
    return [[round(share, 4) for share in (counts_E / counts_E.sum()).tolist()] for counts_E in counts_of]


def train_small_moe(config: SmallMoeTrainingConfig) -> dict:
    """Train, write the model into config.output, and return the report that is written beside it."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(BASE_FOLDER / name, output / name)
    report = train(
        config,
        command="train_small_moe.py",
        build_model=build_model,
        loss_of=partial(balanced_loss, coefficient=config.balance_coefficient),
    )
    if report.get("finished", True):
        report["expert_shares_of_validation_tokens"] = expert_shares(output)
        write_json(output / "training_report.json", report)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = OptionParser(
        (SmallMoeTrainingConfig,),
        description=__doc__.splitlines()[0],
        epilog="example:\npython scripts/train_small_moe.py --run_folder runs/small_moe --bf16",
    )
    return run_command(parser, lambda config: json.dumps(train_small_moe(config), indent=2), argv)


if __name__ == "__main__":
    sys.exit(main())
