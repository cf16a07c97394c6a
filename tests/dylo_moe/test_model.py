"""`DyLoRA_MoE`: run, train, generate, save and load, and the values it refuses."""

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_mixture, tiny_model, tokens, train_looking
from transformers import Trainer, TrainingArguments

from dylo_moe.model import DyLoRA_MoE
from dylo_moe.skills import SkillLibrary

IDS = tokens(2, 9)


@torch.no_grad()
def logits(model, **inputs):
    return model(**{"input_ids": IDS, **inputs}).logits


def one_hot(column: int, num_experts: int = 3):
    return torch.nn.functional.one_hot(torch.tensor(column), num_experts).float()


@pytest.fixture
def base_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# -- running ---------------------------------------------------------------------------------------------------------


def test_an_untrained_mixture_is_its_base():
    model = DyLoRA_MoE(tiny_model(), 3, 4, 8).eval()
    torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=0, atol=0)


@pytest.mark.parametrize("expert", [1, "expert_1"])
def test_expert_id_is_that_expert_alone(expert):
    model = tiny_mixture()
    given = logits(model, expert_id=expert)
    model.experts.set_active_expert("expert_1")
    # a product with weights of zero and one, and none at all: the order of sums differs in float32
    torch.testing.assert_close(given, logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("experts", [["expert_2", "expert_0"], [2, 0], torch.tensor([2, 0])])
def test_expert_id_may_differ_from_sequence_to_sequence(experts):
    model = tiny_mixture()
    both = logits(model, expert_id=experts)
    for row, expert in enumerate([2, 0]):
        torch.testing.assert_close(both[row : row + 1], logits(model, input_ids=IDS[row : row + 1], expert_id=expert))


def test_expert_id_asks_no_router_and_adds_no_router_loss():
    model = tiny_mixture(balance_coefficient=10.0).train()
    model.base_model.moe_router.register_forward_hook(lambda *args: pytest.fail("the router was asked"))
    given = model(IDS, labels=IDS, expert_id=0).loss
    model.experts.set_active_expert(0)
    torch.testing.assert_close(given, model(IDS, labels=IDS).loss)


def test_the_balance_coefficient_weighs_the_balance_loss():
    losses = []
    for coefficient in (0.0, 1.0):
        model = tiny_mixture(balance_coefficient=coefficient).train()
        out = model(IDS, labels=IDS)
        losses.append(out.loss)
    torch.testing.assert_close(losses[1] - losses[0], out.router_balance_loss, rtol=1e-4, atol=1e-5)


def test_routing_is_dense_in_training_and_sparse_at_inference():
    model = tiny_mixture(top_k=2)
    logits(model)
    # of one gate: the mean over gates may keep more
    with model.base_model.record_routing() as records:
        logits(model)
        model.train()
        logits(model)
    for sparse, dense in records.values():
        assert ((sparse > 0).sum(-1) == 2).all()
        assert (dense > 0).all()


@pytest.mark.parametrize(
    "option", [{"top_k": 1}, {"router_scope": "layer"}, {"router_temperature": 0.2}, {"target_modules": ["q_proj"]}]
)
def test_each_router_option_changes_what_is_computed(option):
    assert not torch.equal(logits(tiny_mixture()), logits(tiny_mixture(**option)))


@pytest.mark.parametrize("option", ["router_z_coefficient", "router_entropy_coefficient", "router_jitter"])
def test_each_training_option_of_the_router_changes_the_loss(option):
    losses = []
    for value in (0.0, 0.5):
        model = tiny_mixture(**{option: value}).train()
        torch.manual_seed(0)
        losses.append(model(IDS, labels=IDS).loss.item())
    assert losses[0] != losses[1]


def test_only_the_chosen_blocks_get_experts():
    model = tiny_mixture(adapted_blocks=[1])
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert adapted and all(".layers.1." in name for name in adapted)
    assert model.router.sites == ["model.layers.1"]
    model.experts.create_expert("late")
    assert all(".layers.1." in name for name, _ in model.named_parameters() if ".late." in name)


def test_the_names_of_the_first_experts_can_be_given():
    model = tiny_mixture(2, expert_names=["law", "verse"])
    assert model.experts.get_all_adapter_names() == ["law", "verse"]


# -- last_routing_weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_last_routing_weights_are_the_mean_over_the_gates(scope):
    model = tiny_mixture(router_scope=scope)
    assert model.last_routing_weights is None
    seen, router = [], model.base_model.moe_router
    for site, gate in router.gates.items():
        gate.register_forward_hook(
            lambda module, args, out, site=site: seen.append(router.select(site, out, training=False).weights)
        )
    logits(model)
    assert len(seen) == {"layer": 14, "block": 2, "model": 1}[scope]
    torch.testing.assert_close(model.last_routing_weights, torch.stack(seen).mean(0))
    assert model.last_routing_weights.shape == (2, 9, 3)


def test_last_routing_weights_of_a_given_expert_are_one():
    model = tiny_mixture()
    logits(model, expert_id=[0, 2])
    expected = torch.stack([one_hot(0), one_hot(2)])[:, None].expand(2, 9, 3)
    torch.testing.assert_close(model.last_routing_weights, expected)
    model.experts.set_active_expert(1)
    logits(model)
    torch.testing.assert_close(model.last_routing_weights, one_hot(1).expand(2, 9, 3))


def test_last_routing_weights_are_those_that_were_passed():
    model = tiny_mixture()
    given = torch.rand(2, 9, 3)
    logits(model, routing_weights=given)
    torch.testing.assert_close(model.last_routing_weights, given)


def test_without_adapters_there_are_no_routing_weights():
    model = tiny_mixture()
    with model.disable_adapter():
        logits(model)
    assert model.last_routing_weights is None


def test_gradient_checkpointing_counts_no_token_twice():
    model = tiny_mixture().train()
    model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    assert model.last_routing_weights.shape == (2, 9, 3)


def test_record_routing_still_belongs_to_who_calls_it():
    model = tiny_mixture()
    with model.base_model.record_routing() as records:
        logits(model)
    assert all(len(weights) == 1 for weights in records.values())


# -- generating ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"expert_id": "expert_1"}, {"expert_id": [0, 2]}, {"num_beams": 2}])
def test_generate_gives_the_same_tokens_with_and_without_the_cache(options):
    model = tiny_mixture()
    made = [
        model.generate(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            **options,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*made)
    assert made[0].shape == (2, 15)


def test_generation_from_embeddings_may_be_given_to_one_expert():
    model = tiny_mixture()
    wanted = {"max_new_tokens": 5, "do_sample": False, "expert_id": ["expert_1", 2]}
    written = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **wanted)
    assert torch.equal(written, model.generate(IDS, **wanted)[:, IDS.shape[1] :])


def test_generated_tokens_are_routed_as_a_forward_routes_them():
    model = tiny_mixture()
    made = model.generate(input_ids=IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    weights = model.last_routing_weights
    assert weights.shape == (2, 13, 3)
    logits(model, input_ids=made[:, :-1])
    torch.testing.assert_close(weights, model.last_routing_weights)


def test_generating_with_one_expert_is_generating_with_it_active():
    model = tiny_mixture()
    options = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False}
    given = model.generate(**options, expert_id=2)
    model.experts.set_active_expert(2)
    assert torch.equal(given, model.generate(**options))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = tiny_mixture().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.is_gradient_checkpointing
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("moe_router" in name for name in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_trainable_parameters_are_experts_and_router(capsys):
    model = tiny_mixture()
    expected = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "moe_router" in name)
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} " in capsys.readouterr().out
    assert model.get_nb_trainable_parameters()[0] == expected


def test_device_and_config_are_the_bases():
    model = tiny_mixture()
    assert model.device == torch.device("cpu") and model.config.hidden_size == 32


def training_arguments(folder, **changes):
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            **changes,
        },
    )


def rows(count=8):
    ids = tokens(count, 10).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 10] * count, "labels": ids})


def test_trainer_trains_saves_and_resumes_it(tmp_path):
    model = tiny_mixture(balance_coefficient=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = Trainer(model=model, args=training_arguments(tmp_path / "whole"), train_dataset=rows())
    whole.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    saved = tmp_path / "whole" / "checkpoint-4"
    assert torch.equal(logits(DyLoRA_MoE.from_pretrained(saved, tiny_model())), logits(model.eval()))

    again = tiny_mixture(balance_coefficient=0.1)
    resumed = Trainer(model=again, args=training_arguments(tmp_path / "whole"), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(again.eval()), logits(model))


def test_trainer_resumes_while_one_expert_trains_alone(tmp_path):
    def start():
        model = tiny_mixture()
        model.experts.set_active_expert("expert_1")
        return model

    model, again = start(), start()
    Trainer(model=model, args=training_arguments(tmp_path), train_dataset=rows()).train()
    resumed = Trainer(model=again, args=training_arguments(tmp_path), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again.eval()), logits(model.eval()))


# -- saving and loading ----------------------------------------------------------------------------------------------


def test_a_saved_mixture_loads_from_its_folder_alone_with_bit_equal_logits(base_folder, tmp_path):
    model = DyLoRA_MoE(base_folder, 2, 4, 8, top_k=3)
    train_looking(model)
    model.experts.create_expert("late", r=2)
    train_looking(model, seed=2)
    model.experts.remove_expert("expert_0")
    model.experts.freeze("late")
    model.skills = SkillLibrary(torch.rand(2, 32))
    model.skills.add("rain", torch.rand(3, 32), expert="late")
    model.eval().save_pretrained(tmp_path / "saved")

    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.experts.get_all_adapter_names() == ["expert_1", "late"]
    assert loaded.experts.frozen == ["late"]
    assert (loaded.router.top_k, loaded.router.wanted_top_k) == (2, 3)
    assert loaded.skills["rain"].expert == "late"
    assert torch.equal(loaded.skills.embedding("rain"), model.skills.embedding("rain"))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.experts.create_expert("third")
    assert loaded.router.top_k == 3


def test_what_was_saved_is_a_mixture_for_peft_too(base_folder, tmp_path):
    model = DyLoRA_MoE(base_folder, 3, 4, 8)
    train_looking(model)
    model.eval().save_pretrained(tmp_path / "saved")
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(alone), logits(model))
    onto_a_base = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    # The weights of a file lie at other addresses than those made in memory, and products depend on the alignment.
    torch.testing.assert_close(logits(onto_a_base), logits(model))


def test_a_loaded_mixture_trains_on_but_for_its_frozen_experts(base_folder, tmp_path):
    model = DyLoRA_MoE(base_folder, 2, 4, 8)
    model.experts.freeze("expert_0")
    model.save_pretrained(tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved", is_trainable=True)
    trains = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("expert_1" in name for name in trains) and not any("expert_0" in name for name in trains)


def test_saving_again_without_skills_leaves_no_old_ones(base_folder, tmp_path):
    model = DyLoRA_MoE(base_folder, 1, 4, 8)
    model.skills.add("rain", torch.rand(3, 32))
    model.save_pretrained(tmp_path)
    model.skills.remove("rain")
    model.save_pretrained(tmp_path)
    assert len(DyLoRA_MoE.from_pretrained(tmp_path).skills) == 0


def test_saving_writes_no_weight_of_the_base(tmp_path):
    tiny_mixture().save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held and all("lora_" in name or "moe_router" in name for name in held)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, r"num_experts.*\b0\b.*\b1\b"),
        ({"lora_r": 0}, r"lora_r.*\b0\b.*\b1\b"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"top_k": 0}, r"top_k.*\b0\b.*\b1\b"),
        ({"balance_coefficient": -1.0}, "balance_coef is -1.0"),
        ({"router_scope": "token"}, "scope.*'token'"),
        ({"router_temperature": 0.0}, "temperature is 0.0"),
        ({"num_experts": 2, "expert_names": ["a", "a"]}, "Each expert needs a name of its own"),
        ({"num_experts": 2, "expert_names": ["a"]}, r"num_experts.*\b2\b.*expert_names.*\b1\b"),
    ],
)
def test_a_bad_value_is_refused_before_a_model_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        DyLoRA_MoE("no/such/folder/anywhere", **arguments)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="no/such/folder/anywhere"):
        DyLoRA_MoE("no/such/folder/anywhere")
    with pytest.raises(FileNotFoundError, match="folder.*no/such/folder/anywhere"):
        DyLoRA_MoE.from_pretrained("no/such/folder/anywhere")


def test_a_model_that_has_adapters_already_is_refused():
    with pytest.raises(ValueError, match="model_name.*DyLoRA_MoE"):
        DyLoRA_MoE(tiny_mixture())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"expert_id": "expert_7"}, "'expert_7'.*'expert_"),
        ({"expert_id": 3}, r"\b3\b.*\b0 to 2\b"),
        ({"expert_id": [0]}, r"expert_id.*\b1 experts.*\b2 sequences"),
        ({"expert_id": 0.5}, r"\b0\.5"),
        ({"expert_id": 0, "routing_weights": torch.ones(3)}, "expert_id.*routing_weights"),
    ],
)
def test_a_wrong_expert_id_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        tiny_mixture()(IDS, **given)


def test_expert_id_is_refused_while_one_expert_is_active_alone():
    model = tiny_mixture()
    model.experts.set_active_expert(1)
    with pytest.raises(ValueError, match="'expert_1'.*expert_id"):
        model(IDS, expert_id=0)


def test_a_base_with_other_measures_is_refused_and_both_are_named(base_folder, tmp_path):
    DyLoRA_MoE(base_folder, 2, 4, 8).save_pretrained(tmp_path / "saved")
    other = tiny_model(num_hidden_layers=3)
    other.name_or_path = "owner/other"
    with pytest.raises(ValueError, match=r"'.*base'.*'owner/other'.*num_layers.*\b2\b.*\b3\b"):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved", other)


def test_a_base_with_other_weights_is_refused(base_folder, tmp_path):
    DyLoRA_MoE(base_folder, 2, 4, 8).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="they differ in its weights"):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved", tiny_model(seed=1))


def test_the_same_base_in_bfloat16_is_taken(base_folder, tmp_path):
    DyLoRA_MoE(base_folder, 2, 4, 8).save_pretrained(tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_base_without_a_name_must_be_given(tmp_path):
    tiny_mixture().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="came without a name"):
        DyLoRA_MoE.from_pretrained(tmp_path)


def test_a_folder_without_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dylora\.json"):
        DyLoRA_MoE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [('{"format": 1, "ba', "is not JSON"), (json.dumps({"format": 9}), "format 9")]
)
def test_damaged_settings_are_refused(tmp_path, text, message):
    tiny_mixture().save_pretrained(tmp_path)
    (tmp_path / "dylora.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DyLoRA_MoE.from_pretrained(tmp_path)


def test_the_order_of_peft_is_explained():
    with pytest.raises(ValueError, match="The folder comes first"):
        DyLoRA_MoE.from_pretrained(tiny_model(), "somewhere")
