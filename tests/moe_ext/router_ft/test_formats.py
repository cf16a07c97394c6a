"""Number formats against their own definition: every level spelt out, every bit counted."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")

from moe_ext.router_ft.formats import (
    FORMATS,
    bits_per_weight,
    check_format,
    group_size,
    pack,
    round_to_levels,
    round_to_nearest,
    scales_of,
    scheme_json,
    spread,
    unpack,
)

PACKED = [name for name in FORMATS if name != "BF16"]
LEVELS = {
    "INT4": list(range(-8, 8)),
    "INT3": list(range(-4, 4)),
    "INT2": list(range(-2, 2)),
    "MXFP4": [sign * x for sign in (-1, 1) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)],
    "MXFP8": [x for x in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist() if x == x],
}


def some_weights(columns, seed=0):
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[3], weight[5], weight[:, 7] = 0, weight[5] * 1e-3, weight[:, 7] * 20
    return weight


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("columns", [32, 64, 128, 192, 256])
def test_a_rounded_matrix_is_packed_and_unpacked_without_loss(name, columns):
    weight = some_weights(columns)
    rounded = round_to_nearest(weight, name)
    packed = pack(rounded, scales_of(weight, name), name)
    assert torch.equal(unpack(packed, name, columns).float(), rounded)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("columns", [32, 128, 192])
def test_the_bits_a_weight_are_those_that_are_stored(name, columns):
    weight = some_weights(columns)
    packed = pack(round_to_nearest(weight, name), scales_of(weight, name), name)
    stored = sum(8 * tensor.nbytes for part, tensor in packed.items() if part != "weight_shape")
    assert bits_per_weight(name, columns) == stored / weight.numel()


def test_the_bits_of_the_usual_matrices():
    bits = {name: bits_per_weight(name, 2048) for name in FORMATS}
    assert bits == {"BF16": 16, "MXFP8": 8.25, "MXFP4": 4.25, "INT4": 4.125, "INT3": 3.125, "INT2": 2.125}


@pytest.mark.parametrize("name", PACKED)
def test_every_weight_goes_to_the_nearest_level(name):
    weight = some_weights(128)
    scale = spread(scales_of(weight, name), 128).float()
    levels = torch.tensor(LEVELS[name])
    candidates = (levels * scale[..., None]).bfloat16().float()
    nearest = (candidates - weight[..., None]).abs().amin(dim=-1)
    found = (round_to_nearest(weight, name) - weight).abs()
    # Candidates are rounded to bfloat16 after the choice, so one may lie a bfloat16 step nearer than the chosen.
    torch.testing.assert_close(found, nearest, rtol=0, atol=float(weight.abs().max()) * 2**-8)
    assert torch.isin(round_to_nearest(weight, name), candidates).all()


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(PACKED), seed=st.integers(0, 10**6))
def test_rounding_twice_is_rounding_once(name, seed):
    weight = some_weights(64, seed)
    scale = spread(scales_of(weight, name), 64)
    once = round_to_levels(weight, scale, name)
    assert torch.equal(round_to_levels(once, scale, name), once)


def test_the_scale_of_mxfp4_rounds_the_largest_weight_to_one_mantissa_bit():
    largest = torch.tensor([1.0, 1.49, 1.51, 1.74, 1.76, 1.99])
    weight = largest[:, None] * torch.linspace(-0.9, 1, 32)
    even = torch.tensor([1, 1, 1, 1, 2, 2]) / 4  # 1.74 becomes 1.5, 1.76 becomes 2
    assert torch.equal(scales_of(weight, "MXFP4").float().flatten(), even)


def test_the_scale_of_mxfp8_is_the_smallest_that_clips_nothing():
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(200, generator=generator) * 4 + 0.1
    weight = largest[:, None] * torch.linspace(-0.9, 1, 32)
    smallest = 2 ** torch.ceil(torch.log2(largest / 448))
    assert torch.equal(scales_of(weight, "MXFP8").float().flatten(), smallest)


def test_the_scheme_of_a_checkpoint_is_plain_json():
    written = json.loads(json.dumps(scheme_json("INT3", 192, ["model.layers.0.q_proj"])))
    assert written["targets"] == ["model.layers.0.q_proj"]
    assert (written["weights"]["num_bits"], written["weights"]["group_size"]) == (3, 64)
    assert written["format"] == "pack-quantized"


def test_an_unknown_format_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'INT5'.*BF16, MXFP8, MXFP4, INT4, INT3, INT2"):
        check_format("INT5")


@pytest.mark.parametrize("name", PACKED)
def test_columns_that_make_no_groups_are_refused(name):
    with pytest.raises(ValueError, match=r"\b48 columns.*\b32\b"):
        group_size(name, 48)
