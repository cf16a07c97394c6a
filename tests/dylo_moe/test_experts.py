"""`ExpertManager`: experts are made, activated, frozen and removed by name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_mixture, tiny_model, tokens

IDS = tokens(2, 9)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def training(model) -> set[str]:
    """The experts that have a trainable weight, and `router`."""
    names = model.experts.get_all_adapter_names()
    found = {name for name in names if any(p.requires_grad for p in model.experts.parameters_of(name))}
    return found | ({"router"} if all(p.requires_grad for p in model.router.attached.parameters()) else set())


def test_an_expert_is_named_by_the_first_free_number():
    experts = tiny_mixture(2).experts
    assert experts.create_expert() == "expert_2"
    experts.remove_expert("expert_0")
    assert experts.create_expert() == "expert_0"
    assert experts.get_all_adapter_names() == ["expert_1", "expert_2", "expert_0"]
    assert experts.num_experts == 3


def test_a_new_expert_takes_its_rank_and_keeps_the_scaling():
    model = tiny_mixture(2)
    model.experts.create_expert("law", r=2)
    config = model.peft_config["law"]
    assert (config.r, config.lora_alpha) == (2, 4)
    ranks = {p.shape[0] for name, p in model.named_parameters() if "lora_A.law" in name}
    assert ranks == {2}


def test_other_changes_of_a_new_expert_reach_its_config():
    model = tiny_mixture(2)
    model.experts.create_expert("law", r=2, lora_alpha=7, lora_dropout=0.5)
    config = model.peft_config["law"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 7, 0.5)


def test_a_trained_adapter_becomes_an_expert(tmp_path):
    base = tiny_model()
    plain = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    plain.save_pretrained(tmp_path)
    expected = logits(plain.eval())
    model = tiny_mixture(2)
    model.experts.create_expert("trained", source=str(tmp_path))
    model.experts.set_active_expert("trained")
    assert torch.equal(logits(model), expected)


def test_one_expert_is_active_alone_or_all_are():
    model = tiny_mixture()
    assert model.experts.active_expert is None
    mixed = logits(model)
    model.experts.set_active_expert(2)
    assert model.experts.active_expert == "expert_2"
    assert training(model) >= {"expert_2"} and not training(model) & {"expert_0", "expert_1"}
    alone = logits(model)
    model.experts.activate_all_experts()
    assert model.experts.active_expert is None
    assert torch.equal(logits(model), mixed) and not torch.equal(alone, mixed)
    assert training(model) == {"expert_0", "expert_1", "expert_2", "router"}


def test_a_frozen_expert_stays_frozen_whatever_is_activated():
    model = tiny_mixture()
    model.experts.freeze("expert_0")
    for change in (
        lambda: model.experts.set_active_expert("expert_0"),
        lambda: model.experts.activate_all_experts(),
        lambda: model.experts.create_expert("law"),
        lambda: model.experts.remove_expert("expert_2"),
    ):
        change()
        assert "expert_0" not in training(model)
        assert model.experts.frozen == ["expert_0"]
    assert training(model) == {"expert_1", "law", "router"}
    model.experts.unfreeze("expert_0")
    assert "expert_0" in training(model) and model.experts.frozen == []


def test_a_frozen_expert_gets_no_gradient_and_does_not_move():
    model = tiny_mixture().train()
    model.experts.freeze(["expert_0", "expert_2"])
    held = [p.detach().clone() for p in model.experts.parameters_of("expert_0")]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in model.experts.parameters_of("expert_0"))
    assert all(torch.equal(p, before) for p, before in zip(model.experts.parameters_of("expert_0"), held, strict=True))
    assert all(p.grad is not None for p in model.experts.parameters_of("expert_1"))


def test_a_removed_expert_leaves_no_weight_and_may_be_made_again():
    model = tiny_mixture()
    model.experts.freeze("expert_1")
    model.experts.remove_expert("expert_1")
    assert not any("expert_1" in name for name, _ in model.named_parameters())
    assert model.experts.frozen == []
    model.experts.create_expert("expert_1")
    assert "expert_1" in training(model)


def test_the_weights_of_an_expert_are_its_own():
    model = tiny_mixture(11)
    one, ten = ({id(p) for p in model.experts.parameters_of(name)} for name in ("expert_1", "expert_10"))
    assert len(one) == len(ten) == 2 * 2 * 7 and not one & ten  # A and B, two blocks, seven layers


def test_an_expert_with_the_name_of_a_module_owns_no_weight_of_the_base():
    model = tiny_mixture(2, expert_names=["mlp", "weight"])
    for name in ("mlp", "weight"):
        assert len(model.experts.parameters_of(name)) == 2 * 2 * 7
    model.experts.freeze(["mlp", "weight"])
    assert training(model) == {"router"}
    model.experts.unfreeze(["mlp", "weight"])
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in key or "moe_router" in key for key in trained)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda experts: experts.create_expert("expert_0"), "'expert_0'.*taken"),
        (lambda experts: experts.create_expert("a.b"), r"adapter.*'a\.b'"),
        (lambda experts: experts.create_expert(""), "adapter.*''"),
        (lambda experts: experts.create_expert("default"), "'default'.*taken"),
        (lambda experts: experts.create_expert(r=0), r"\br\b.*\b0\b.*\b1\b"),
        (lambda experts: experts.set_active_expert("expert_9"), "'expert_9'.*'expert_"),
        (lambda experts: experts.set_active_expert(-1), r"-1\b.*\b0 to 2\b"),
        (lambda experts: experts.set_active_expert(True), "True"),
        (lambda experts: experts.freeze(["expert_0", "law"]), "'law'.*expert_0"),
        (lambda experts: experts.unfreeze("law"), "expert 'law'"),
        (lambda experts: experts.remove_expert("law"), "expert 'law'"),
    ],
)
def test_a_bad_name_or_number_is_refused_and_changes_nothing(call, message):
    model = tiny_mixture()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        call(model.experts)
    assert torch.equal(logits(model), before)
    assert training(model) == {"expert_0", "expert_1", "expert_2", "router"}


def test_the_last_expert_cannot_be_removed():
    model = tiny_mixture(1)
    with pytest.raises(ValueError, match="'expert_0'.*last"):
        model.experts.remove_expert("expert_0")
