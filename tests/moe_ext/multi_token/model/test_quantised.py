import json

import pytest
from tiny_models import tiny_folder

from moe_ext.multi_token.__main__ import main
from moe_ext.multi_token.decoding.generation import generate
from moe_ext.multi_token.decoding.planning import FixedPlan
from moe_ext.multi_token.model.storage import load

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory):
    """A random backbone whose layers read multiples of 64 numbers, as 4 bits on a CPU need."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    return tiny_folder(tmp_path_factory.mktemp("backbone"), **sizes)


@pytest.mark.parametrize("quant", ["4bit", "8bit"])
def test_heads_train_and_draft_beside_a_quantised_backbone(backbone_folder, tmp_path, quant):
    data = tmp_path / "qa.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"What is {n}?", "response": f"{n}."}) for n in range(20)))
    words = [f"--model={backbone_folder}", f"--data={data}", f"--out={tmp_path / 'out'}", f"--quant={quant}"]
    assert main(["train", *words, "--stage1_epochs=0.2", "--stage2_epochs=0.2", "--length=32"]) == 0
    model, tokenizer, meta = load(tmp_path / "out" / "s2", quant=quant)
    assert meta.options["quant"] == quant
    kinds = {type(module).__name__ for module in model.backbone.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quant] in kinds
    prompt = tokenizer("The river", return_tensors="pt")
    asked = {**prompt, "max_new_tokens": 10, "do_sample": False}
    decoding = generate(model, plan=FixedPlan(2), **asked)
    assert decoding.report.passes <= decoding.report.tokens
    assert decoding.sequences.shape == model.backbone.generate(**asked).shape
