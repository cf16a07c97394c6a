"""A mixture of LoRA experts as it is usually written: a Python loop over the experts of every layer.

    y = W0 x + sum_e w_e(x) * s * B_e A_e x        w = softmax of the gate, or of its top-k, per token

It is a competitor, and the oracle that routed layers are checked against, so it stays plainly right. The sparse form
gathers each expert's tokens and adds their updates back (`index_add`), as implementations in the manner of MixLoRA (Li
et al. 2024, arXiv:2404.15159) do.

Shape letters: T tokens (batch and length flattened), I inputs, O outputs, E experts, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLoop(nn.Module):
    """A linear layer and its experts, run one after another.

    Args:
        base_layer: the frozen layer.
        downs, ups: A_RI and B_OR of each expert.
        gate: weight of the gate, [E, I], in float32 also under autocast.
        scaling: alpha / rank.
        top_k: experts run for each token; None runs all of them.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        downs: list[nn.Parameter],
        ups: list[nn.Parameter],
        gate: nn.Parameter,
        *,
        scaling: float,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.downs, self.ups = nn.ParameterList(downs), nn.ParameterList(ups)
        self.gate = gate
        self.scaling = scaling
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` to `[..., O]`."""
        y = self.base_layer(x)
        x_TI = x.flatten(0, -2).to(self.downs[0].dtype)
        update_TO = self._dense(x_TI) if self.top_k is None else self._sparse(x_TI, self.top_k)
        return (y + update_TO.view(y.shape)).to(y.dtype)

    def _dense(self, x_TI: Tensor) -> Tensor:
        weight_TE = F.softmax(self._scores(x_TI), dim=-1).to(x_TI.dtype)
        return sum(self._expert(x_TI, expert) * weight_TE[:, expert, None] for expert in range(len(self.downs)))

    def _sparse(self, x_TI: Tensor, top_k: int) -> Tensor:
        score_TK, chosen_TK = self._scores(x_TI).topk(top_k, dim=-1)
        weight_TK = F.softmax(score_TK, dim=-1).to(x_TI.dtype)
        update_TO = None
        for expert in range(len(self.downs)):
            token_S, place_S = torch.where(chosen_TK == expert)
            mine_SO = self._expert(x_TI.index_select(0, token_S), expert) * weight_TK[token_S, place_S, None]
            if update_TO is None:
                update_TO = mine_SO.new_zeros(x_TI.shape[0], mine_SO.shape[-1])
            update_TO = update_TO.index_add(0, token_S, mine_SO.to(update_TO.dtype))
        return update_TO

    def _expert(self, x_TI: Tensor, expert: int) -> Tensor:
        return F.linear(F.linear(x_TI, self.downs[expert]), self.ups[expert]) * self.scaling

    def _scores(self, x_TI: Tensor) -> Tensor:
        with torch.autocast(x_TI.device.type, enabled=False):
            x_TI = x_TI.to(self.gate.dtype)
            root_mean_square_T1 = (x_TI.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
            return F.linear(x_TI, self.gate) / root_mean_square_T1


def with_expert_loops(routed, *, top_k: int | None) -> nn.Module:
    """The base model below a routed PEFT model, each LoRA layer replaced by a loop over the same parameters.

    Args:
        routed: a PeftModel of a `MoELoraConfig` with `router_scope="layer"`; it is taken apart.
        top_k: as the router has it.
    """
    gates = routed.base_model.moe_router.gates
    model = routed.get_base_model()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        experts = list(layer.active_adapters)
        parent, _, child = name.rpartition(".")
        loop = ExpertLoop(
            layer.base_layer,
            [layer.lora_A[expert].weight for expert in experts],
            [layer.lora_B[expert].weight for expert in experts],
            gates[name.replace(".", "/")].weight,
            scaling=layer.scaling[experts[0]],
            top_k=top_k,
        )
        setattr(model.get_submodule(parent), child, loop)
    return model
