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
"""A mixture inside the tools people train and run models with: Trainer, TRL, autocast, bitsandbytes, torch.compile."""

import importlib.util
from functools import partial

import pytest
import torch
from moe_testing import PAD, SCOPES, TARGETS, VOCAB, spread_gates, tiny_base, tiny_mixture, tokens, trainable_gradients
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    MoELoraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora.moe_router import RouterConfig


def available(package):
    return importlib.util.find_spec(package) is not None


needs_bitsandbytes = pytest.mark.skipif(not available("bitsandbytes"), reason="bitsandbytes is not installed")
needs_trl = pytest.mark.skipif(not available("trl"), reason="trl is not installed")
every_scope = pytest.mark.parametrize("scope", SCOPES)
COEFFICIENTS = {"router_balance_coef": 0.1, "router_z_coef": 0.01, "router_entropy_coef": 0.01}


class Sentences(torch.utils.data.Dataset):
    """Sixteen short sequences of different lengths, each counting up: something that can be learned."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = [3 + (i * 5 + t) % (VOCAB - 3) for t in range(6 + i % 5)]
        return {"input_ids": ids}


def collate(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.full((len(samples), longest), PAD)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
        mask[row, : len(sample["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def arguments(folder, **changes):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **changes,
    }


def learner(**config):
    """A mixture on a base whose head is wide enough that a few steps show in the loss."""
    return tiny_mixture(base=tiny_base(initializer_range=0.2), **config)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train(model, folder, resume=None, **changes):
    trainer = Trainer(
        model, TrainingArguments(**arguments(folder, **changes)), train_dataset=Sentences(), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class TestTrainer:
    @every_scope
    def test_the_loss_falls(self, scope, tmp_path):
        trainer = train(learner(scope=scope, top_k=2, **COEFFICIENTS), tmp_path, max_steps=12)
        assert losses(trainer)[-1] < losses(trainer)[0] - 0.15

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_gives_the_same_losses(self, use_reentrant, tmp_path):
        plain = train(tiny_mixture(top_k=2, **COEFFICIENTS), tmp_path, max_steps=3)
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        model = tiny_mixture(top_k=2, **COEFFICIENTS)
        model.enable_input_require_grads()
        checkpointed = train(model, tmp_path, max_steps=3, **options)
        assert losses(checkpointed) == pytest.approx(losses(plain), abs=2e-3)

    def test_the_first_logged_loss_holds_the_routers_losses_once(self, tmp_path):
        with_losses = train(tiny_mixture(router_balance_coef=0.5), tmp_path, max_steps=1)
        without = train(tiny_mixture(router_balance_coef=0.0), tmp_path, max_steps=1)
        # The balance is at least one and, over three experts, at most three.
        assert 0.5 <= losses(with_losses)[0] - losses(without)[0] <= 1.5

    def test_accumulated_micro_batches_log_the_loss_of_the_batch(self, tmp_path):
        options = {"router_balance_coef": 0.0, "router_z_coef": 0.5}

        class EqualLengths(Sentences):
            def __getitem__(self, i):
                return {"input_ids": super().__getitem__(0)["input_ids"]}

        logged = []
        for batch, steps in ((4, 1), (2, 2)):
            changes = {"max_steps": 2, "per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
            trainer = Trainer(
                tiny_mixture(**options),
                TrainingArguments(**arguments(tmp_path, **changes)),
                train_dataset=EqualLengths(),
                data_collator=collate,
            )
            trainer.train()
            logged.append(losses(trainer))
        assert logged[1] == pytest.approx(logged[0], abs=2e-3)

    def test_a_checkpoint_holds_the_mixture_and_loads_by_itself(self, tmp_path):
        tiny_base().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        trainer = train(
            tiny_mixture(base=base, top_k=2), tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2
        )
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
        ids = tokens(2, 6)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)

    def test_resuming_continues_with_equal_losses(self, tmp_path):
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        whole = train(tiny_mixture(top_k=2, router_jitter=0.1, **COEFFICIENTS), tmp_path / "whole", **options)
        fresh = tiny_mixture(top_k=2, router_jitter=0.1, **COEFFICIENTS)
        spread_gates(fresh, seed=99)
        resumed = train(fresh, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
        assert losses(resumed)[-3:] == losses(whole)[-3:]

    def test_evaluation_adds_no_router_loss(self, tmp_path):
        evaluated = []
        for coefficient in (0.0, 0.5):
            trainer = Trainer(
                tiny_mixture(router_balance_coef=coefficient),
                TrainingArguments(**arguments(tmp_path)),
                eval_dataset=Sentences(),
                data_collator=collate,
            )
            evaluated.append(trainer.evaluate()["eval_loss"])
        assert evaluated[0] == evaluated[1]

    def test_the_optimizer_holds_experts_and_router(self, tmp_path):
        model = tiny_mixture()
        trainer = train(model, tmp_path, max_steps=1)
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert all(id(p) in held for p in model.parameters() if p.requires_grad)
        assert any(id(p) in held for p in model.base_model.moe_router.parameters())


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>"] + [f"w{i}" for i in range(VOCAB - 3)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<eos>"
    )


@needs_trl
class TestSFTTrainer:
    def trainer(self, model, folder, **changes):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        peft_config = changes.pop("peft_config", None)
        texts = [" ".join(f"w{(i * 5 + t) % (VOCAB - 3)}" for t in range(6 + i % 5)) for i in range(16)]
        changes = {"bf16": False, "max_steps": 8, **changes}
        return SFTTrainer(
            model=model,
            args=SFTConfig(**arguments(folder, **changes)),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tiny_tokenizer(),
            peft_config=peft_config,
        )

    @every_scope
    def test_the_loss_falls(self, scope, tmp_path):
        trainer = self.trainer(learner(scope=scope, top_k=2, **COEFFICIENTS), tmp_path)
        trainer.train()
        assert losses(trainer)[-1] < losses(trainer)[0] - 0.1

    def test_the_mixture_can_be_given_as_peft_config(self, tmp_path):
        config = MoELoraConfig(num_experts=3, top_k=2, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
        trainer = self.trainer(tiny_base(), tmp_path, peft_config=config, max_steps=4)
        before = [gate.weight.detach().clone() for gate in trainer.model.base_model.moe_router.gates.values()]
        trainer.train()
        after = [gate.weight for gate in trainer.model.base_model.moe_router.gates.values()]
        assert all(not torch.equal(old, new) for old, new in zip(before, after))

    def test_gradient_checkpointing_is_on_by_default_and_changes_no_loss(self, tmp_path):
        runs = []
        for changes in ({}, {"gradient_checkpointing": False}):
            trainer = self.trainer(tiny_mixture(top_k=2, **COEFFICIENTS), tmp_path, max_steps=4, **changes)
            runs.append(trainer)
            trainer.train()
        assert runs[0].args.gradient_checkpointing and not runs[1].args.gradient_checkpointing
        assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=2e-3)

    @pytest.mark.parametrize("steps", [1, 2], ids=["one_batch", "accumulated"])
    def test_the_routers_losses_reach_its_gradients(self, steps, tmp_path):
        """TRL makes its loss from log-probabilities and never reads `outputs.loss`."""
        gradients = []
        for coefficient in (0.0, 3.0):
            model = tiny_mixture(router_balance_coef=0.0, router_z_coef=coefficient)
            seen = {}
            for key, gate in model.base_model.moe_router.gates.items():
                gate.weight.register_hook(
                    lambda g, key=key, seen=seen: seen.update({key: seen.get(key, 0) + g.clone()})
                )
            trainer = self.trainer(
                model, tmp_path, max_steps=1, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
                gradient_checkpointing=False, max_grad_norm=0.0,
            )  # fmt: skip
            batches = []
            model.register_forward_pre_hook(partial(note_arguments, batches), with_kwargs=True)
            trainer.train()
            assert len(batches) == steps
            gradients.append(seen)
        expected = z_loss_gradients(tiny_mixture(router_balance_coef=0.0, router_z_coef=3.0), batches)
        for key, gradient in expected.items():
            torch.testing.assert_close(gradients[1][key] - gradients[0][key], gradient, rtol=0, atol=1e-5)
            assert gradient.abs().max() > 5e-2

    def test_a_trained_mixture_saves_and_loads(self, tmp_path):
        tiny_base().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        trainer = self.trainer(tiny_mixture(base=base, top_k=2), tmp_path / "run", max_steps=2)
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        ids = tokens(2, 6)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def note_arguments(seen, module, args, kwargs):
    seen.append(dict(kwargs))


def z_loss_gradients(model, batches):
    """Gradients of the z-loss, each batch weighed by its share of the labels."""
    model.train()
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    for batch, count in zip(batches, counts):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        (3.0 * output["router_z_loss"] * count / sum(counts)).backward()
    return {key: gate.weight.grad for key, gate in model.base_model.moe_router.gates.items()}


class TestAutocast:
    @torch.no_grad()
    def rounding_of(self, model):
        """The root mean square of what autocast changes in the logits, relative to their own."""
        exact = model(input_ids=tokens(4, 9)).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(input_ids=tokens(4, 9)).logits.float()
        return ((rounded - exact).square().mean() / exact.square().mean()).sqrt().item()

    @every_scope
    def test_logits_are_those_of_float32_as_nearly_as_those_of_plain_lora(self, scope):
        model = tiny_mixture(scope=scope)
        routed = self.rounding_of(model)
        model.base_model.set_adapter("expert_0")
        assert routed < 2 * self.rounding_of(model) < 0.05

    @every_scope
    def test_gates_stay_in_float32(self, scope):
        model = tiny_mixture(scope=scope)
        seen = []
        for gate in model.base_model.moe_router.gates.values():
            gate.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=tokens(2, 6))
        assert set(seen) == {torch.float32}

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @every_scope
    def test_checkpointed_gradients_are_those_without(self, scope, use_reentrant):
        model = tiny_mixture(scope=scope, **COEFFICIENTS).train()
        ids = tokens(2, 6)

        def gradients():
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            return trainable_gradients(model)

        plain = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        torch.testing.assert_close(gradients(), plain, rtol=0, atol=1e-5)

    def test_a_bfloat16_base_trains_experts_in_float32(self):
        model = tiny_mixture(base=tiny_base().bfloat16(), **COEFFICIENTS).train()
        ids = tokens(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        assert {gradient.dtype for gradient in trainable_gradients(model).values()} == {torch.float32}

    def test_without_autocast_of_adapters_everything_runs_in_bfloat16(self):
        config = MoELoraConfig(num_experts=2, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_base().bfloat16(), config, autocast_adapter_dtype=False).train()
        experts = [p for name, p in model.named_parameters() if ".lora_" in name]
        assert {p.dtype for p in experts} == {torch.bfloat16}
        ids = tokens(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        trainable_gradients(model)


QUANTIZED = {
    "8bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "fp4_double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
}


@needs_bitsandbytes
@pytest.mark.parametrize("how", QUANTIZED)
class TestBitsAndBytes:
    @pytest.fixture
    def base(self, how, tmp_path):
        tiny_base(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
        config = BitsAndBytesConfig(**QUANTIZED[how])

        def load():
            return AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
            )

        return load

    @every_scope
    def test_a_mixture_trains_on_a_quantized_base(self, scope, base):
        model = tiny_mixture(
            base=prepare_model_for_kbit_training(base()), scope=scope, top_k=2, **COEFFICIENTS
        ).train()
        ids = tokens(2, 6)
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        history = []
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            trainable_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        assert history[-1] < history[0] - 0.1

    @every_scope
    def test_routed_logits_are_those_of_the_dequantized_base(self, scope, base):
        quantized = tiny_mixture(base=base(), scope=scope)
        plain = tiny_mixture(base=base().dequantize().float(), scope=scope)
        ids = tokens(2, 6)
        with torch.no_grad():
            actual, expected = quantized(input_ids=ids).logits, plain(input_ids=ids).logits
        # 8-bit products round the activations too: 1 part in 127 of each row's largest value
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())

    def test_a_mixture_on_a_quantized_base_saves_and_loads(self, base, tmp_path):
        model = tiny_mixture(base=base(), top_k=2)
        ids = tokens(2, 6)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            model.save_pretrained(tmp_path / "mixture")
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(base(), tmp_path / "mixture")
            assert torch.equal(loaded(input_ids=ids).logits, expected)

    def test_generation_uses_the_cache(self, base):
        model = tiny_mixture(base=base(), top_k=2)
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        ids = tokens(1, 5)
        cached = model.generate(input_ids=ids, **options)
        assert cached.shape == (1, 10)

    def test_prepare_model_for_kbit_training_checkpoints_the_mixture(self, base):
        prepared = prepare_model_for_kbit_training(base(), use_gradient_checkpointing=True)
        model = tiny_mixture(base=prepared, **COEFFICIENTS).train()
        plain = tiny_mixture(
            base=prepare_model_for_kbit_training(base(), use_gradient_checkpointing=False), **COEFFICIENTS
        ).train()
        ids = tokens(2, 6)
        outputs = [m(input_ids=ids, labels=ids) for m in (model, plain)]
        for output in outputs:
            output.loss.backward()
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(trainable_gradients(model), trainable_gradients(plain), rtol=0, atol=1e-4)


class TestWithOtherTools:
    def test_a_router_on_adapters_trains_in_the_trainer(self, tmp_path):
        model = get_peft_model(
            tiny_base(initializer_range=0.2),
            LoraConfig(target_modules=TARGETS["llama"], task_type="CAUSAL_LM"),
            adapter_name="a",
        )
        model.add_adapter("b", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["a", "b"])
        model.attach_router(RouterConfig(scope="block", top_k=1))
        trainer = train(model, tmp_path, max_steps=8)
        assert losses(trainer)[-1] < losses(trainer)[0] - 0.1

    @pytest.mark.parametrize("scope", ["layer", "block", "model"])
    def test_a_compiled_model_gives_the_same_logits(self, scope):
        model = tiny_mixture(scope=scope, top_k=2)
        ids = tokens(2, 6)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="eager")
            for _ in range(2):
                torch.testing.assert_close(
                    compiled(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=1e-5
                )
        assert model.routing_summary()

    def test_inference_mode_gives_the_same_logits(self):
        model = tiny_mixture(top_k=2)
        ids = tokens(2, 6)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids).logits, expected)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
