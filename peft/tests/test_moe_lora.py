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
"""`MoELoraConfig` and what a mixture can do: made from nothing or from trained adapters, changed, saved, frozen."""

import ast
import copy
import json
import re

import pytest
import torch
from moe_testing import (
    PAD,
    SCOPES,
    TARGETS,
    TOLERANCE,
    VOCAB,
    count_hooks,
    spread_gates,
    tiny_base,
    tiny_mixture,
    tokens,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    MoELoraConfig,
    MoELoraModel,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.moe_router import RouterConfig
from peft.utils import PeftWarning


every_scope = pytest.mark.parametrize("scope", SCOPES)
IDS = tokens(2, 9)


@torch.no_grad()
def logits(model, **inputs):
    return model(**{"input_ids": IDS, **inputs}).logits


@pytest.fixture
def base_folder(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def trained(tmp_path, base_folder):
    """Two plain LoRA adapters as stock PEFT writes them, unequal in rank, alpha, targets and scaling rule."""
    configs = {
        "math": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "code": LoraConfig(
            r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_rslora=True
        ),
    }
    folders = {}
    for name, config in configs.items():
        torch.manual_seed(len(folders))
        config.task_type = "CAUSAL_LM"
        get_peft_model(load_base(base_folder), config).save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    return folders


def from_trained(base_folder, trained, **config):
    config = MoELoraConfig(experts=trained, task_type="CAUSAL_LM", **config)
    model = get_peft_model(load_base(base_folder), config)
    spread_gates(model)
    return model.eval()


def trains(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class TestConfig:
    def test_num_experts_names_the_experts(self):
        assert MoELoraConfig(num_experts=3).expert_names == ["expert_0", "expert_1", "expert_2"]

    def test_a_list_names_the_experts(self):
        config = MoELoraConfig(experts=["math", "code"])
        assert config.expert_names == ["math", "code"] and config.num_experts == 2

    def test_without_a_number_there_are_four_experts(self):
        assert MoELoraConfig().expert_names == ["expert_0", "expert_1", "expert_2", "expert_3"]

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"experts": []}, "experts is empty"),
            ({"experts": "math"}, "experts is the string 'math', but must be a list of names or a dict"),
            ({"num_experts": 0}, "num_experts is 0, but must be at least 1"),
            ({"num_experts": 3, "experts": ["a", "b"]}, "num_experts is 3 but experts names 2"),
            ({"experts": ["a", "a"]}, "Each expert needs a name of its own"),
            ({"experts": ["a.b", "c"]}, "No adapter can be called 'a.b': a name must not be empty, hold a dot"),
            ({"experts": ["", "c"]}, "No adapter can be called ''"),
            ({"experts": ["train", "half", "c"]}, "No adapter can be called 'train', 'half'"),
            ({"experts": ["one", "two"], "train_experts": False}, "they would never learn. Pass a dict of names"),
            ({"num_experts": 2, "top_k": 3}, r"top_k is 3, but must lie between 1 and num_experts \(2\)"),
            ({"num_experts": 2, "top_k": 1, "top_p": 0.5}, "top_p=0.5 is not used"),
            ({"num_experts": 2, "router_scope": "token"}, "scope is 'token', but must be one of"),
            ({"num_experts": 2, "router_selection": "hybrid"}, "selection='hybrid' needs top_k"),
            ({"num_experts": 2, "router_temperature": -1.0}, "temperature is -1.0, but must be positive"),
            ({"num_experts": 2, "router_jitter": 2.0}, "jitter is 2.0, but must lie in"),
            ({"num_experts": 2, "router_block": 1}, "block=1 is only used by scope='model'"),
            ({"num_experts": 2, "router_init": "ones"}, "init is 'ones', but must be one of"),
            ({"num_experts": 2, "router_balance_coef": -1.0}, "balance_coef is -1.0, but must not be negative"),
            ({"num_experts": 2, "use_dora": True}, "use_dora cannot be combined with routing per token"),
            ({"num_experts": 2, "target_parameters": ["w"]}, "target_parameters cannot be combined"),
        ],
    )
    def test_a_wrong_value_is_refused_and_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MoELoraConfig(**arguments)

    def test_each_router_argument_reaches_the_router(self):
        model = tiny_mixture(
            scope="model", router_selection="hybrid", top_k=2, router_temperature=0.5, router_jitter=0.1, router_block=1,
            router_init="zeros", router_balance_coef=0.2, router_z_coef=0.3, router_entropy_coef=0.4,
        )  # fmt: skip
        assert model.base_model.moe_router.config == RouterConfig(
            scope="model", selection="hybrid", top_k=2, temperature=0.5, jitter=0.1, block=1, init="zeros",
            balance_coef=0.2, z_coef=0.3, entropy_coef=0.4,
        )  # fmt: skip

    def test_top_p_reaches_the_router(self):
        assert tiny_mixture(top_p=0.3).base_model.moe_router.config.top_p == 0.3

    def test_lora_arguments_reach_every_expert(self):
        model = tiny_mixture(r=3, lora_alpha=12, use_rslora=True, lora_dropout=0.25, target_modules=["q_proj"])
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        assert len(layers) == 2
        for layer in layers:
            assert layer.r == {f"expert_{i}": 3 for i in range(3)}
            assert set(layer.scaling.values()) == {12 / 3**0.5}
            assert {dropout.p for dropout in layer.lora_dropout.values()} == {0.25}

    def test_all_linear_is_understood(self):
        model = get_peft_model(tiny_base(), MoELoraConfig(num_experts=2, target_modules="all-linear"))
        names = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def test_experts_and_their_configs_must_name_the_same(self):
        with pytest.raises(ValueError, match=r"experts names \['a', 'b'\] but expert_configs holds \['a', 'c'\]"):
            MoELoraConfig(experts=["a", "b"], expert_configs={"a": {}, "c": {}})

    def test_the_order_of_many_experts_survives_saving(self, base_folder, tmp_path):
        model = tiny_mixture(base=load_base(base_folder), num_experts=12, target_modules=["q_proj"])
        expected = logits(model)
        model.save_pretrained(tmp_path / "mixture")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")
        assert loaded.base_model.moe_router.expert_names == [f"expert_{i}" for i in range(12)]
        assert torch.equal(logits(loaded), expected)

    def test_the_config_survives_json(self, tmp_path):
        model = tiny_mixture(scope="block", top_k=2, router_jitter=0.1)
        config = model.peft_config["default"]
        config.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(loaded, MoELoraConfig)
        assert loaded.router_config() == config.router_config()
        assert loaded.expert_names == config.expert_names


class TestFromNothing:
    def test_the_model_is_a_mixture_of_the_named_experts(self):
        model = tiny_mixture(experts=["math", "code"])
        assert isinstance(model.base_model, MoELoraModel)
        assert model.base_model.moe_router.expert_names == ["math", "code"]
        assert set(model.peft_config) == {"default", "math", "code"}

    def test_a_new_mixture_is_the_base_model(self):
        model = get_peft_model(tiny_base(), MoELoraConfig(num_experts=3, target_modules=TARGETS["llama"])).eval()
        assert torch.equal(logits(model), logits(tiny_base()))

    def test_experts_and_router_train(self):
        model = tiny_mixture()
        names = trains(model)
        assert any("moe_router" in name for name in names)
        assert all("moe_router" in name or ".lora_" in name for name in names)
        for expert in model.base_model.moe_router.expert_names:
            assert any(f".{expert}." in name for name in names)

    @every_scope
    def test_train_experts_false_trains_the_router_alone(self, scope):
        model = tiny_mixture(scope=scope, train_experts=False).train()
        names = trains(model)
        assert names and all("moe_router" in name for name in names)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    def test_print_trainable_parameters_counts_experts_and_router(self, capsys):
        model = tiny_mixture(target_modules=["q_proj"], r=4)
        model.print_trainable_parameters()
        experts, gates = 2 * 3 * (4 * 32 + 32 * 4), 2 * 3 * 32
        assert f"trainable params: {experts + gates:,} ||" in capsys.readouterr().out

    def test_get_nb_trainable_parameters_of_a_router_alone(self):
        model = tiny_mixture(target_modules=["q_proj"], train_experts=False)
        assert model.get_nb_trainable_parameters()[0] == 2 * 3 * 32

    def test_a_second_mixture_is_refused(self):
        model = tiny_mixture()
        with pytest.raises(ValueError, match="already holds the mixture 'default'"):
            model.add_adapter("second", MoELoraConfig(num_experts=2, experts=["x", "y"], target_modules=["q_proj"]))

    def test_an_expert_named_like_the_mixture_is_refused(self):
        with pytest.raises(ValueError, match=r"Experts cannot have the names of other adapters: \['default'\]"):
            tiny_mixture(experts=["default", "other"])

    def test_a_config_can_be_used_for_several_models(self, base_folder, trained):
        for config in (
            MoELoraConfig(num_experts=2, target_modules=["q_proj"], init_lora_weights=False),
            MoELoraConfig(experts=trained),
        ):
            before = copy.deepcopy(config)
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                models.append(get_peft_model(load_base(base_folder), config).eval())
            assert config.experts == before.experts and config.expert_configs is None
            assert torch.equal(logits(models[0]), logits(models[1]))
            models[0].add_expert("newcomer")
            assert models[1].peft_config["default"].num_experts == 2

    def test_injecting_a_mixture_without_its_tuner_is_refused(self):
        config = MoELoraConfig(num_experts=2, target_modules=["q_proj"])
        with pytest.raises(ValueError, match="does not support .*MOE_LORA.*Please use `get_peft_model`"):
            inject_adapter_in_model(config, tiny_base())

    def test_an_optimizer_step_changes_the_logits(self):
        model = tiny_mixture()
        before = logits(model)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
        assert not torch.allclose(logits(model.eval()), before, atol=1e-4)

    def test_eager_peft_layers_named_by_module_type_are_routed(self):
        model = tiny_mixture(target_modules=r"model\.layers\.1\..*\.(q|down)_proj")
        assert set(model.base_model.moe_router.gates) == {
            "model/layers/1/self_attn/q_proj",
            "model/layers/1/mlp/down_proj",
        }

    def test_rank_and_alpha_patterns_reach_the_experts(self):
        model = tiny_mixture(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 6})
        layer = model.base_model.model.model.layers[0].self_attn.v_proj
        assert set(layer.r.values()) == {2} and set(layer.scaling.values()) == {3.0}


class TestFromTrainedAdapters:
    def test_experts_keep_their_weights_rank_and_targets(self, base_folder, trained):
        model = from_trained(base_folder, trained)
        layer = model.base_model.model.model.layers[0]
        assert layer.self_attn.q_proj.r == {"math": 4, "code": 2}
        assert set(layer.self_attn.v_proj.lora_A) == {"math"} and set(layer.mlp.down_proj.lora_A) == {"code"}
        saved = load_file(f"{trained['code']}/adapter_model.safetensors")
        key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
        assert torch.equal(layer.mlp.down_proj.lora_A["code"].weight, saved[key])

    @pytest.mark.parametrize("name", ["math", "code"])
    def test_a_single_expert_is_the_plain_lora_it_was(self, name, base_folder, trained):
        model = from_trained(base_folder, trained)
        model.set_adapter(name)
        stock = PeftModel.from_pretrained(load_base(base_folder), trained[name])
        assert torch.equal(logits(model), logits(stock))

    def test_the_mixture_comes_back_after_a_single_expert(self, base_folder, trained):
        model = from_trained(base_folder, trained)
        before = logits(model)
        model.set_adapter("math")
        model.set_adapter("default")
        assert torch.equal(logits(model), before)

    @every_scope
    def test_logits_are_bit_equal_after_save_and_load(self, scope, base_folder, trained, tmp_path):
        model = from_trained(base_folder, trained, router_scope=scope)
        expected = logits(model)
        model.save_pretrained(tmp_path / "mixture")
        for folder in trained.values():  # nothing but the mixture's own folder is read
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (tmp_path / folder / file).unlink()
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")), expected)

    def test_train_experts_false_leaves_them_as_they_are(self, base_folder, trained):
        model = from_trained(base_folder, trained, train_experts=False)
        assert all("moe_router" in name for name in trains(model))

    def test_router_init_from_experts_points_at_them(self, base_folder, trained, tmp_path):
        config = MoELoraConfig(experts=trained, task_type="CAUSAL_LM", router_init="experts")
        model = get_peft_model(load_base(base_folder), config).eval()
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        update = (layer.lora_B["code"].weight @ layer.lora_A["code"].weight).detach()
        row = model.base_model.moe_router.gates["model/layers/0/mlp/down_proj"].weight[1]
        assert (update @ row).norm().item() == pytest.approx(torch.linalg.matrix_norm(update, 2).item(), rel=1e-4)
        expected = logits(model)
        model.save_pretrained(tmp_path / "mixture")
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")), expected)

    def test_router_init_from_untrained_experts_is_refused(self):
        with pytest.raises(ValueError, match=r"Expert 'expert_0' has an untrained \(zero\) B"):
            tiny_mixture(router_init="experts", init_lora_weights=True)

    def test_a_folder_that_holds_no_lora_is_refused(self, base_folder, trained, tmp_path):
        model = from_trained(base_folder, trained)
        model.save_pretrained(tmp_path / "mixture")
        with pytest.raises(ValueError, match="Expert 'x' must be a LoRA adapter, but '.*mixture' holds .*MOE_LORA"):
            from_trained(base_folder, {"x": str(tmp_path / "mixture"), "y": trained["math"]})

    def test_an_adapter_that_trains_more_than_lora_weights_is_refused(self, base_folder, trained, tmp_path):
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        get_peft_model(load_base(base_folder), config).save_pretrained(tmp_path / "more")
        with pytest.raises(ValueError, match=r"Expert 'x' \('.*more'\) also trains biases, whole modules or tokens"):
            from_trained(base_folder, {"x": str(tmp_path / "more"), "y": trained["math"]})

    def test_experts_may_be_named_by_numbers_as_layers_are(self, base_folder, trained, tmp_path):
        model = from_trained(base_folder, {"0": trained["math"], "1": trained["code"]})
        model.save_pretrained(tmp_path / "mixture")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")
        assert torch.equal(logits(loaded), logits(model))

    @pytest.mark.parametrize("names", [("0", "1"), ("mlp", "self_attn")], ids=str)
    def test_an_expert_named_as_a_module_leaves_none_out_of_the_export_of_another(self, names, base_folder, tmp_path):
        model = get_peft_model(
            load_base(base_folder),
            MoELoraConfig(
                experts=list(names),
                target_modules=["q_proj", "down_proj"],
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            ),
        )
        for name in names:
            model.base_model.export_expert(name, tmp_path / name)
            model.set_adapter(name)
            stock = PeftModel.from_pretrained(load_base(base_folder), tmp_path / name)
            assert torch.equal(logits(stock), logits(model))

    def test_an_adapter_of_another_base_is_refused(self, base_folder, trained, tmp_path):
        other = tiny_base("llama", num_hidden_layers=1)
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(other, config).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="'.*other' for expert 'x' does not fit this base model"):
            from_trained(base_folder, {"x": str(tmp_path / "other"), "y": trained["math"]})


class TestActivating:
    def test_disable_adapter_gives_the_base_model(self):
        model = tiny_mixture()
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_base()))
        assert not torch.allclose(logits(model), logits(tiny_base()), atol=1e-3)

    def test_activating_the_mixture_again_trains_it_again(self):
        model = tiny_mixture()
        before = trains(model)
        model.set_adapter("expert_1")
        assert all(".expert_1." in name for name in trains(model) if ".lora_" in name)
        model.set_adapter("default")
        assert trains(model) == before

    def test_activating_for_inference_freezes_experts_and_router(self):
        model = tiny_mixture()
        model.set_adapter("default", inference_mode=True)
        assert trains(model) == []

    def test_set_requires_grad_of_the_mixture_reaches_experts_and_router(self):
        model = tiny_mixture()
        before = trains(model)
        model.set_requires_grad("default", requires_grad=False)
        assert trains(model) == []
        model.set_requires_grad("default")
        assert trains(model) == before

    def test_set_requires_grad_of_one_expert_leaves_the_rest(self):
        model = tiny_mixture()
        model.set_requires_grad("expert_1", requires_grad=False)
        names = trains(model)
        assert not any(".expert_1." in name for name in names)
        assert any(".expert_0." in name for name in names) and any("moe_router" in name for name in names)

    def test_a_wrong_subset_of_experts_is_refused(self):
        model = tiny_mixture()
        model.base_model.set_adapter(["expert_0", "expert_1"])
        with pytest.raises(ValueError, match=r"active adapters are \['expert_0', 'expert_1'\]"):
            model(input_ids=IDS)

    def test_explicit_weights_override_the_router(self):
        model = tiny_mixture()
        model_without = tiny_mixture()
        model_without.detach_router()
        weights = torch.tensor([0.1, 0.6, 0.3])
        assert torch.equal(logits(model, routing_weights=weights), logits(model_without, routing_weights=weights))


class TestAddAndDelete:
    def scores(self, model):
        return {key: gate.weight.detach().clone() for key, gate in model.base_model.moe_router.gates.items()}

    @every_scope
    def test_adding_keeps_the_others_scores(self, scope):
        model = tiny_mixture(scope=scope)
        before = self.scores(model)
        model.add_expert("newcomer")
        after = self.scores(model)
        assert after.keys() == before.keys()
        for key in before:
            assert after[key].shape[0] == 4 and torch.equal(after[key][:3], before[key])

    @every_scope
    def test_deleting_keeps_the_others_scores(self, scope):
        model = tiny_mixture(scope=scope)
        before = self.scores(model)
        model.delete_expert("expert_1")
        for key, weight in self.scores(model).items():
            assert torch.equal(weight, before[key][[0, 2]])

    @every_scope
    def test_adding_and_deleting_the_same_expert_changes_nothing(self, scope):
        model = tiny_mixture(scope=scope, top_k=2)
        expected, hooks, names = logits(model), count_hooks(model), set(model.state_dict())
        model.add_expert("newcomer")
        model.delete_expert("newcomer")
        model.eval()
        assert torch.equal(logits(model), expected)
        assert count_hooks(model) == hooks
        assert set(model.state_dict()) == names

    def test_a_deleted_expert_is_gone_from_layers_config_and_file(self, tmp_path):
        model = tiny_mixture()
        model.delete_expert("expert_1")
        assert set(model.peft_config) == {"default", "expert_0", "expert_2"}
        assert model.peft_config["default"].num_experts == 2
        model.save_pretrained(tmp_path)
        assert not any("expert_1" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        assert "expert_1" not in (tmp_path / "adapter_config.json").read_text()

    def test_deleting_is_the_mixture_of_the_rest(self):
        model, rest = tiny_mixture(), tiny_mixture(experts=["expert_0", "expert_2"])
        state = model.state_dict()
        model.delete_expert("expert_1")
        model.eval()
        with torch.no_grad():
            for key, value in rest.state_dict().items():
                value.copy_(state[key][[0, 2]] if "moe_router" in key else state[key])
        torch.testing.assert_close(logits(model), logits(rest), **TOLERANCE["llama"])

    def test_adding_keeps_what_trains(self):
        model = tiny_mixture()
        model.set_requires_grad(["expert_0", "expert_1"], requires_grad=False)
        before = trains(model)
        model.add_expert("newcomer")
        assert [name for name in trains(model) if ".newcomer." not in name] == before
        assert any(".newcomer." in name for name in trains(model))

    def test_deleting_keeps_what_trains(self):
        model = tiny_mixture()
        model.set_requires_grad("expert_0", requires_grad=False)
        before = trains(model)
        model.delete_expert("expert_2")
        assert trains(model) == [name for name in before if ".expert_2." not in name]

    @pytest.mark.parametrize("change", ["add", "delete"])
    def test_a_frozen_router_stays_frozen(self, change):
        model = tiny_mixture()
        model.base_model.moe_router.requires_grad_(False)
        model.add_expert("newcomer") if change == "add" else model.delete_expert("expert_1")
        assert not any("moe_router" in name for name in trains(model))

    @pytest.mark.parametrize("change", ["add", "delete"])
    def test_a_model_loaded_for_inference_stays_so(self, change, base_folder, tmp_path):
        tiny_mixture(base=load_base(base_folder)).save_pretrained(tmp_path / "mixture")
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")
        model.add_expert("newcomer") if change == "add" else model.delete_expert("expert_1")
        assert trains(model) == []

    def test_an_expert_added_to_other_modules_gets_gates_there(self):
        model = tiny_mixture(target_modules=["q_proj"])
        model.add_expert("wide", target_modules=["q_proj", "up_proj"], r=2)
        gates = model.base_model.moe_router.gates
        assert gates["model/layers/0/mlp/up_proj"].weight.shape == (4, 32)
        spread_gates(model)
        model.eval()
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=IDS)
        assert "model.layers.0.mlp.up_proj" in recorded

    def test_deleting_the_only_expert_of_a_layer_drops_its_gate(self):
        model = tiny_mixture(target_modules=["q_proj"])
        model.add_expert("wide", target_modules=["up_proj"])
        model.delete_expert("wide")
        assert "model/layers/0/mlp/up_proj" not in model.base_model.moe_router.gates
        logits(model)

    def test_a_trained_adapter_can_be_added(self, base_folder, trained):
        model = from_trained(base_folder, {"math": trained["math"]})
        model.add_expert("code", trained["code"])
        model.eval()
        model.set_adapter("code")
        stock = PeftModel.from_pretrained(load_base(base_folder), trained["code"])
        assert torch.equal(logits(model), logits(stock))

    def test_an_adapter_that_does_not_fit_leaves_the_mixture_as_it_was(self, base_folder, trained, tmp_path):
        other = tiny_base("llama", num_hidden_layers=1)
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(other, config).save_pretrained(tmp_path / "other")
        model = from_trained(base_folder, trained)
        expected, names = logits(model), set(model.state_dict())
        with pytest.raises(ValueError, match="does not fit this base model"):
            model.add_expert("x", str(tmp_path / "other"))
        assert set(model.state_dict()) == names and set(model.peft_config) == {"default", "math", "code"}
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("name", ["expert_0", "default", "", "a.b", "train"])
    def test_a_name_that_is_taken_or_unusable_is_refused(self, name):
        with pytest.raises(ValueError, match=f"'{name}' is taken|No adapter can be called '{name}'"):
            tiny_mixture().add_expert(name)

    def test_changes_to_a_trained_adapter_are_refused(self, base_folder, trained):
        with pytest.raises(ValueError, match=r"A trained adapter keeps its own config; drop \['r'\]"):
            from_trained(base_folder, {"math": trained["math"]}).add_expert("code", trained["code"], r=8)

    def test_a_router_that_does_not_train_gets_no_gate_that_does(self):
        model = tiny_mixture(target_modules=["q_proj"])
        router = model.base_model.moe_router.requires_grad_(False)
        model.add_expert("newcomer", target_modules=["v_proj"])
        assert len(router.gates) == 4 and not any(parameter.requires_grad for parameter in router.parameters())

    def test_an_unknown_expert_is_not_deleted(self):
        with pytest.raises(ValueError, match="There is no expert 'x'; the experts are"):
            tiny_mixture().delete_expert("x")

    def test_deleting_below_top_k_is_refused_and_changes_nothing(self):
        model = tiny_mixture(top_k=3)
        expected = logits(model)
        with pytest.raises(ValueError, match=r"top_k is 3, but must lie between 1 and num_experts \(2\)"):
            model.delete_expert("expert_0")
        assert torch.equal(logits(model), expected)

    def test_the_last_expert_is_not_deleted(self):
        model = tiny_mixture(num_experts=1)
        with pytest.raises(ValueError, match="at least one expert"):
            model.delete_expert("expert_0")

    @pytest.mark.parametrize("name", ["default", "expert_0"])
    def test_delete_adapter_points_to_delete_expert(self, name):
        with pytest.raises(ValueError, match="delete_expert"):
            tiny_mixture().delete_adapter(name)

    def test_a_detached_router_is_asked_for(self):
        model = tiny_mixture()
        model.detach_router()
        with pytest.raises(ValueError, match="router is detached"):
            model.add_expert("x")

    def test_a_custom_gate_is_not_grown(self):
        model = tiny_mixture(target_modules=["q_proj"])
        model.detach_router()
        model.attach_router(torch.nn.Linear(32, 3))
        with pytest.raises(ValueError, match="Cannot add an expert: the gates are not this library's own"):
            model.add_expert("x")

    def test_a_new_expert_trains_with_the_rest(self):
        model = tiny_mixture()
        model.add_expert("newcomer", init_lora_weights=False)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in model.named_parameters():
            if ".newcomer." in name or "moe_router" in name:
                assert parameter.grad is not None and parameter.grad.any(), name


class TestExport:
    @pytest.mark.parametrize("name", ["math", "code"])
    def test_an_exported_expert_loads_with_stock_peft(self, name, base_folder, trained, tmp_path):
        model = from_trained(base_folder, trained)
        model.export_expert(name, tmp_path / "exported")
        stock = PeftModel.from_pretrained(load_base(base_folder), tmp_path / "exported")
        assert type(stock.peft_config["default"]) is LoraConfig
        model.set_adapter(name)
        assert torch.equal(logits(stock), logits(model))

    def test_the_exported_files_are_those_of_the_adapter_it_came_from(self, base_folder, trained, tmp_path):
        from_trained(base_folder, trained).export_expert("code", tmp_path / "exported")
        exported = load_file(tmp_path / "exported" / "adapter_model.safetensors")
        original = load_file(f"{trained['code']}/adapter_model.safetensors")
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[key], original[key]) for key in original)

    def test_the_exported_config_names_the_base(self, base_folder, trained, tmp_path):
        from_trained(base_folder, trained).export_expert("code", tmp_path / "exported")
        config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base_folder)
        assert config["peft_type"] == "LORA" and config["inference_mode"] is True

    def test_an_unknown_expert_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"no LoRA adapter 'x' to export; this model holds \['expert_0'"):
            tiny_mixture().export_expert("x", tmp_path)

    def test_the_mixture_itself_is_not_exported(self, tmp_path):
        with pytest.raises(ValueError, match="no LoRA adapter 'default' to export"):
            tiny_mixture().export_expert("default", tmp_path)

    def test_exporting_weights_that_are_not_there_warns(self, tmp_path):
        model = tiny_mixture()
        next(iter(model.base_model._adapted_layers().values())).lora_A["expert_1"].weight.data = torch.empty(0)
        with pytest.warns(PeftWarning, match="expert_1"):
            model.base_model.export_expert("expert_1", tmp_path)

    def test_exporting_changes_nothing_in_the_model(self, tmp_path):
        model = tiny_mixture()
        expected, config = logits(model), copy.deepcopy(model.peft_config["expert_0"])
        model.export_expert("expert_0", tmp_path)
        assert torch.equal(logits(model), expected) and model.peft_config["expert_0"] == config


class TestSavedFiles:
    @pytest.fixture
    def saved(self, base_folder, tmp_path):
        model = tiny_mixture(base=load_base(base_folder), scope="block")
        model.save_pretrained(tmp_path / "mixture")
        return tmp_path / "mixture"

    def test_one_folder_holds_config_and_weights(self, saved):
        assert {file.name for file in saved.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert not any(file.is_dir() for file in saved.iterdir())
        keys = set(load_file(saved / "adapter_model.safetensors"))
        assert any("moe_router" in key for key in keys) and any("expert_2" in key for key in keys)

    def test_a_truncated_file_is_refused(self, saved):
        weights = saved / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(SafetensorError, match="incomplete|not fully covered|MetadataIncompleteBuffer"):
            AutoPeftModelForCausalLM.from_pretrained(saved)

    def test_a_missing_file_is_refused(self, saved, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        (saved / "adapter_model.safetensors").unlink()
        with pytest.raises((ValueError, OSError), match="mixture"):
            AutoPeftModelForCausalLM.from_pretrained(str(saved))

    @pytest.mark.parametrize("part", ["moe_router", "expert_1"])
    def test_missing_tensors_are_refused_and_named(self, saved, part):
        weights = saved / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(weights).items() if part not in key}, weights)
        with pytest.raises(ValueError, match=f"do not fit this mixture.*tensors are missing .*{part}"):
            AutoPeftModelForCausalLM.from_pretrained(saved)

    def test_tensors_of_other_experts_are_refused_and_named(self, saved):
        weights = saved / "adapter_model.safetensors"
        tensors = {key.replace("expert_1", "stranger"): value for key, value in load_file(weights).items()}
        save_file(tensors, weights)
        with pytest.raises(ValueError, match="are unknown .*stranger"):
            AutoPeftModelForCausalLM.from_pretrained(saved)

    def test_a_router_of_another_width_is_refused(self, saved):
        weights = saved / "adapter_model.safetensors"
        tensors = {k: v[:2].clone() if "moe_router" in k else v for k, v in load_file(weights).items()}
        save_file(tensors, weights)
        with pytest.raises((ValueError, RuntimeError), match="size mismatch|shape"):
            AutoPeftModelForCausalLM.from_pretrained(saved)

    def test_is_trainable_trains_experts_and_router_again(self, saved):
        expected = trains(tiny_mixture(scope="block"))
        model = AutoPeftModelForCausalLM.from_pretrained(saved, is_trainable=True)
        assert trains(model) == expected

    def test_loading_for_inference_trains_nothing(self, saved):
        model = AutoPeftModelForCausalLM.from_pretrained(saved)
        assert trains(model) == [] and not model.training

    def test_a_router_trained_alone_is_loaded_so(self, base_folder, tmp_path):
        model = tiny_mixture(base=load_base(base_folder), train_experts=False)
        model.save_pretrained(tmp_path / "router_alone")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "router_alone", is_trainable=True)
        assert trains(loaded) == trains(model)

    def test_save_load_save_gives_the_same_files(self, saved, tmp_path):
        AutoPeftModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
        first, second = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path / "again"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (saved, tmp_path / "again")]
        for config in configs:
            config["target_modules"].sort()  # a set, which LoRA configs write in any order
        assert configs[0] == configs[1]

    def test_a_mixture_of_another_adapter_name_saves_and_loads(self, base_folder, tmp_path):
        config = MoELoraConfig(
            num_experts=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(load_base(base_folder), config, adapter_name="mix").eval()
        spread_gates(model)
        expected = logits(model)
        model.save_pretrained(tmp_path / "out")
        loaded = PeftModel.from_pretrained(load_base(base_folder), tmp_path / "out" / "mix", adapter_name="renamed")
        assert torch.equal(logits(loaded), expected)

    def test_a_bfloat16_base_loads_bit_equal(self, base_folder, tmp_path):
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
        model = tiny_mixture(base=base, top_k=2)
        expected = logits(model)
        model.save_pretrained(tmp_path / "half")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
        assert torch.equal(logits(loaded), expected)

    def test_what_torch_save_pickles_is_the_state_dict_alone(self, tmp_path):
        model = tiny_mixture()
        torch.save(model.state_dict(), tmp_path / "state.bin")
        state = torch.load(tmp_path / "state.bin", weights_only=True)
        other = tiny_mixture()
        spread_gates(other, seed=77)
        other.load_state_dict(state)
        assert torch.equal(logits(other), logits(model))


class TestFreezeRouting:
    @pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.7, -0.4, 2.0]])
    def test_frozen_weights_are_exact(self, weights):
        model = tiny_mixture("gpt2")
        expected = logits(model, routing_weights=torch.tensor(weights, dtype=torch.float64))
        model.set_adapter(model.freeze_routing(weights))
        torch.testing.assert_close(logits(model), expected, **TOLERANCE["gpt2"])

    def test_unequal_experts_are_frozen_exactly(self, base_folder, trained):
        model = from_trained(base_folder, trained)
        weights = torch.tensor([0.3, 0.9])
        expected = logits(model, routing_weights=weights)
        model.set_adapter(model.freeze_routing(weights))
        torch.testing.assert_close(logits(model), expected, **TOLERANCE["llama"])

    def test_biases_and_embeddings_are_frozen_exactly(self):
        model = tiny_mixture(target_modules=["embed_tokens", "q_proj", "lm_head"], scope="layer")
        expected = logits(model, routing_weights=torch.tensor([0.2, 0.5, 0.3]))
        model.set_adapter(model.freeze_routing([0.2, 0.5, 0.3]))
        torch.testing.assert_close(logits(model), expected, **TOLERANCE["llama"])

    def test_lora_biases_are_frozen_exactly(self):
        base = tiny_base("llama", attention_bias=True)
        model = tiny_mixture(base=base, target_modules=["q_proj"], lora_bias=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and name.endswith("bias"):
                    parameter.normal_()
        expected = logits(model, routing_weights=torch.tensor([0.2, 0.5, 0.3]))
        model.set_adapter(model.freeze_routing([0.2, 0.5, 0.3]))
        torch.testing.assert_close(logits(model), expected, **TOLERANCE["llama"])

    @every_scope
    def test_a_prompt_freezes_each_layer_at_the_mean_weight_of_its_real_tokens(self, scope):
        model = tiny_mixture(scope=scope, top_k=2)
        mask = torch.ones_like(IDS)
        mask[1, 5:] = 0
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=IDS, attention_mask=mask)
        model.freeze_routing(input_ids=IDS, attention_mask=mask)
        for layer in model.base_model.model.modules():
            if isinstance(layer, LoraLayer):
                weights = recorded[layer.routing_port.site][0][mask.bool()].mean(0)
                update = sum(
                    weight * layer.scaling[f"expert_{i}"] * layer.lora_B[f"expert_{i}"].weight
                    @ layer.lora_A[f"expert_{i}"].weight
                    for i, weight in enumerate(weights)
                )  # fmt: skip
                frozen = layer.scaling["frozen"] * layer.lora_B["frozen"].weight @ layer.lora_A["frozen"].weight
                torch.testing.assert_close(frozen, update, rtol=0, atol=1e-6)

    def test_layers_before_the_block_of_a_model_router_stay_unadapted(self):
        model = tiny_mixture(scope="model", router_block=1)
        model.freeze_routing(input_ids=IDS)
        first, second = model.base_model.model.model.layers
        assert "frozen" not in first.self_attn.q_proj.lora_A and "frozen" in second.self_attn.q_proj.lora_A

    @every_scope
    def test_a_prompt_of_one_token_frozen_is_the_routed_forward(self, scope):
        model = tiny_mixture(scope=scope, router_block=1 if scope == "model" else None)
        one = IDS[:1, :1]
        expected = logits(model, input_ids=one)
        model.set_adapter(model.freeze_routing(input_ids=one))
        torch.testing.assert_close(logits(model, input_ids=one), expected, **TOLERANCE["llama"])

    def test_freezing_leaves_the_mixture_as_it_was(self):
        model = tiny_mixture()
        expected, names, hooks = logits(model), trains(model), count_hooks(model)
        model.freeze_routing(input_ids=IDS)
        assert torch.equal(logits(model), expected)
        assert trains(model) == names and count_hooks(model) == hooks and not model.training

    def test_a_frozen_routing_is_exported_as_plain_lora(self, base_folder, trained, tmp_path):
        model = from_trained(base_folder, trained)
        weights = torch.tensor([0.3, 0.9])
        expected = logits(model, routing_weights=weights)
        model.export_expert(model.freeze_routing(weights, adapter_name="chosen"), tmp_path / "frozen")
        stock = PeftModel.from_pretrained(load_base(base_folder), tmp_path / "frozen")
        torch.testing.assert_close(logits(stock), expected, **TOLERANCE["llama"])
        torch.testing.assert_close(logits(stock.merge_and_unload()), expected, **TOLERANCE["llama"])

    def test_an_exported_routing_of_a_prompt_loads_with_stock_peft(self, base_folder, trained, tmp_path):
        model = from_trained(base_folder, trained, router_scope="block")
        model.set_adapter(model.freeze_routing(input_ids=IDS))
        model.export_expert("frozen", tmp_path / "frozen")
        stock = PeftModel.from_pretrained(load_base(base_folder), tmp_path / "frozen")
        assert torch.equal(logits(stock), logits(model))

    def test_a_layer_whose_name_ends_another_keeps_its_own_rank(self, tmp_path):
        def base():
            torch.manual_seed(0)
            block = nn.ModuleDict({"lin": nn.Linear(8, 8)})
            return nn.ModuleDict({"block": block, "lin": nn.Linear(8, 8)})

        model = get_peft_model(base(), LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False), "all")
        model.add_adapter("inner", LoraConfig(r=3, target_modules=["block.lin"], init_lora_weights=False))
        model.base_model.set_adapter(["all", "inner"])
        model.base_model.export_expert(model.base_model.freeze_routing([0.3, 0.7]), tmp_path)
        stock = PeftModel.from_pretrained(base(), tmp_path).base_model.model
        for name, rank in [("lin", 2), ("block.lin", 5)]:
            layer, loaded = model.base_model.model.get_submodule(name), stock.get_submodule(name)
            assert loaded.r["default"] == layer.r["frozen"] == rank
            torch.testing.assert_close(loaded.get_delta_weight("default"), layer.get_delta_weight("frozen"))

    def test_a_frozen_routing_is_merged(self):
        model = tiny_mixture()
        model.set_adapter(model.freeze_routing([0.2, 0.5, 0.3]))
        expected = logits(model)
        merged = model.merge_and_unload()
        assert not any(isinstance(module, LoraLayer) for module in merged.modules())
        torch.testing.assert_close(logits(merged), expected, **TOLERANCE["llama"])
        assert count_hooks(merged) == count_hooks(tiny_base())

    def test_a_mixture_with_a_frozen_routing_beside_it_saves_and_loads(self, base_folder, tmp_path):
        model = tiny_mixture(base=load_base(base_folder))
        expected = logits(model)
        model.freeze_routing([0.2, 0.5, 0.3])
        model.save_pretrained(tmp_path / "both")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "both")
        assert torch.equal(logits(loaded), expected)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({}, "Pass either weights"),
            ({"weights": [0.5, 0.5, 0.0], "input_ids": IDS}, "Pass either weights"),
            ({"weights": [0.5, 0.5]}, r"one number for each of the experts .*, got \[2\]"),
            ({"weights": [0.0, 0.0, 0.0]}, "All weights of the experts .* are zero"),
            ({"weights": [1.0, 0.0, 0.0], "adapter_name": "expert_0"}, "already an adapter 'expert_0'"),
            ({"weights": [1.0, 0.0, 0.0], "adapter_name": "v1.0"}, "No adapter can be called 'v1.0'"),
            ({"weights": [1.0, 0.0, 0.0], "adapter_name": "half"}, "No adapter can be called 'half'"),
            ({"weights": "a text"}, r"weights is a text. Pass one number for each expert, or a prompt by name"),
        ],
    )
    def test_a_wrong_call_is_refused_and_leaves_no_adapter(self, arguments, message):
        model = tiny_mixture()
        adapters = list(model.peft_config)
        with pytest.raises(ValueError, match=message):
            model.freeze_routing(**arguments)
        assert list(model.peft_config) == adapters

    def test_a_prompt_without_a_router_is_refused(self):
        model = tiny_mixture()
        model.detach_router()
        with pytest.raises(ValueError, match="Without a router there are no weights to take from a prompt"):
            model.freeze_routing(input_ids=IDS)

    def test_a_prompt_while_the_experts_are_not_active_is_refused(self):
        model = tiny_mixture()
        model.set_adapter("expert_0")
        with pytest.raises(ValueError, match="router did not run on the inputs. Activate its experts"):
            model.freeze_routing(input_ids=IDS)


class TestMergeAndUnload:
    @pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
    def test_merging_a_mixture_is_refused_and_says_what_to_do(self, method):
        with pytest.raises(ValueError, match="routed model cannot be merged.*freeze_routing"):
            getattr(tiny_mixture(), method)()

    def test_a_refused_merge_leaves_the_mixture_as_it_was(self):
        model = tiny_mixture()
        expected = logits(model)
        with pytest.raises(ValueError):
            model.merge_and_unload()
        assert torch.equal(logits(model), expected)

    def test_a_single_expert_is_merged(self):
        model = tiny_mixture()
        model.set_adapter("expert_1")
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, **TOLERANCE["llama"])

    @every_scope
    def test_unloading_gives_the_base_model(self, scope):
        unloaded = tiny_mixture(scope=scope).unload()
        assert torch.equal(logits(unloaded), logits(tiny_base()))
        assert count_hooks(unloaded) == count_hooks(tiny_base())

    def test_a_single_merged_expert_unmerges_when_the_mixture_is_activated(self):
        model = tiny_mixture()
        expected = logits(model)
        model.set_adapter("expert_1")
        model.merge_adapter()
        model.set_adapter("default")
        torch.testing.assert_close(logits(model), expected, **TOLERANCE["llama"])


class TestOtherTasks:
    def classifier(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB, num_labels=3, pad_token_id=PAD, **sizes))

    def classifying_mixture(self):
        model = tiny_mixture(base=self.classifier(), task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])
        with torch.no_grad():
            model.base_model.model.score.modules_to_save["default"].weight.normal_()
        return model

    def test_a_classification_head_trains_with_the_mixture(self):
        model = self.classifying_mixture().train()
        model(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
        head = model.base_model.model.score.modules_to_save["default"]
        assert head.weight.requires_grad and head.weight.grad.any()
        assert all(gate.weight.grad.any() for gate in model.base_model.moe_router.gates.values())

    def test_a_classification_head_is_saved_with_the_mixture(self, tmp_path):
        model = self.classifying_mixture()
        expected = logits(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(self.classifier(), tmp_path).eval()
        assert torch.equal(logits(loaded), expected)

    def test_modules_to_save_are_saved_and_not_routed(self, base_folder, tmp_path):
        model = tiny_mixture(base=load_base(base_folder), target_modules="all-linear", modules_to_save=["lm_head"])
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        assert "lm_head" not in model.base_model.moe_router.gates
        expected = logits(model)
        model.save_pretrained(tmp_path / "mixture")
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")), expected)

    def test_modules_to_save_follow_the_mixture_on_and_off(self):
        model = tiny_mixture(modules_to_save=["lm_head"])
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_base()))

    @pytest.mark.parametrize("scope", ["layer", "block"])
    def test_an_encoder_decoder_mixture_saves_and_loads(self, scope, tmp_path):
        config = T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
        model = tiny_mixture(
            base=T5ForConditionalGeneration.from_pretrained(tmp_path / "t5"),
            scope=scope, top_k=2, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM",
        )  # fmt: skip
        expected = logits(model, decoder_input_ids=IDS[:, :4])
        model.save_pretrained(tmp_path / "mixture")
        base = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
        loaded = PeftModel.from_pretrained(base, tmp_path / "mixture")
        assert torch.equal(logits(loaded, decoder_input_ids=IDS[:, :4]), expected)


class TestGenerate:
    OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "suppress_tokens": [2]}
    every_family = pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe"])
    one_pass = pytest.mark.parametrize("scope", ["layer", "block", "model"])

    @every_family
    @one_pass
    def test_greedy_follows_the_full_forward(self, family, scope):
        model = tiny_mixture(family, scope, top_k=2)
        generated = model.generate(input_ids=IDS, do_sample=False, **self.OPTIONS)
        scores = logits(model, input_ids=generated)
        scores[..., 2] = -float("inf")
        assert scores[:, 8:-1].argmax(-1).tolist() == generated[:, 9:].tolist()

    @every_family
    @one_pass
    def test_seeded_samples_are_the_same_without_the_cache(self, family, scope):
        model = tiny_mixture(family, scope, top_k=2)
        samples = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            samples.append(model.generate(input_ids=IDS, do_sample=True, use_cache=use_cache, **self.OPTIONS))
        assert samples[0].tolist() == samples[1].tolist()

    @every_family
    @one_pass
    def test_beams_are_the_same_without_the_cache(self, family, scope):
        model = tiny_mixture(family, scope, top_k=2)
        options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, **self.OPTIONS}
        cached = model.generate(input_ids=IDS, **options)
        assert len(cached) == 4
        assert cached.tolist() == model.generate(input_ids=IDS, use_cache=False, **options).tolist()

    @every_family
    @one_pass
    def test_a_left_padded_batch_gives_what_each_gives_alone(self, family, scope):
        model = tiny_mixture(family, scope, top_k=2)
        prompts = [IDS[0, :9], IDS[1, :5]]
        batch, mask = torch.full((2, 9), PAD), torch.zeros(2, 9, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            batch[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
        together = model.generate(input_ids=batch, attention_mask=mask, do_sample=False, **self.OPTIONS)
        for row, prompt in enumerate(prompts):
            alone = model.generate(input_ids=prompt[None], do_sample=False, **self.OPTIONS)
            assert together[row, 9:].tolist() == alone[0, len(prompt) :].tolist()

    @one_pass
    def test_a_failed_generation_leaves_no_state(self, scope):
        model = tiny_mixture(scope=scope)
        expected, hooks = logits(model), count_hooks(model)
        norm = model.base_model.model.model.norm
        handle = norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="made to fail"):
            model.generate(input_ids=IDS, max_new_tokens=2)
        handle.remove()
        assert count_hooks(model) == hooks
        assert torch.equal(logits(model), expected)


def fail(*_):
    raise RuntimeError("made to fail")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_an_initialisation_that_changes_the_base_weights_is_refused(init):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the base weights"):
        MoELoraConfig(num_experts=2, init_lora_weights=init)


def test_all_linear_on_a_mixture_of_experts_names_the_modules_that_can_be_routed():
    config = OlmoeConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=16,
    )
    with pytest.raises(ValueError, match="cannot be routed.*fused experts") as refused:
        get_peft_model(OlmoeForCausalLM(config), MoELoraConfig(num_experts=2, r=2, target_modules="all-linear"))
    advised = re.search(r"target_modules=(\[.*\])", str(refused.value))[1]
    assert ast.literal_eval(advised) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    mixture = MoELoraConfig(num_experts=2, r=2, target_modules=ast.literal_eval(advised))
    assert get_peft_model(OlmoeForCausalLM(config), mixture)(torch.arange(3)[None]).logits.shape == (1, 3, 16)
