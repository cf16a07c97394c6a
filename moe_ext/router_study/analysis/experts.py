"""The experts behind a gate, whatever they are made of: matrices of a mixture, or LoRA adapters.

Shape letters: E experts, H hidden size, N rows that read the hidden state, I inner size, R rank, T tokens.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moe_ext.router_study.gates.base import Gates
from moe_ext.router_study.gates.fused import FusedGates
from moe_ext.router_study.gates.lora import LoraGates


class Experts(ABC):
    """The experts of one gate."""

    @abstractmethod
    def matrices(self) -> dict[str, list[Tensor]]:
        """Every weight matrix of each expert, by name; float32 on the CPU."""

    @abstractmethod
    def readers(self) -> list[Tensor]:
        """The matrix [N, H] of each expert that multiplies the hidden state."""

    @abstractmethod
    def similarity(self) -> Tensor:
        """Cosine of the experts' weights, [E, E]."""

    @abstractmethod
    def output_norms(self, hidden_TH: Tensor) -> Tensor:
        """Length of what each expert would add to each token, chosen or not, [T, E]."""


class FusedExperts(Experts):
    """Experts of a transformers layer: 3-D parameters of one module, which is called with indices and weights."""

    def __init__(self, module: nn.Module, num_experts: int, hidden_size: int) -> None:
        self.module, self.num_experts, self.hidden_size = module, num_experts, hidden_size
        self.parameters = {
            name: parameter.detach()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        }

    def matrices(self) -> dict[str, list[Tensor]]:
        return {name: list(stacked.float().cpu()) for name, stacked in self.parameters.items()}

    def readers(self) -> list[Tensor]:
        first = next(iter(self.parameters.values())).float().cpu()  # gate_up_proj, [E, 2I, H]; [E, H, 2I] in some
        return list(first if first.shape[2] == self.hidden_size else first.transpose(1, 2))

    def similarity(self) -> Tensor:
        flat = torch.cat([stacked.float().cpu().flatten(1) for stacked in self.parameters.values()], dim=1)
        unit = torch.nn.functional.normalize(flat, dim=1)
        return (unit @ unit.T).double()

    @torch.no_grad()
    def output_norms(self, hidden_TH: Tensor) -> Tensor:
        weights_T1 = hidden_TH.new_ones(len(hidden_TH), 1)
        norms = []
        for expert in range(self.num_experts):
            index_T1 = torch.full((len(hidden_TH), 1), expert, device=hidden_TH.device)
            norms.append(self.module(hidden_TH, index_T1, weights_T1).float().norm(dim=-1))
        return torch.stack(norms, dim=-1).cpu()


class LoraExperts(Experts):
    """Experts of a site of a routed LoRA mixture: the adapters of the layers that it decides for."""

    def __init__(self, layers: list[nn.Module], names: list[str], width: int, *, gate_sees_input: bool) -> None:
        self.layers = [layer for layer in layers if all(name in layer.lora_A for name in names)]
        self.names, self.width, self.gate_sees_input = names, width, gate_sees_input
        if not self.layers:
            raise ValueError(
                "No linear layer holds all experts of this gate, so they cannot be compared. Give a mixture whose "
                "experts adapt the same linear layers."
            )

    def matrices(self) -> dict[str, list[Tensor]]:
        held = {}
        for number, layer in enumerate(self.layers):
            held[f"{number}.A"] = [layer.lora_A[name].weight.detach().float().cpu() for name in self.names]
            held[f"{number}.B"] = [layer.lora_B[name].weight.detach().float().cpu() for name in self.names]
        return held

    def readers(self) -> list[Tensor]:
        reading = [layer for layer in self.layers if layer.in_features == self.width]
        if not reading:
            raise ValueError(f"No layer behind this gate reads hidden states of its width, {self.width}.")
        return [
            torch.cat([layer.lora_A[name].weight.detach().float().cpu() for layer in reading]) for name in self.names
        ]

    def similarity(self) -> Tensor:
        product_EE = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)
        for layer in self.layers:
            A = [layer.lora_A[name].weight.detach().double().cpu() for name in self.names]
            B = [layer.lora_B[name].weight.detach().double().cpu() * layer.scaling[name] for name in self.names]
            # <B1 A1, B2 A2> without the products: trace of (B2^T B1) (A1 A2^T), R x R matrices.
            for i in range(len(A)):
                for j in range(len(A)):
                    product_EE[i, j] += ((B[j].T @ B[i]).T * (A[i] @ A[j].T)).sum()
        length_E = product_EE.diagonal().clamp_min(0).sqrt()
        return product_EE / (length_E[:, None] * length_E[None]).clamp_min(1e-30)

    @torch.no_grad()
    def output_norms(self, hidden_TH: Tensor) -> Tensor:
        if not self.gate_sees_input:
            raise ValueError(
                "This gate looks at another hidden state than its experts read (router_scope is not layer)."
            )
        (layer,) = self.layers
        norms = []
        for name in self.names:
            down = layer.lora_A[name](hidden_TH.to(layer.lora_A[name].weight.dtype))
            norms.append((layer.lora_B[name](down) * layer.scaling[name]).float().norm(dim=-1))
        return torch.stack(norms, dim=-1).cpu()


def experts_of(gates: Gates, place: int) -> Experts:
    """The experts behind a gate.

    Raises:
        ValueError: they do not adapt the same linear layers.
    """
    if isinstance(gates, FusedGates):
        layer = gates.layers[place]
        return FusedExperts(layer.experts, gates.num_experts, layer.router.weight.shape[1])
    assert isinstance(gates, LoraGates)
    layers, width = gates.layers_of(place), gates.weights()[place].shape[1]
    sees_input = gates.router.config.scope == "layer"
    return LoraExperts(layers, gates.router.expert_names, width, gate_sees_input=sees_input)
