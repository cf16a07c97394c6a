"""The matrices of a mixture that can be quantised, each by the name it has in a checkpoint.

In memory transformers keeps the experts of a layer as two 3-D parameters; in a checkpoint each expert has matrices of
its own (`mlp.experts.3.up_proj`, in Mixtral `block_sparse_moe.experts.3.w3`). Plans, alpha tables and our checkpoints
speak of the latter. Which slice of a parameter has which name is not spelt out here: numbered markers are sent through
transformers' own conversion to checkpoint names, and read on the other side.

Shape letters: E experts, I inner size of an expert, H hidden size, O and C rows and columns of one matrix.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moe_ext.routers import MoeLayer, moe_layers

Kind = Literal["expert", "dense"]

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Matrix:
    """One matrix O x C that a plan gives a format.

    Args:
        name: of its module in a checkpoint, without `.weight`.
        layer: number of the decoder layer.
        kind: `expert`, or `dense` for what every token passes: attention, shared experts, dense MLPs.
        parameter: name of the parameter of the model that holds it.
        expert: number of the expert; None for a dense matrix.
        first_row: where it begins in the expert's rows of the parameter.
        num_rows, num_columns: its shape.
    """

    name: str
    layer: int
    kind: Kind
    parameter: str
    expert: int | None
    first_row: int
    num_rows: int
    num_columns: int

    @property
    def num_weights(self) -> int:
        return self.num_rows * self.num_columns

    @property
    def reads_hidden(self) -> bool:
        """Whether an expert's matrix reads the layer's input (gate and up), rather than the expert's inner state."""
        return self.parameter.endswith(GATE_UP)

    def weight(self, model: nn.Module) -> Tensor:
        """The matrix in the model [O, C]: a view, so that writing into it changes the model."""
        held = model.get_parameter(self.parameter).data
        if self.expert is None:
            return held
        return held[self.expert, self.first_row : self.first_row + self.num_rows]


def find_matrices(model: PreTrainedModel) -> list[Matrix]:
    """Every matrix of the decoder layers that can be quantised, in the order of the layers.

    Left out are the routers, embeddings, the head, and gates with a single output (Qwen2-MoE's shared expert has one).

    Raises:
        ValueError: not a mixture that `moe_ext.routers` knows, or experts of a layout that is not supported.
    """
    layers = moe_layers(model)
    for layer in layers:
        _check_layout(model, layer)
    found = [matrix for layer in layers for matrix in _expert_matrices(model, layer)] + _dense_matrices(model, layers)
    return sorted(found, key=lambda matrix: (matrix.layer, matrix.kind))


def _check_layout(model: PreTrainedModel, layer: MoeLayer) -> None:
    experts, own = layer.experts, {name for name, _ in layer.experts.named_parameters(recurse=False)}
    # What transformers notes on each class of experts; attributes of modules that are no such class are missing.
    usual = (
        own == {GATE_UP, DOWN}
        and getattr(experts, "has_gate", False)
        and getattr(experts, "is_concatenated", False)
        and not getattr(experts, "is_transposed", True)
        and not getattr(experts, "has_bias", True)
    )
    if not usual:
        raise ValueError(
            f"{layer.experts_name} of {type(model).__name__} ({type(experts).__name__}) holds "
            f"{', '.join(sorted(own))} in a layout that is not supported. Expected are gate_up_proj [E, 2I, H] and "
            "down_proj [E, H, I], without biases, as in OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE and DeepSeek V2/V3."
        )


def _expert_matrices(model: PreTrainedModel, layer: MoeLayer) -> list[Matrix]:
    num_experts, hidden_size, inner_size = layer.experts.down_proj.shape
    gate_up, down = f"{layer.experts_name}.{GATE_UP}", f"{layer.experts_name}.{DOWN}"
    of_gate_up = _names_of_markers(model, gate_up, torch.arange(2 * num_experts).view(num_experts, 2, 1))
    of_down = _names_of_markers(model, down, torch.arange(num_experts).view(num_experts, 1, 1))
    matrices = []
    for expert in range(num_experts):
        for half in range(2):
            matrices.append(
                Matrix(
                    name=of_gate_up[2 * expert + half],
                    layer=layer.index,
                    kind="expert",
                    parameter=gate_up,
                    expert=expert,
                    first_row=half * inner_size,
                    num_rows=inner_size,
                    num_columns=hidden_size,
                )
            )
        matrices.append(
            Matrix(
                name=of_down[expert],
                layer=layer.index,
                kind="expert",
                parameter=down,
                expert=expert,
                first_row=0,
                num_rows=hidden_size,
                num_columns=inner_size,
            )
        )
    return matrices


def _dense_matrices(model: PreTrainedModel, layers: list[MoeLayer]) -> list[Matrix]:
    decoder = layers[0].decoder_name
    routers = {layer.router_name for layer in layers}
    matrices = []
    for name, module in model.get_submodule(decoder).named_modules(prefix=decoder):
        if isinstance(module, nn.Linear) and name not in routers and module.out_features > 1:
            number = int(name.removeprefix(f"{decoder}.").split(".")[0])
            (checkpoint_name,) = _names_of_markers(model, f"{name}.weight", torch.zeros(1, 1)).values()
            matrices.append(
                Matrix(
                    name=checkpoint_name,
                    layer=number,
                    kind="dense",
                    parameter=f"{name}.weight",
                    expert=None,
                    first_row=0,
                    num_rows=module.out_features,
                    num_columns=module.in_features,
                )
            )
    return matrices


def _names_of_markers(model: PreTrainedModel, parameter: str, markers: Tensor) -> dict[int, str]:
    """The checkpoint's module names of the pieces of a parameter, by the marker that each piece was given."""
    pieces = revert_weight_conversion(model, {parameter: markers.float()})
    return {int(piece.item()): name.removesuffix(".weight") for name, piece in pieces.items()}
