"""Train a mixture on a base whose frozen weights are held in 4 or 8 bits (bitsandbytes), as in QLoRA.

    python examples/quantized_base.py                              # the committed base in 8 bits, on a CPU
    python examples/quantized_base.py --model owner/name --bits 4 --steps 1000 --output out/mine

Experts and router are trained in float32 beside it. What is saved holds no weight of the base and loads onto it at any
precision.
"""

import torch
from peft import MoELoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from dylo_moe.model_card import describe_mixture, measure_and_describe
from moe_common.models.base_model import resolve_model_name
from moe_common.runs.options import PlainParser
from moe_common.text.documents import load_documents, pack_documents


def main(argv: list[str] | None = None) -> None:
    parser = PlainParser(
        __doc__.split("\n\n")[0], example="python examples/quantized_base.py --model smollm2-135m --bits 4"
    )
    parser.add_argument("--model", default="base", help="base (committed), smollm2-135m, a folder or a hub id")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8, help="bits of a frozen weight")
    parser.add_argument("--data", default="prose", help="prose, code, math, a file, a folder or a hub dataset")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--output", default="out/quantized", help="folder of the mixture")
    options = parser.parse_args(argv)

    held_out = {options.data: load_documents(options.data, "test")["text"]}
    where = resolve_model_name(options.model)
    tokenizer = AutoTokenizer.from_pretrained(where)
    if options.bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )

    def load_base():
        return AutoModelForCausalLM.from_pretrained(where, quantization_config=quantization, dtype=torch.float32)

    base = prepare_model_for_kbit_training(load_base(), gradient_checkpointing_kwargs={"use_reentrant": False})
    config = MoELoraConfig(
        num_experts=4, top_k=2, r=8, target_modules="all-linear", router_scope="block", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    rows = pack_documents(load_documents(options.data)["text"][:400], tokenizer, block_size=128)
    arguments = TrainingArguments(
        options.output, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-3, report_to="none"
    )
    Trainer(model, arguments, train_dataset=rows).train()
    describe_mixture(model, options.output, base_name=options.model)  # its model card
    model.save_pretrained(options.output)
    facts = {"data": options.data, "steps": options.steps, "quantised base": f"{options.bits}bit"}
    print(measure_and_describe(model, tokenizer, options.output, held_out, facts))  # perplexity, for the card too

    model = PeftModel.from_pretrained(load_base(), options.output)
    prompt = tokenizer("The river", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]))
    print(f"The mixture lies in {options.output}")


if __name__ == "__main__":
    main()
