# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Train a mixture of LoRA experts with its router, or only a router over LoRA adapters that exist already."""

import argparse
import os

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from peft import MoELoraConfig, get_peft_model


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--dataset_name", required=True, help="Hub id, or a local .txt, .json or .jsonl file")
    parser.add_argument("--text_column", default="text", help="column that holds the text (default: %(default)s)")
    parser.add_argument("--experts", nargs="+", metavar="NAME=ADAPTER", help="LoRA adapters to compose, kept frozen")
    parser.add_argument("--num_experts", type=int, default=4, help="experts to make (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=2, help="experts for each token (default: %(default)s)")
    parser.add_argument("--r", type=int, default=16, help="rank of each expert to make (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of an example (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=200, help="training steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="examples a step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="peak rate (default: %(default)s)")
    parser.add_argument("--output_dir", required=True, help="folder for the trained mixture")
    args = parser.parse_args(argv)
    if args.experts and not all("=" in expert for expert in args.experts):
        parser.error("--experts takes NAME=ADAPTER, for instance: --experts math=path/to/math code=path/to/code")
    return args


def mixture_config(args):
    common = {"top_k": args.top_k, "task_type": "CAUSAL_LM"}
    if args.experts:
        experts = dict(expert.split("=", 1) for expert in args.experts)
        return MoELoraConfig(experts=experts, train_experts=False, router_init="experts", **common)
    return MoELoraConfig(
        num_experts=args.num_experts, r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", **common
    )


def load_texts(args, tokenizer):
    if os.path.isfile(args.dataset_name):
        kind = "text" if args.dataset_name.endswith(".txt") else "json"
        dataset = load_dataset(kind, data_files=args.dataset_name, split="train")
    else:
        dataset = load_dataset(args.dataset_name, split="train")

    def tokenize(batch):
        return tokenizer(batch[args.text_column], truncation=True, max_length=args.max_length)

    tokenized = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)
    return tokenized.filter(lambda example: len(example["input_ids"]) > 1)


def main(argv=None):
    args = parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.base_model), mixture_config(args))
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_texts(args, tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    for site, measured in model.routing_summary().items():
        print(site, {name: round(share, 2) for name, share in measured["usage"].items()})
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
