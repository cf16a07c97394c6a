"""What `run` and the search of its settings measure of one model, each measurement kept in a file of its own.

A plan is a uniform format (`INT3`) or an allocation (`lower_alpha@3.125`: that sensitivity, that many bits a weight).
A measurement that the folder of the run already holds is not made again.
"""

import copy
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from moe_common.models.base_model import default_device
from moe_common.runs.options import check_at_least
from moe_common.runs.run_folder import Measured, RunFolder
from moe_common.text.documents import Part
from moe_common.text.reading import read_blocks
from moe_ext.moe_models import MODEL_HELP, SMALL_MOE, context_of, load_moe
from moe_ext.router_ft.allocation import allocate
from moe_ext.router_ft.alpha import alpha_table
from moe_ext.router_ft.calibration import CalibrationConfig, block_length, text_blocks
from moe_ext.router_ft.evaluate import losses_by_source, mean_loss
from moe_ext.router_ft.finetune import FinetuneConfig, finetune_routers
from moe_ext.router_ft.formats import FORMATS
from moe_ext.router_ft.matrices import Matrix, find_matrices
from moe_ext.router_ft.plan import Plan, uniform_plan
from moe_ext.router_ft.quantize import quantize_model
from moe_ext.router_ft.recovery import measure_recovery

logger = logging.getLogger(__name__)

ALLOCATED_FORMATS = ("MXFP8", "MXFP4", "INT4", "INT3", "INT2")


@dataclass(kw_only=True)
class StudyOptions(CalibrationConfig, FinetuneConfig):
    model: str = field(default=SMALL_MOE, metadata={"help": MODEL_HELP})
    output: str = field(default="runs/router_ft", metadata={"help": "Folder of the results and the table."})
    split: Part = field(default="test", metadata={"help": "Split of the held-out text."})
    max_blocks: int = field(default=64, metadata={"help": "Held-out blocks of each source."})
    device: str = field(default_factory=default_device, metadata={"help": "Device to compute on."})

    def __post_init__(self):
        CalibrationConfig.__post_init__(self)
        FinetuneConfig.__post_init__(self)
        check_at_least(self, max_blocks=1)


def parse_plan(spec: str) -> tuple[str, float | None, int]:
    """Format, None and 0 of a uniform plan; sensitivity, bits and seed of an allocation (`random@3.125#1`).

    Raises:
        ValueError: it is neither.
    """
    if spec in FORMATS:
        return spec, None, 0
    sensitivity, at, rest = spec.partition("@")
    bits, _, seed = rest.partition("#")
    try:
        return sensitivity, float(bits), int(seed or 0)
    except ValueError as wrong:
        raise ValueError(
            f"'{spec}' is no plan. Give a format ({', '.join(FORMATS)}), or a sensitivity and the bits a weight may "
            "cost, such as lower_alpha@3.125."
        ) from wrong


def prepare(options: StudyOptions, folder: RunFolder) -> "Study":
    """Read the model and the text of a study, whose measurements its folder keeps."""
    model, tokenizer = load_moe(options.model)
    length = block_length(options, context_of(model))
    blocks_NL = text_blocks(
        options.sources, "train", tokenizer, num_blocks=options.nsamples, block_size=length, seed=options.seed
    )
    held_out = {
        source: read_blocks(source, options.split, tokenizer, block_size=length, max_blocks=options.max_blocks)
        for source in options.sources
    }
    folder.know(weights=zlib.crc32(next(iter(model.parameters())).detach().float().numpy().tobytes()))
    return Study(options, model.to(options.device), blocks_NL, held_out, folder.measured)


class Study:
    """The measurements, each made once.

    Args:
        options: of the run.
        model: in full precision; it is copied for every change.
        blocks_NL: calibration text.
        held_out: blocks by source that the table is measured on.
        measured: keeps what is found under a name.
    """

    def __init__(
        self,
        options: StudyOptions,
        model: PreTrainedModel,
        blocks_NL: Tensor,
        held_out: dict[str, Dataset],
        measured: Measured,
    ):
        self.options, self.model, self.blocks_NL, self.held_out = options, model, blocks_NL, held_out
        self.measured = measured
        self.matrices: list[Matrix] = find_matrices(model)
        self._last: tuple[Plan, PreTrainedModel] | None = None

    @cached_property
    def alphas(self) -> dict[str, float]:
        return {row.layer_name: row.alpha_hill for row in alpha_table(self.model, self.matrices)}

    @property
    def full(self) -> dict[str, np.ndarray]:
        return self.measure("full", lambda: self.model)

    @property
    def control(self) -> dict[str, np.ndarray]:
        # Next-token training whatever the objective: against its own outputs the full model has nothing to learn.
        return self.measure("control", lambda: self.finetuned(self.model, objective="ce"))

    def plan(self, spec: str) -> Plan:
        sensitivity, bits, seed = parse_plan(spec)
        if bits is None:
            return uniform_plan(self.matrices, sensitivity)
        return allocate(
            self.model,
            self.matrices,
            self.alphas,
            budget_bits=bits,
            formats=ALLOCATED_FORMATS,
            sensitivity=sensitivity,
            seed=seed,
        )

    def quantized(self, plan: Plan, method: str) -> PreTrainedModel:
        model = copy.deepcopy(self.model)
        quantize_model(model, plan, self.blocks_NL, method=method)
        return model

    def by_gptq(self, plan: Plan) -> PreTrainedModel:
        """Quantised by GPTQ; the last one is kept, because several measurements want it."""
        if self._last is None or self._last[0] != plan:
            self._last = plan, self.quantized(plan, "gptq")
        return self._last[1]

    def finetuned(self, model: PreTrainedModel, **changed: Any) -> PreTrainedModel:
        """A copy of a model with finetuned routers, by the options but for those that are changed."""
        model = copy.deepcopy(model)
        config = FinetuneConfig(
            **{name: getattr(self.options, name) for name in FinetuneConfig.__dataclass_fields__} | changed
        )
        report = finetune_routers(model, self.blocks_NL, config, teacher=self.model, seed=self.options.seed)
        logger.info("%s on text not trained on: %.5f -> %.5f", config.objective, report.loss_before, report.loss_after)
        return model

    def measure(self, name: str, make: Callable[[], PreTrainedModel]) -> dict[str, np.ndarray]:
        """The losses of a model by source, as they were kept or from the model itself."""

        def found() -> dict[str, list[float]]:
            logger.info("measuring %s", name)
            return {source: list(values) for source, values in losses_by_source(make(), self.held_out).items()}

        return {source: np.asarray(values) for source, values in self.measured(name, found).items()}

    def row(self, spec: str) -> dict[str, Any]:
        """One line of the table."""
        plan = self.plan(spec)
        rounded = self.measure(f"{spec}.round", lambda: self.quantized(plan, "round"))
        gptq = self.measure(f"{spec}.gptq", lambda: self.by_gptq(plan))
        finetuned = self.measure(f"{spec}.{self.options.objective}", lambda: self.finetuned(self.by_gptq(plan)))
        recovery = measure_recovery(self.full, gptq, finetuned, self.control)
        return {
            "plan": spec,
            "bits": plan.bits_per_weight,
            "rounded": mean_loss(rounded),
            "gptq": mean_loss(gptq),
            "finetuned": mean_loss(finetuned),
            "recovery": recovery,
        }

    def allocation_row(self, spec: str) -> dict[str, Any]:
        """A plan's bits and the loss of the quantised model."""
        plan = self.plan(spec)
        losses = self.measure(f"{spec}.gptq", lambda: self.by_gptq(plan))
        return {"plan": spec, "bits": plan.bits_per_weight, "gptq": mean_loss(losses)}
