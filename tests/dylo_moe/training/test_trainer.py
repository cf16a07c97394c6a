"""What the Trainer is told, label smoothing that leaves the router's losses in, and files that come whole."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, MoELoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model
from transformers.trainer_pt_utils import LabelSmoother

from dylo_moe.training import trainer as training
from dylo_moe.training.trainer import RoutedTrainer, TrainingConfig, smoothing_term, train_adapter, training_arguments
from moe_common.text.batches import collate
from moe_common.text.packing import IGNORED_LABEL


def tiny_base():
    return tiny_model(initializer_range=0.2)


def tiny_mixture(**changed):
    config = {"num_experts": 3, "top_k": 2, "r": 2, "target_modules": "all-linear", "router_scope": "block", **changed}
    return get_peft_model(tiny_base(), MoELoraConfig(task_type="CAUSAL_LM", **config))


def some_rows(count: int = 12, length: int = 10) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (count, length), generator=generator).tolist()
    labels = [[IGNORED_LABEL] * (number % 4) + row[number % 4 :] for number, row in enumerate(tokens)]
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * length] * count, "labels": labels})


def short(**changed) -> TrainingConfig:
    return TrainingConfig(
        **{"num_steps": 3, "train_batch_size": 4, "logging_steps": 1, "save_steps": 100, "bf16": False, **changed}
    )


def arguments(folder, *, num_rows=100, validated=False, **changed):
    return training_arguments(TrainingConfig(**changed), folder, num_rows=num_rows, validated=validated)


# -- options that act ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides by itself")
@pytest.mark.parametrize(("flags", "fast"), [({"avx512f", "amx_tile"}, True), ({"avx512f"}, False), (set(), False)])
def test_bf16_is_chosen_on_a_cpu_only_where_it_has_amx_tiles(monkeypatch, flags, fast):
    monkeypatch.setattr(training, "_cpu_flags", lambda: flags)
    assert training.multiplies_bf16_fast() is fast
    assert TrainingConfig().autocast_bf16 is fast


@pytest.mark.parametrize("wanted", [True, False])
def test_bf16_as_asked_wins_over_the_hardware(tmp_path, wanted):
    assert arguments(tmp_path, bf16=wanted).bf16 is wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains in float16")
def test_fp16_is_refused_without_a_gpu_and_says_what_to_use():
    with pytest.raises(ValueError, match="float16.*GPU.*--bf16"):
        TrainingConfig(fp16=True)


def test_fp16_is_what_the_trainer_is_told_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = {}
    monkeypatch.setattr(
        "moe_common.runs.trainer_arguments.TrainingArguments",
        lambda **options: told.update(options) or FakeArguments(),
    )
    arguments(tmp_path, fp16=True)
    assert (told["fp16"], told["bf16"]) == (True, False)


class FakeArguments:
    world_size = 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"eval_batch_size": 5}, {"per_device_eval_batch_size": 5}),
        ({"gradient_accumulation_steps": 7}, {"gradient_accumulation_steps": 7}),
        ({"weight_decay": 0.25}, {"weight_decay": 0.25}),
        ({"learning_rate": 0.5}, {"learning_rate": 0.5}),
        ({"num_epochs": 2.5}, {"num_train_epochs": 2.5, "max_steps": -1}),
        ({"num_epochs": 2.5, "num_steps": 9}, {"max_steps": 9}),
        ({"save_steps": 6}, {"save_steps": 6, "eval_steps": 6}),
        ({"logging_steps": 8}, {"logging_steps": 8}),
        ({"seed": 4}, {"seed": 4}),
        ({"early_stopping_patience": 2}, {"load_best_model_at_end": True}),
        ({}, {"load_best_model_at_end": False, "report_to": []}),
    ],
)
def test_an_option_reaches_the_trainer(tmp_path, changed, expected):
    told = arguments(tmp_path, validated=True, **changed)
    assert {name: getattr(told, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("strategy", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_the_rate_falls_as_the_strategy_says(tmp_path, strategy, middle, last):
    told = arguments(tmp_path, lr_strategy=strategy, num_steps=40, learning_rate=1.0)
    trainer = RoutedTrainer(model=tiny_mixture(), args=told, train_dataset=some_rows(), data_collator=collate)
    trainer.create_optimizer_and_scheduler(num_training_steps=40)
    rates = [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(41)]
    assert rates[:3] == [0.0, 0.5, 1.0]  # warmed up over a twentieth of the steps
    assert rates[21] == pytest.approx(middle, abs=1e-6)
    assert rates[40] == pytest.approx(last, abs=1e-6)
    third = {"constant": 1.0, "linear": 1 - 10 / 38, "cosine": 0.8386}
    assert rates[12] == pytest.approx(third[strategy], abs=1e-3)


def test_the_steps_of_epochs_are_counted_as_the_trainer_does(tmp_path):
    config = short(num_steps=None, num_epochs=1.5, train_batch_size=4, gradient_accumulation_steps=2)
    done = train_adapter(tiny_mixture(), some_rows(30), config, tmp_path)
    assert done["history"][-1]["step"] == config.total_steps(30) == 6
    assert TrainingConfig(num_steps=None, num_epochs=1, train_batch_size=4).total_steps(30, num_processes=4) == 2


def test_gradient_checkpointing_gives_the_same_losses_and_recomputes(tmp_path):
    losses = {}
    for wanted in (True, False):
        model = tiny_mixture()
        done = train_adapter(model, some_rows(), short(gradient_checkpointing=wanted), tmp_path / str(wanted))
        losses[wanted] = [line["loss"] for line in done["history"] if "loss" in line]
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) is wanted
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    losses = {}
    for size, times in ((4, 1), (2, 2)):
        config = short(train_batch_size=size, gradient_accumulation_steps=times, label_smoothing=0.1)
        done = train_adapter(tiny_mixture(router_balance_coef=0.0), some_rows(), config, tmp_path / str(size))
        losses[size] = [line["loss"] for line in done["history"] if "loss" in line]
    assert losses[2] == pytest.approx(losses[4], rel=1e-5)


@pytest.mark.parametrize("name", training.TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_with_the_extra(monkeypatch, name):
    monkeypatch.setattr(training, "is_installed", lambda package: package != name)
    with pytest.raises(ValueError, match=rf"{name}.*\[track\]"):
        TrainingConfig(report_to=name)


def test_the_trackers_that_are_named_are_reported_to(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "is_installed", lambda package: True)
    assert arguments(tmp_path, report_to="tensorboard, trackio").report_to == ["tensorboard", "trackio"]
    assert arguments(tmp_path, report_to="none").report_to == []


# -- label smoothing and the router --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, 37])
def test_the_smoothing_term_is_what_transformers_smoother_adds(count):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    labels[0, :3] = labels[2, 4:] = IGNORED_LABEL
    output = {"logits": logits}
    smoothed, plain = (
        LabelSmoother(epsilon=epsilon)(output, labels, shift_labels=True, num_items_in_batch=count)
        for epsilon in (0.2, 0.0)
    )
    assert plain + 0.2 * smoothing_term(logits, labels, count=count) == pytest.approx(smoothed.item(), rel=1e-6)


def first_step(folder, *, smoothing: float, coefficient: float):
    """The loss of the first step, and the gradients that it gives the gates."""
    model = tiny_mixture(router_balance_coef=coefficient)
    told = training_arguments(short(), folder, num_rows=12, validated=False)
    trainer = RoutedTrainer(
        model=model, args=told, train_dataset=some_rows(), data_collator=collate, label_smoothing=smoothing
    )
    batch = collate(list(some_rows(4)))
    model.train()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(30))
    loss.backward()
    gates = {name: p.grad.clone() for name, p in model.named_parameters() if "moe_router" in name}
    return loss.item(), gates, model.routing_losses()["router_balance_loss"].item(), batch["labels"]


def test_under_label_smoothing_the_balance_loss_counts_exactly_once(tmp_path):
    with_balance, _, balance, labels = first_step(tmp_path, smoothing=0.1, coefficient=0.5)
    without, *_ = first_step(tmp_path, smoothing=0.1, coefficient=0.0)
    share = (labels[:, 1:] != IGNORED_LABEL).sum().item() / 30
    assert with_balance - without == pytest.approx(0.5 * balance * share, rel=1e-4)


def test_under_label_smoothing_the_balance_loss_still_trains_the_router(tmp_path):
    gradients = {}
    for smoothing in (0.0, 0.3):
        with_balance, without = (
            first_step(tmp_path, smoothing=smoothing, coefficient=coefficient)[1] for coefficient in (0.5, 0.0)
        )
        gradients[smoothing] = {name: with_balance[name] - without[name] for name in with_balance}
    for name, gradient in gradients[0.0].items():
        assert gradient.abs().max() > 1e-6
        # float32: two differences of numbers a thousand times as large
        torch.testing.assert_close(gradients[0.3][name], gradient, rtol=1e-2, atol=1e-7)


def test_label_smoothing_changes_training_and_not_the_measuring(tmp_path):
    done = {
        smoothing: train_adapter(
            tiny_mixture(),
            some_rows(),
            short(label_smoothing=smoothing, early_stopping_patience=9, save_steps=3),
            tmp_path / str(smoothing),
            validation=some_rows(6),
        )["history"]
        for smoothing in (0.0, 0.2)
    }
    first = {smoothing: history[0]["loss"] for smoothing, history in done.items()}
    assert first[0.2] != first[0.0]
    model = tiny_mixture()
    trainer = RoutedTrainer(
        model=model,
        args=training_arguments(short(), tmp_path, num_rows=12, validated=True),
        eval_dataset=some_rows(6),
        data_collator=collate,
        label_smoothing=0.2,
    )
    model.eval()
    with torch.no_grad():
        expected = model(**collate(list(some_rows(6)))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# -- files ---------------------------------------------------------------------------------------------------------


def test_what_was_logged_is_kept_with_the_adapter_and_names_the_base(tmp_path):
    train_adapter(tiny_mixture(), some_rows(), short(), tmp_path, base_name="tiny")
    assert training.is_trained(tmp_path)
    history = json.loads((tmp_path / "finished.json").read_text())["history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3]
    assert "routing/model.layers.1/usage/expert_2" in history[0]
    assert json.loads((tmp_path / "base.json").read_text())["name"] == "tiny"


def test_the_log_that_a_person_sees_leaves_the_single_gates_out(tmp_path, capsys):
    train_adapter(tiny_mixture(), some_rows(), short(), tmp_path)
    said = capsys.readouterr()
    assert "router_entropy" in said.out + said.err
    assert "routing/" not in said.out + said.err


def test_one_lora_trains_without_a_word_on_routing(tmp_path):
    model = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    done = train_adapter(model, some_rows(), short(label_smoothing=0.1), tmp_path)
    assert not any("rout" in name for line in done["history"] for name in line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps.*\b0\b.*\b1\b"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"report_to": "paper"}, "report_to.*'paper'"),
        ({"num_epochs": -1}, "num_epochs is -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)
