"""Number formats of quantised weights: what they cost, how a weight is rounded, packed and unpacked.

Formats and packing are those of the compressed-tensors library, so that other programs read what is written here:

| name  | level of a weight | scale                               | bits a weight |
| ----- | ----------------- | ----------------------------------- | ------------- |
| BF16  | bfloat16          | none                                | 16            |
| MXFP8 | float8 e4m3       | a power of two for 32 weights       | 8.25          |
| MXFP4 | float4 e2m1       | a power of two for 32 weights       | 4.25          |
| INT4  | -8 ... 7          | a bfloat16 number for 128 weights   | 4.125         |
| INT3  | -4 ... 3          | a bfloat16 number for 128 weights   | 3.125         |
| INT2  | -2 ... 1          | a bfloat16 number for 128 weights   | 2.125         |

Microscaling formats: OCP MX specification 1.0. Of the ways to choose their scale, compressed-tensors 0.20 takes for
MXFP4 the one known as `even` (the largest weight is rounded to one mantissa bit) and for MXFP8 the one known as RCEIL
(the smallest power of two with which nothing is clipped; only a largest weight of exactly 448 * 2^k gets twice that).
A matrix whose columns are no multiple of 128 has groups of the largest power of two that divides them, 32 at least,
and its bits a weight are counted so.

Shape letters: O rows, C columns, G groups in a row.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
LARGEST_GROUP, SMALLEST_GROUP = 128, 32


@dataclass(frozen=True)
class Format:
    """A number format.

    Args:
        name: as plans write it.
        preset: name of compressed-tensors' scheme; None where the weight is left as it is.
        compressor: name of compressed-tensors' packing.
        level_bits: bits of one level, its share of the scale not counted.
        scale_bits: bits of one scale.
        group_size: weights that share a scale; None where it depends on the columns.
    """

    name: str
    preset: str | None
    compressor: str | None
    level_bits: int
    scale_bits: int = 0
    group_size: int | None = None


FORMATS = {
    number_format.name: number_format
    for number_format in (
        Format("BF16", None, None, 16),
        Format("MXFP8", "MXFP8A16", "mxfp8-quantized", 8, scale_bits=8, group_size=32),
        Format("MXFP4", "MXFP4A16", "mxfp4-pack-quantized", 4, scale_bits=8, group_size=32),
        Format("INT4", "W4A16", "pack-quantized", 4, scale_bits=16),
        Format("INT3", "W3A16", "pack-quantized", 3, scale_bits=16),
        Format("INT2", "W2A16", "pack-quantized", 2, scale_bits=16),
    )
}


def check_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"Unknown format '{name}'. Give one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def group_size(name: str, num_columns: int) -> int:
    """Weights of a row that share a scale.

    Raises:
        ValueError: the columns cannot be cut into groups of at least 32.
    """
    fixed = check_format(name).group_size
    size = fixed or math.gcd(num_columns, LARGEST_GROUP)
    if num_columns % size or size < SMALLEST_GROUP:
        raise ValueError(
            f"{name} shares a scale among at least {SMALLEST_GROUP} weights of a row, but {num_columns} columns are "
            f"no multiple of {SMALLEST_GROUP}. Leave such a matrix in BF16."
        )
    return size


def bits_per_weight(name: str, num_columns: int) -> float:
    """What a weight of a matrix costs in a format, its share of the scales included."""
    number_format = check_format(name)
    if number_format.preset is None:
        return number_format.level_bits
    return number_format.level_bits + number_format.scale_bits / group_size(name, num_columns)


def scales_of(weight_OC: Tensor, name: str) -> Tensor:
    """The scale of each group [O, G] in bfloat16, from the largest weight of the group as compressed-tensors does.

    Args:
        weight_OC: the weights before anything is rounded; a format with scales.
        name: of the format.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    args = _scheme(name, weight_OC.shape[1]).weights
    groups_OGN = weight_OC.float().unflatten(1, (-1, args.group_size))
    scale_OG, _ = calculate_qparams(groups_OGN.amin(-1), groups_OGN.amax(-1), args)
    return scale_OG.to(SCALE_DTYPE)


def round_to_levels(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """The nearest number that the format can hold with these scales; same dtype as `weight`.

    Args:
        weight: any shape.
        scale: broadcast against it.
        name: of the format.
    """
    from compressed_tensors.quantization.quant_args import round_to_quantized_type_args
    from compressed_tensors.quantization.utils import calculate_range

    args = _scheme(name, LARGEST_GROUP).weights
    lowest, highest = calculate_range(args, weight.device)
    scale = scale.to(weight.dtype)
    levels = round_to_quantized_type_args(weight / scale, args, lowest, highest)
    # What is stored is the level; what a reader makes of it is the product in bfloat16.
    return (levels * scale).to(SCALE_DTYPE).to(weight.dtype)


def spread(scale_OG: Tensor, num_columns: int) -> Tensor:
    """The scale of each weight [O, C] from that of each group."""
    return scale_OG.repeat_interleave(num_columns // scale_OG.shape[1], dim=1)


def round_to_nearest(weight_OC: Tensor, name: str) -> Tensor:
    """Every weight rounded for itself, in the dtype of `weight_OC`."""
    if check_format(name).preset is None:
        return weight_OC.to(SCALE_DTYPE).to(weight_OC.dtype)
    return round_to_levels(weight_OC, spread(scales_of(weight_OC, name), weight_OC.shape[1]), name)


def pack(rounded_OC: Tensor, scale_OG: Tensor, name: str) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds of a rounded matrix, by their last name (`weight_packed`, ...)."""
    compressed = _compressor(name).compress(
        {"weight": rounded_OC.float(), "weight_scale": scale_OG.float()}, _scheme(name, rounded_OC.shape[1])
    )
    if compressed["weight_scale"].is_floating_point():
        compressed["weight_scale"] = compressed["weight_scale"].to(SCALE_DTYPE)
    return {part: tensor.contiguous() for part, tensor in compressed.items()}


def unpack(tensors: dict[str, Tensor], name: str, num_columns: int) -> Tensor:
    """The matrix [O, C] in bfloat16 from the tensors that `pack` made."""
    return _compressor(name).decompress(tensors, _scheme(name, num_columns))["weight"].to(SCALE_DTYPE)


def scheme_json(name: str, num_columns: int, targets: list[str]) -> dict[str, Any]:
    """The scheme as a checkpoint's config.json holds it, for these modules."""
    scheme = _scheme(name, num_columns).model_copy(update={"targets": targets})
    return scheme.model_dump(mode="json")


@cache
def _scheme(name: str, num_columns: int):
    try:
        from compressed_tensors.quantization import preset_name_to_scheme
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "Quantised number formats come from the package compressed-tensors, which is not installed. Install it "
            "with: pip install '.[quant]'"
        ) from missing
    scheme = preset_name_to_scheme(check_format(name).preset, ["Linear"])
    scheme.weights.group_size = group_size(name, num_columns)
    scheme.format = check_format(name).compressor
    return scheme


def _compressor(name: str):
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(check_format(name).compressor)
