"""Quantise the matrices of a mixture to the formats of a plan, layer by layer and expert by expert.

In each layer the dense matrices come first, then the experts, each with a Hessian of the tokens that were routed to
it. Inputs are those of the model as it is quantised so far: a layer sees the outputs of the quantised layers before
it, and an expert's down_proj sees what its quantised gate_proj and up_proj make of their inputs.

An expert that sees fewer tokens than its matrix has columns is rounded to nearest instead: its Hessian is singular,
and GPTQ then fits the few tokens at the cost of all others.

Shape letters: N blocks, L tokens in a block, T tokens, K chosen experts a token, O, C rows and columns of a matrix.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_ext.gptq import BLOCK_SIZE, DAMP, hessian_of
from moe_ext.router_ft.calibration import LayerWalk, recording
from moe_ext.router_ft.formats import SCALE_DTYPE, check_format, pack, round_to_levels, scales_of, spread, unpack
from moe_ext.router_ft.gptq import gptq
from moe_ext.router_ft.matrices import Kind, Matrix, find_matrices
from moe_ext.router_ft.plan import Plan
from moe_ext.routers import MoeLayer, moe_layers

logger = logging.getLogger(__name__)

Method = Literal["gptq", "round"]


@dataclass(frozen=True)
class MatrixReport:
    """What became of one matrix.

    Args:
        name, kind, format: which matrix, in which format.
        method: `gptq`, `round`, or `none` for BF16.
        tokens: calibration tokens that reached it; None without calibration.
        output_error: |(W - Q) X|^2 / |W X|^2 on them; None where no token reached it.
    """

    name: str
    kind: Kind
    format: str
    method: str
    tokens: int | None
    output_error: float | None


@dataclass(frozen=True)
class Quantized:
    """What `quantize_model` has to say beside the model that it changed.

    Args:
        packed: the tensors of each matrix as a checkpoint holds them, by matrix name and last name.
        reports: one for each matrix.
    """

    packed: dict[str, dict[str, Tensor]]
    reports: list[MatrixReport]

    def tokens_per_expert(self) -> dict[str, int]:
        """Calibration tokens of each expert, by the name of its matrices without their last part."""
        return {
            report.name.rpartition(".")[0]: report.tokens
            for report in self.reports
            if report.kind == "expert" and report.tokens is not None
        }

    def to_dict(self) -> dict:
        return {"tokens_per_expert": self.tokens_per_expert(), "matrices": [asdict(report) for report in self.reports]}


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    plan: Plan,
    blocks_NL: Tensor | None = None,
    *,
    method: Method = "gptq",
    block_size: int = BLOCK_SIZE,
    damp: float = DAMP,
    batch_size: int = 8,
) -> Quantized:
    """Round the model's matrices in place to what a checkpoint of the plan's formats can hold.

    Args:
        model: a mixture; it is put into eval mode.
        plan: a format for each of its matrices.
        blocks_NL: calibration blocks; not needed to round.
        method: `gptq`, or `round` for rounding every weight for itself.
        block_size, damp: see `gptq`.
        batch_size: blocks at once.

    Raises:
        ValueError: the plan is for another model, or there are no blocks for GPTQ.
    """
    matrices = find_matrices(model)
    plan.check_model(matrices)
    if method == "gptq" and (blocks_NL is None or len(blocks_NL) == 0):
        raise ValueError("GPTQ needs calibration text, and there is none. Give blocks, or take the method 'round'.")
    model.eval()
    work = _Work(model, plan, block_size, damp)
    if method == "round":
        for matrix in matrices:
            work.round(matrix, tokens=None)
        return Quantized(work.packed, work.reports)
    mixtures = moe_layers(model)
    moe_of_layer = {layer.index: layer for layer in mixtures}
    decoder = model.get_submodule(mixtures[0].decoder_name)
    walk = LayerWalk(model, decoder, blocks_NL, batch_size=batch_size)
    by_layer = defaultdict(list)
    for matrix in matrices:
        by_layer[matrix.layer].append(matrix)
    for number, layer in enumerate(tqdm(decoder, desc="quantising layers", unit="layer")):
        _quantize_dense(work, walk, layer, [matrix for matrix in by_layer[number] if matrix.kind == "dense"])
        if number in moe_of_layer:
            experts = [matrix for matrix in by_layer[number] if matrix.kind == "expert"]
            _quantize_experts(work, walk, layer, moe_of_layer[number], experts)
        if number + 1 < len(decoder):
            walk.advance(layer)
    _warn_of_short_experts(work.reports)
    return Quantized(work.packed, work.reports)


class _Work:
    """Rounds single matrices, writes them into the model and keeps what is packed and reported."""

    def __init__(self, model: PreTrainedModel, plan: Plan, block_size: int, damp: float):
        self.model, self.plan, self.block_size, self.damp = model, plan, block_size, damp
        self.packed: dict[str, dict[str, Tensor]] = {}
        self.reports: list[MatrixReport] = []

    def leaves_as_is(self, matrix: Matrix) -> bool:
        return check_format(self.plan.formats[matrix.name]).preset is None

    def round(self, matrix: Matrix, *, tokens: int | None, hessian_CC: Tensor | None = None) -> None:
        """Each weight for itself."""
        if self.leaves_as_is(matrix):
            weight_OC = matrix.weight(self.model)
            weight_OC.copy_(weight_OC.to(SCALE_DTYPE))
            self.packed[matrix.name] = {"weight": weight_OC.to(SCALE_DTYPE).contiguous()}
            self.reports.append(MatrixReport(matrix.name, matrix.kind, "BF16", "none", tokens, None))
            return
        name, weight_OC = self.plan.formats[matrix.name], matrix.weight(self.model).float()
        scale_OG = scales_of(weight_OC, name)
        rounded_OC = round_to_levels(weight_OC, spread(scale_OG, weight_OC.shape[1]), name)
        self._keep(matrix, rounded_OC, scale_OG, "round", tokens, hessian_CC)

    def gptq(self, matrix: Matrix, inputs_TC: Tensor, hessian_CC: Tensor | None) -> None:
        """By the inputs that reached the matrix; see the head of this file for few of them."""
        tokens = len(inputs_TC)
        if self.leaves_as_is(matrix) or tokens < matrix.num_columns:
            self.round(matrix, tokens=tokens, hessian_CC=hessian_CC)
            return
        name, weight_OC = self.plan.formats[matrix.name], matrix.weight(self.model).float()
        scale_OG = scales_of(weight_OC, name)
        rounded_OC = gptq(weight_OC, hessian_CC, scale_OG, name, block_size=self.block_size, damp=self.damp)
        self._keep(matrix, rounded_OC, scale_OG, "gptq", tokens, hessian_CC)

    def _keep(self, matrix, rounded_OC, scale_OG, method, tokens, hessian_CC) -> None:
        name, weight_OC = self.plan.formats[matrix.name], matrix.weight(self.model)
        error = None
        if hessian_CC is not None:
            before_OC = weight_OC.double()
            lost = _quadratic(before_OC - rounded_OC.double(), hessian_CC)
            error = lost / max(_quadratic(before_OC, hessian_CC), 1e-300)
        packed = pack(rounded_OC, scale_OG, name)
        # From the packed tensors, not from rounded_OC: what runs now is what a reader of the checkpoint will run.
        weight_OC.copy_(unpack(packed, name, matrix.num_columns))
        self.packed[matrix.name] = packed
        self.reports.append(MatrixReport(matrix.name, matrix.kind, name, method, tokens, error))


def _quantize_dense(work: _Work, walk: LayerWalk, layer, matrices: Sequence[Matrix]) -> None:
    planned = [matrix for matrix in matrices if not work.leaves_as_is(matrix)]
    for matrix in matrices:
        if matrix not in planned:
            work.round(matrix, tokens=None)
    if not planned:
        return
    seen: dict[str, list[Tensor]] = defaultdict(list)
    modules = {matrix.parameter: work.model.get_submodule(matrix.parameter.rpartition(".")[0]) for matrix in planned}
    with recording(modules, lambda name, inputs: seen[name].append(inputs[0].flatten(0, -2))):
        walk.run(layer)
    for matrix in planned:
        inputs_TC = torch.cat(seen.pop(matrix.parameter))
        work.gptq(matrix, inputs_TC, hessian_of(inputs_TC))


def _quantize_experts(work: _Work, walk: LayerWalk, layer, moe: MoeLayer, matrices: Sequence[Matrix]) -> None:
    hidden, chosen = [], []

    def note(_, inputs):
        hidden.append(inputs[0].flatten(0, -2))
        chosen.append(inputs[1].flatten(0, -2))

    with recording({"experts": moe.experts}, note):
        walk.run(layer)
    hidden_TH, chosen_TK = torch.cat(hidden), torch.cat(chosen)
    for expert in range(moe.num_experts):
        inputs_TH = hidden_TH[(chosen_TK == expert).any(dim=1)]
        own = [matrix for matrix in matrices if matrix.expert == expert]
        _gptq_together(work, [matrix for matrix in own if matrix.reads_hidden], inputs_TH)
        # transformers' own step between the two products, so that any activation is the right one.
        inner_TI = moe.experts._apply_gate(linear(inputs_TH, moe.experts.gate_up_proj[expert]))
        _gptq_together(work, [matrix for matrix in own if not matrix.reads_hidden], inner_TI)


def _gptq_together(work: _Work, matrices: Sequence[Matrix], inputs_TC: Tensor) -> None:
    """Matrices that read the same inputs share a Hessian."""
    hessian_CC = hessian_of(inputs_TC) if len(inputs_TC) else None
    for matrix in matrices:
        work.gptq(matrix, inputs_TC, hessian_CC)


def _warn_of_short_experts(reports: Sequence[MatrixReport]) -> None:
    short = [report for report in reports if report.method == "round"]
    if short:
        fewest = min(report.tokens for report in short)
        logger.warning(
            "%d of %d matrices saw fewer tokens than they have columns (the fewest: %d) and were rounded to nearest; "
            "more calibration text would let GPTQ have them",
            len(short),
            len(reports),
            fewest,
        )


def _quadratic(weight_OC: Tensor, hessian_CC: Tensor) -> float:
    return float(((weight_OC @ hessian_CC) * weight_OC).sum())
