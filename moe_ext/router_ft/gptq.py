"""GPTQ (`moe_ext.gptq`) in the number formats of this tool.

Shape letters: O rows, C columns, G groups in a row.
"""

from torch import Tensor

from moe_ext.gptq import BLOCK_SIZE, DAMP
from moe_ext.gptq import gptq as solve
from moe_ext.router_ft.formats import round_to_levels, spread


def gptq(
    weight_OC: Tensor,
    hessian_CC: Tensor,
    scale_OG: Tensor,
    name: str,
    *,
    block_size: int = BLOCK_SIZE,
    damp: float = DAMP,
) -> Tensor:
    """The matrix [O, C] rounded to a format so that its outputs on the calibration inputs change little.

    Args:
        weight_OC, hessian_CC, block_size, damp: as `moe_ext.gptq.gptq` takes them.
        scale_OG: of `formats.scales_of` the same matrix.
        name: of the format.
    """
    scale_OC = spread(scale_OG, weight_OC.shape[1])

    def round_column(values_O: Tensor, column: int) -> Tensor:
        return round_to_levels(values_O, scale_OC[:, column], name)

    return solve(weight_OC, hessian_CC, round_column, block_size=block_size, damp=damp)
