import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_ext.moqe.experts.group_quant import (
    CLIPPED_TO,
    GroupFormat,
    PackedLinear,
    choose_scales,
    pack,
    round_to_codes,
    spread,
    unpack,
)


def rounded_one_by_one(weight, scale, form):  # oracle: every level tried for every weight
    levels = [(code - (2**form.bits - 1) / 2) for code in range(2**form.bits)]
    group = form.group_of(weight.shape[1])
    rows = [
        [
            min((level * scale[row, column // group] for level in levels), key=lambda level: abs(level - w))
            for column, w in enumerate(values)
        ]
        for row, values in enumerate(weight)
    ]
    return torch.tensor([[float(value) for value in row] for row in rows])


@given(bits=st.integers(2, 8), count=st.integers(1, 41), seed=st.integers(0, 9))
def test_what_is_packed_comes_back(bits, count, seed):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.nbytes == -(-count // 8) * bits  # eight codes of b bits fill b bytes
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_packed_layer_computes_with_the_nearest_levels(bits):
    torch.manual_seed(0)
    layer, form = nn.Linear(32, 5), GroupFormat(bits=bits, group_size=16)
    scale = choose_scales(layer.weight.detach(), form)
    expected = rounded_one_by_one(layer.weight.detach(), scale.float(), form)
    packed = PackedLinear.of(layer, form)
    torch.testing.assert_close(packed.weight(), expected)
    inputs = torch.randn(4, 32)
    torch.testing.assert_close(packed(inputs), inputs @ expected.T + layer.bias)


def test_the_scale_is_the_best_of_the_clipped_ranges():
    weight, form = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), GroupFormat(bits=2, group_size=32)
    best = choose_scales(weight, form)

    def error(scale):
        wide = spread(scale.float(), 64)
        return ((round_to_codes(weight, wide, form) - 1.5) * wide - weight).square().view(3, 2, 32).sum(-1)

    tried = [error((part * weight.view(3, 2, 32).abs().amax(-1) / 1.5).bfloat16()) for part in CLIPPED_TO]
    torch.testing.assert_close(error(best), torch.stack(tried).amin(0))


def test_more_bits_round_more_finely_and_cost_more():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(64, 8, bias=False)
    layer.weight.data = weight
    errors, sizes = [], []
    for bits in range(2, 9):
        packed = PackedLinear.of(layer, GroupFormat(bits=bits, group_size=32))
        errors.append((packed.weight() - weight).square().mean().item())
        sizes.append(8 * (packed.packed.nbytes + packed.scale.nbytes) / weight.numel())
    assert errors == sorted(errors, reverse=True)
    assert sizes == [bits + 16 / 32 for bits in range(2, 9)]
    assert sizes[0] == GroupFormat(bits=2, group_size=32).bits_per_weight(64)


def test_a_group_of_zeros_stays_small():
    layer = nn.Linear(16, 2, bias=False)
    layer.weight.data.zero_()
    assert PackedLinear.of(layer, GroupFormat(bits=2, group_size=16)).weight().abs().max() < 1e-30


def test_a_group_that_does_not_divide_a_row_is_made_smaller():
    assert GroupFormat(bits=2, group_size=64).group_of(672) == 32


@pytest.mark.parametrize(("bits", "group_size"), [(1, 32), (9, 32), (2, 0)])
def test_a_format_that_cannot_be_is_refused(bits, group_size):
    with pytest.raises(ValueError, match="but must"):
        GroupFormat(bits=bits, group_size=group_size)


def test_two_bits_of_normal_weights_are_clipped_for_a_smaller_error():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    form = GroupFormat(bits=2, group_size=64)
    unclipped = weight.abs().amax(dim=1, keepdim=True) / form.highest

    def error(scale):
        return ((round_to_codes(weight, scale, form) - form.highest) * scale - weight).square().mean()

    assert error(choose_scales(weight, form).float()) < 0.6 * error(unclipped)
