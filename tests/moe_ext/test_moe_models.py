"""The small mixture is found by name, is what its report says, and is balanced."""

import json

import pytest
import torch

from moe_ext.moe_models import SMALL_MOE_FOLDER, load_moe
from moe_ext.routers import moe_layers

MEGABYTES = 13


@pytest.fixture(scope="module")
def report():
    return json.loads((SMALL_MOE_FOLDER / "training_report.json").read_text())


def test_the_small_mixture_is_loaded_without_a_network(report):
    model, tokenizer = load_moe()
    assert model.num_parameters() == report["parameters"]
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.pad_token_id is not None
    assert [layer.num_experts for layer in moe_layers(model)] == [8] * 4


def test_it_is_stored_in_bfloat16_and_is_small():
    assert load_moe(dtype="auto")[0].dtype == torch.bfloat16
    assert sum(file.stat().st_size for file in SMALL_MOE_FOLDER.iterdir()) < MEGABYTES * 1e6


def test_no_expert_starves(report):
    for shares in report["expert_shares_of_validation_tokens"]:
        assert sum(shares) == pytest.approx(1, abs=0.001)
        assert min(shares) > 0.25 / len(shares)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="is a dense model"):
        load_moe("base")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'small-mo'"):
        load_moe("small-mo")
