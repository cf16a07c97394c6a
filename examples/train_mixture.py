"""Train a mixture of LoRA experts with TRL's SFTTrainer, save it, load it, let it write.

    python examples/train_mixture.py                                          # the committed base, a few minutes
    python examples/train_mixture.py --model owner/name --data owner/dataset --steps 1000 --output out/mine

The mixture is one `peft_config`, as a plain LoRA would be; SFTTrainer knows nothing of routing.
"""

import torch
from peft import AutoPeftModelForCausalLM, MoELoraConfig
from trl import SFTConfig, SFTTrainer

from dylo_moe.model_card import describe_mixture, measure_and_describe
from moe_common.models.base_model import load_base_model
from moe_common.runs.options import PlainParser
from moe_common.text.documents import load_documents


def main(argv: list[str] | None = None) -> None:
    parser = PlainParser(
        __doc__.split("\n\n")[0], example="python examples/train_mixture.py --data notes.jsonl --num_experts 8"
    )
    parser.add_argument("--model", default="base", help="base (committed), smollm2-135m, a folder or a hub id")
    parser.add_argument("--data", default="prose", help="prose, code, math, a file, a folder or a hub dataset")
    parser.add_argument("--num_experts", type=int, default=4, help="LoRA experts")
    parser.add_argument("--top_k", type=int, default=2, help="experts kept for each token")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--output", default="out/mixture", help="folder of the mixture")
    options = parser.parse_args(argv)

    held_out = {options.data: load_documents(options.data, "test")["text"]}
    base, tokenizer = load_base_model(options.model)  # or AutoModelForCausalLM and AutoTokenizer .from_pretrained
    mixture = MoELoraConfig(
        num_experts=options.num_experts,
        top_k=options.top_k,
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        router_scope="block",  # one gate for each decoder block
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=base,
        peft_config=mixture,
        args=SFTConfig(
            options.output,
            max_steps=options.steps,
            max_length=options.max_length,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=10,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            report_to="none",
        ),
        train_dataset=load_documents(options.data).select_columns("text"),
        processing_class=tokenizer,
    )
    trainer.train()  # the router's balance loss is part of the loss
    describe_mixture(trainer.model, options.output, base_name=options.model)  # its model card
    trainer.save_model(options.output)  # experts and router, not the base
    facts = {"data": options.data, "steps": options.steps}
    print(measure_and_describe(trainer.model, tokenizer, options.output, held_out, facts))  # perplexity, for the card

    model = AutoPeftModelForCausalLM.from_pretrained(options.output)
    prompt = tokenizer("The river", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]))
    model(**prompt)
    for gate, summary in model.routing_summary().items():  # of the last forward pass
        print(gate, {expert: f"{share:.0%}" for expert, share in summary["usage"].items()})
    print(f"The mixture lies in {options.output}")


if __name__ == "__main__":
    main()
