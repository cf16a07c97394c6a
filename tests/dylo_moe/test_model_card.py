"""What a card says is true of the adapter beside it, and stays so when the adapter changes."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, MoELoraConfig, get_peft_model
from tiny_models import tiny_mixture

from dylo_moe import DyLoRA_MoE
from dylo_moe.model_card import CARD, describe_mixture, describe_training, measure_and_describe
from moe_common.models.base_model import load_base_model
from moe_common.models.perplexity import measure_texts


def card_rows(folder) -> dict[str, str]:
    """The rows of the card's tables: first cell -> the others."""
    rows = re.findall(r"^\| ([^|]+?) \| (.+) \|$", (folder / CARD).read_text(), flags=re.M)
    return dict(rows)


@pytest.fixture
def model() -> DyLoRA_MoE:
    return tiny_mixture(num_experts=2)


def test_the_card_counts_what_was_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    rows = card_rows(tmp_path)
    counted = [sum(p.numel() for p in model.experts.parameters_of(name)) for name in ("expert_0", "expert_1")]
    gates = sum(p.numel() for p in model.router.attached.parameters())
    assert rows["parameters"] == f"{sum(counted):,} in the experts, {gates:,} in the router"
    config = model.peft_config["expert_1"]
    targets = ", ".join(sorted(config.target_modules))
    assert rows["expert_1"] == f"{config.r} | {config.lora_alpha} | {targets} | {counted[1]:,}"
    assert f"{len(model.router.sites)} gates" in rows["router"]
    assert f"top-{model.router.top_k} of 2" in rows["router"]


def test_peft_adds_its_metadata_and_no_boilerplate(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert "More Information Needed" not in card.text
    assert "- PEFT " in card.text


def test_a_card_follows_the_mixture_and_keeps_what_a_user_wrote(model, tmp_path):
    model.save_pretrained(tmp_path)
    describe_training(tmp_path, {"data": "rain"}, {"base": {"rain": 2.5}}, measured_on="10 rows")
    path = tmp_path / CARD
    path.write_text(path.read_text().replace("## Load it", "## Load it\n\nlost").rstrip() + "\n\nMine.\n")
    model.experts.create_expert("law", r=3)
    model.save_pretrained(tmp_path)
    text = path.read_text()
    assert "# Mixture of 3 LoRA experts" in text and "# Mixture of 2" not in text
    assert card_rows(tmp_path)["law"].startswith("3 | ")
    assert (text.count("Mine."), text.count("lost"), text.count("| base | 2.50 |")) == (1, 0, 1)
    describe_training(tmp_path, {"data": "snow"}, {}, measured_on="nothing")
    assert "| base | 2.50 |" not in path.read_text()


def test_skills_are_named_with_their_experts(model, tmp_path):
    model.skills.add("rain", torch.randn(4, model.config.hidden_size), expert="expert_1")
    model.save_pretrained(tmp_path)
    assert card_rows(tmp_path)["rain"] == "expert_1 | 4"


def test_the_card_of_a_plain_mixture_says_how_it_loads_and_what_was_measured_of_what_is_saved(tiny_base, tmp_path):
    base, tokenizer = load_base_model(tiny_base)
    config = MoELoraConfig(
        num_experts=3, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(base, config)
    describe_mixture(model, tmp_path, base_name="tiny")
    model.save_pretrained(tmp_path)
    held_out = {"rain": ["rain falls on the hills"] * 9}
    measured = measure_and_describe(model, tokenizer, tmp_path, held_out, {"steps": 3})
    text, rows = (tmp_path / CARD).read_text(), card_rows(tmp_path)
    assert "AutoPeftModelForCausalLM" in text and "DyLoRA_MoE" not in text and "More Information Needed" not in text
    assert rows["base model"].startswith("`tiny`") and rows["expert_2"].startswith("2 | ") and rows["steps"] == "3"
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    found = measure_texts(again, tokenizer, held_out["rain"], block_size=256).perplexity
    assert measured["this adapter"]["rain"] == pytest.approx(found) != measured["base"]["rain"]
    assert rows["this adapter"] == f"{found:.2f}" and rows["base"] == f"{measured['base']['rain']:.2f}"
