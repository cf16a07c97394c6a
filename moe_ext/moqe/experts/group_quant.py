"""Weights rounded to a few bits by group, and stored so.

A row is cut into groups that share a scale. With b bits the levels of a group are

    (code - (2^b - 1) / 2) * scale,        code = 0 ... 2^b - 1

half-integers times the scale: symmetric, without a level wasted on one side. At 2 bits that is the best uniform
quantiser of a normal distribution (Max 1960); -2 ... 1 would have more than twice its error. The scale is the one of
a search over clipped ranges that has the least squared error.

Codes are stored in planes of 4, 2 and 1 bits, so that 3 bits are 3 bits: 8 codes take 3 bytes.

Shape letters: O rows, C columns, G groups in a row, N codes, P bytes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

SCALE_DTYPE = torch.bfloat16
PLANE_WIDTHS = (8, 4, 2, 1)  # bits; each divides a byte
CODES_AT_ONCE = 8  # codes are padded to a multiple of it, so that every plane fills whole bytes
# Parts of a group's largest weight that the outermost level may stand for.
CLIPPED_TO = tuple(1.0 - 0.05 * step for step in range(13))


@dataclass(frozen=True)
class GroupFormat:
    """How weights are rounded.

    Args:
        bits: of a code, 2 to 8.
        group_size: weights of a row that share a scale; where it does not divide the row, the largest number that
            divides both does.
    """

    bits: int
    group_size: int = 64

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}, but must lie between 2 and 8.")
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}, but must be at least 1.")

    @property
    def highest(self) -> float:
        """The outermost level, in units of the scale."""
        return (2**self.bits - 1) / 2

    def group_of(self, num_columns: int) -> int:
        """Weights of a row of so many columns that share a scale."""
        return math.gcd(num_columns, self.group_size)

    def bits_per_weight(self, num_columns: int) -> float:
        """What a weight costs, its share of the scale included."""
        return self.bits + torch.finfo(SCALE_DTYPE).bits / self.group_of(num_columns)


def choose_scales(weight_OC: Tensor, form: GroupFormat) -> Tensor:
    """The scale of each group [O, G] with which rounding to nearest has the least squared error."""
    groups_OGK = weight_OC.float().unflatten(1, (-1, form.group_of(weight_OC.shape[1])))
    largest_OG = groups_OGK.abs().amax(-1)
    best_OG, least_OG = torch.ones_like(largest_OG), torch.full_like(largest_OG, torch.inf)
    for part in CLIPPED_TO:
        scale_OG = (part * largest_OG / form.highest).to(SCALE_DTYPE).float()
        # A group of zeros: any scale does, but it must not divide by zero.
        scale_OG = torch.where(scale_OG > 0, scale_OG, torch.finfo(SCALE_DTYPE).tiny)
        error_OG = (round_to_codes(groups_OGK, scale_OG[..., None], form) - form.highest).mul_(scale_OG[..., None])
        error_OG = error_OG.sub_(groups_OGK).square_().sum(-1)
        better_OG = error_OG < least_OG
        best_OG, least_OG = torch.where(better_OG, scale_OG, best_OG), torch.where(better_OG, error_OG, least_OG)
    return best_OG.to(SCALE_DTYPE)


def round_to_codes(weight: Tensor, scale: Tensor, form: GroupFormat) -> Tensor:
    """The nearest code of each weight, as numbers of the weight's dtype; `scale` is broadcast against it."""
    return (weight / scale + form.highest).round_().clamp_(0, 2 * form.highest)


def spread(scale_OG: Tensor, num_columns: int) -> Tensor:
    """The scale of each weight [O, C] from that of each group."""
    return scale_OG.repeat_interleave(num_columns // scale_OG.shape[1], dim=1)


def planes_of(bits: int) -> list[int]:
    """The widths of the planes that hold codes of so many bits, the highest bits first: 3 is 2 and 1."""
    return [width for width in PLANE_WIDTHS if bits & width]


def pack(codes_N: Tensor, bits: int) -> Tensor:
    """Codes (uint8, below 2^bits) in as few bytes as their bits fill [P]."""
    codes_N = pad(codes_N, (0, -len(codes_N) % CODES_AT_ONCE))
    planes, below = [], bits
    for width in planes_of(bits):
        below -= width
        plane_N = (codes_N >> below) & (2**width - 1)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes_N.device)
        planes.append((plane_N.unflatten(0, (-1, 8 // width)) << shifts).sum(1, dtype=torch.uint8))
    return torch.cat(planes)


def unpack(packed_P: Tensor, bits: int, num_codes: int) -> Tensor:
    """The codes (uint8) that `pack` was given, so many of them."""
    padded = num_codes + -num_codes % CODES_AT_ONCE
    codes_N, start = None, 0
    for width in planes_of(bits):
        plane_P = packed_P[start : start + padded * width // 8]
        start += len(plane_P)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed_P.device)
        plane_N = ((plane_P[:, None] >> shifts) & (2**width - 1)).flatten()
        codes_N = plane_N if codes_N is None else (codes_N << width) | plane_N
    return codes_N[:num_codes]


class PackedLinear(nn.Module):
    """A frozen linear layer that holds packed codes and makes its weights anew in each call.

    Args:
        in_features, out_features: C and O.
        form: how the weights were rounded.
        has_bias: whether a bias is added.
    """

    def __init__(self, in_features: int, out_features: int, form: GroupFormat, *, has_bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = in_features, out_features, form
        num_codes = in_features * out_features
        num_bytes = (num_codes + -num_codes % CODES_AT_ONCE) * form.bits // 8
        num_groups = in_features // form.group_of(in_features)
        self.register_buffer("packed", torch.zeros(num_bytes, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(out_features, num_groups, dtype=SCALE_DTYPE))
        self.register_buffer("bias", torch.zeros(out_features) if has_bias else None)

    @classmethod
    def of(cls, layer: nn.Linear, form: GroupFormat, rounded: tuple[Tensor, Tensor] | None = None) -> "PackedLinear":
        """A linear layer, packed.

        Args:
            layer: the layer.
            form: of its weights.
            rounded: codes [O, C] and scales [O, G] chosen elsewhere; by default rounding to nearest.
        """
        made = cls(layer.in_features, layer.out_features, form, has_bias=layer.bias is not None)
        weight_OC = layer.weight.detach()
        if rounded is None:
            scale_OG = choose_scales(weight_OC, form)
            rounded = round_to_codes(weight_OC.float(), spread(scale_OG.float(), weight_OC.shape[1]), form), scale_OG
        codes_OC, scale_OG = rounded
        made.packed = pack(codes_OC.flatten().to(torch.uint8), form.bits)
        made.scale = scale_OG.to(SCALE_DTYPE)
        if layer.bias is not None:
            made.bias = layer.bias.detach().clone()
        return made

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [O, C], made from the codes."""
        num_codes = self.in_features * self.out_features
        codes_OGK = unpack(self.packed, self.form.bits, num_codes).view(*self.scale.shape, -1)
        levels_OGK = codes_OGK.to(dtype) - self.form.highest
        return (levels_OGK * self.scale.to(dtype)[..., None]).view(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return linear(inputs, self.weight(inputs.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.form.bits}"
