"""Put LoRA adapters that you have behind one router, and train the router alone.

    python examples/compose_adapters.py                       # first makes two small adapters, prose and math
    python examples/compose_adapters.py --experts math=me/math-lora code=out/code --model owner/name --data math,code

The adapters may differ in rank, alpha and target modules, and stay as they are, bit for bit.
"""

from pathlib import Path

from datasets import concatenate_datasets
from peft import LoraConfig, MoELoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from dylo_moe.model_card import describe_lora, describe_mixture, measure_and_describe
from moe_common.models.base_model import load_base_model
from moe_common.runs.options import PlainParser, split_names
from moe_common.text.documents import load_documents, pack_documents


def main(argv: list[str] | None = None) -> None:
    example = "python examples/compose_adapters.py --experts a=out/a b=out/b --data a.jsonl,b.jsonl"
    parser = PlainParser(__doc__.split("\n\n")[0], example=example)
    parser.add_argument("--experts", nargs="+", metavar="NAME=WHERE", help="adapters: folder or hub id of each")
    parser.add_argument("--model", default="base", help="base (committed), smollm2-135m, a folder or a hub id")
    parser.add_argument("--data", default="prose,math", help="domains, files, folders or hub ids, separated by commas")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each training")
    parser.add_argument("--output", default="out/composed", help="folder of the mixture")
    options = parser.parse_args(argv)

    base, tokenizer = load_base_model(options.model)
    output, sources = Path(options.output), split_names(options.data)
    held_out = {source: load_documents(source, "test")["text"] for source in sources}

    def train(model, names: list[str], folder: Path, rate: float) -> None:
        parts = (pack_documents(load_documents(name)["text"][:400], tokenizer, block_size=128) for name in names)
        arguments = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=rate, report_to="none"
        )
        Trainer(model, arguments, train_dataset=concatenate_datasets(list(parts))).train()
        model.save_pretrained(folder)

    experts = dict(expert.split("=", 1) for expert in options.experts or [])
    if not experts:  # none were named: make one for each dataset, of different ranks
        for rank, source in enumerate(sources, start=4):
            config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            adapter, folder = get_peft_model(base, config), output / "experts" / Path(source).stem
            describe_lora(adapter, folder, base_name=options.model)  # its model card
            train(adapter, [source], folder, rate=1e-3)
            experts[folder.name] = str(folder)
            base = adapter.unload()  # the base again, without the adapter

    config = MoELoraConfig(
        experts=experts,
        train_experts=False,
        top_k=1,
        router_selection="hybrid",  # one expert a token in use; all weighed in training, or nothing could be learnt
        router_balance_coef=0.3,  # an even load: there is about as much of each dataset
        router_scope="block",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()  # the router alone
    describe_mixture(model, output, base_name=options.model)
    train(model, sources, output, rate=5e-3)
    print(measure_and_describe(model, tokenizer, output, held_out, {"data": options.data, "steps": options.steps}))

    model.eval()
    for source in sources:  # which expert takes what
        text = "\n".join(held_out[source][:20])
        model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=512).to(model.device))
        usage = [summary["usage"] for summary in model.routing_summary().values()]
        shares = {expert: sum(gate[expert] for gate in usage) / len(usage) for expert in experts}
        print(source, {expert: f"{share:.0%}" for expert, share in shares.items()})
    print(f"The mixture, with its experts, lies in {output}")


if __name__ == "__main__":
    main()
