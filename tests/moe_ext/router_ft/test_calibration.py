"""Calibration text is the same for the same seed, and a walk through the layers is the model's own forward pass."""

import pytest
import torch

from moe_ext.router_ft.calibration import CalibrationConfig, LayerWalk, block_length, text_blocks


def rows(blocks):
    return {tuple(row) for row in blocks.tolist()}


def test_blocks_are_chosen_by_seed_from_all_sources(tiny_sources, tokenizer):
    sources = tiny_sources.split(",")
    options = {"num_blocks": 11, "block_size": 16}
    blocks = text_blocks(sources, "train", tokenizer, **options, seed=1)
    assert blocks.shape == (11, 16)
    assert torch.equal(blocks, text_blocks(sources, "train", tokenizer, **options, seed=1))
    assert not torch.equal(blocks, text_blocks(sources, "train", tokenizer, **options, seed=2))
    alone = rows(text_blocks(sources[:1], "train", tokenizer, num_blocks=6, block_size=16, seed=1))
    assert alone <= rows(blocks)  # equal blocks of the made-up text are one row here


def test_too_little_text_is_refused_with_both_counts(tiny_sources, tokenizer):
    source = tiny_sources.split(",")[0]
    with pytest.raises(ValueError, match=r"\d+ blocks.*\b16\b.*'train'.*\b5000\b"):
        text_blocks([source], "train", tokenizer, num_blocks=5000, block_size=16, seed=0)


def test_a_block_is_no_longer_than_the_context():
    assert block_length(CalibrationConfig(), 512) == 512
    assert block_length(CalibrationConfig(), 4096) == 2048
    assert block_length(CalibrationConfig(seqlen=100), 512) == 100
    with pytest.raises(ValueError, match=r"seqlen.*\b1024\b.*\b512\b"):
        block_length(CalibrationConfig(seqlen=1024), 512)


@pytest.mark.parametrize(("option", "value"), [("nsamples", 0), ("seqlen", 1)])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        CalibrationConfig(**{option: value})


def test_a_walk_through_all_layers_is_the_forward_pass(family, model_of):
    model = model_of(family)
    blocks = torch.randint(3, 64, (5, 30), generator=torch.Generator().manual_seed(0))
    walk = LayerWalk(model, model.model.layers, blocks, batch_size=2)
    for layer in model.model.layers:
        walk.advance(layer)
    with torch.no_grad():
        expected = model.model(blocks).last_hidden_state
        found = model.model.norm(torch.cat(walk.inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
