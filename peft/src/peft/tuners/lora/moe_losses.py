# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What a routed forward measures at each gate, and the losses made of it.

Each gate adds up one vector over the real tokens of a batch (padding left out):

    [tokens, sum of logsumexp^2, sum of entropy, sums of probabilities (E), of assignments (E), of weights (E)]

Sums, not means: they pass unchanged through gradient checkpointing as an output of the checkpointed block, so that
recomputation neither counts a token twice nor loses the gradient.

Shape letters: T tokens, E experts.
"""

from __future__ import annotations

import functools
from dataclasses import fields, is_dataclass, make_dataclass
from typing import Any, Optional

import torch
from transformers.utils import ModelOutput

from .moe_selection import Routing, at_least_float32


def gate_statistics(logits: torch.Tensor, routing: Routing, token_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The vector of sums described above, [3 + 3 E], differentiable in the logits.

    Args:
        logits: [*T, E], the gate's scores.
        token_mask: bool, True for real tokens, with as many elements as there are tokens; None counts every token.
    """
    num_experts = logits.shape[-1]
    logits_TE = at_least_float32(logits).reshape(-1, num_experts)
    probabilities_TE = routing.probabilities.reshape(-1, num_experts)
    entropy_T = torch.special.entr(probabilities_TE).sum(dim=-1)
    columns = [
        torch.ones_like(entropy_T)[:, None],
        torch.logsumexp(logits_TE, dim=-1)[:, None].square(),
        entropy_T[:, None],
        probabilities_TE,
        routing.assignment.reshape(-1, num_experts),
        routing.weights.detach().reshape(-1, num_experts),
    ]
    measured = torch.cat(columns, dim=-1)
    if token_mask is not None:
        # where, not a product: what a model computes for padding may be infinite
        measured = torch.where(token_mask.reshape(-1, 1), measured, torch.zeros_like(measured))
    return measured.sum(dim=0)


def router_losses(statistics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The router's losses, each the mean over the gates.

    - balance: E * sum_e f_e P_e, with f_e the share of assignments and P_e the mean probability of expert e; 1 when
      the load is even (Fedus et al. 2021, eq. 4, https://huggingface.co/papers/2101.03961).
    - z: mean of logsumexp(logits)^2 (Zoph et al. 2022, eq. 5, https://huggingface.co/papers/2202.08906).
    - entropy: mean entropy of a token's probabilities, in nats.

    Args:
        statistics: for each gate the vector of [`gate_statistics`].
    """
    device = next(iter(statistics.values())).device
    means = []
    for vector in statistics.values():
        vector = vector.to(device)
        per_token = vector[1:] / vector[0].clamp(min=1.0)
        probability_E, assignment_E, _ = per_token[2:].chunk(3)
        balance = len(probability_E) * (probability_E * assignment_E).sum()
        means.append(torch.stack([balance, per_token[0], per_token[1]]))
    balance, z, entropy = torch.stack(means).mean(dim=0)
    return {"router_balance_loss": balance, "router_z_loss": z, "router_entropy": entropy}


def report_losses(output: ModelOutput, losses: dict[str, torch.Tensor]) -> ModelOutput:
    """The output of a model with the router's losses beside what it holds.

    It is of a class that knows them as fields: DistributedDataParallel takes outputs apart and builds them anew from
    their class when it looks for unused parameters, and a key that is no field would be refused there.
    """
    if torch.compiler.is_compiling() or not is_dataclass(output):
        for name, loss in losses.items():
            output[name] = loss
        return output
    known = {field.name for field in fields(output)}
    reported = _class_with_losses(type(output), tuple(losses))(
        **{name: value for name, value in output.items() if name in known}, **losses
    )
    for name in output.keys() - known:
        reported[name] = output[name]
    return reported


@functools.cache
def _class_with_losses(output_class: type[ModelOutput], names: tuple[str, ...]) -> type[ModelOutput]:
    if set(names) <= {field.name for field in fields(output_class)}:
        return output_class
    return make_dataclass(
        f"Routed{output_class.__name__}",
        [(name, Optional[torch.Tensor], None) for name in names],
        bases=(output_class,),
        namespace={"__module__": output_class.__module__, "__doc__": output_class.__doc__},
    )


class CarryLoss(torch.autograd.Function):
    """The identity on per-token log-probabilities; its backward also sends a gradient into a loss.

    TRL's trainers make their loss from `outputs.log_probs` and never read `outputs.loss`. The router's loss then
    weighs as much as all labels together pull on their log-probabilities: one where their loss is the mean over the
    labels, this call's share where it is the mean over an accumulated batch.
    """

    @staticmethod
    def forward(
        ctx: Any, log_probs: torch.Tensor, label_mask: Optional[torch.Tensor], loss: torch.Tensor
    ) -> torch.Tensor:
        ctx.label_mask, ctx.loss_dtype = label_mask, loss.dtype
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        pull = gradient.abs() if ctx.label_mask is None else gradient.abs() * ctx.label_mask
        return gradient, None, pull.sum().to(ctx.loss_dtype)


def mean_weights(vector: torch.Tensor) -> torch.Tensor:
    """The mean weight that a gate gave each expert, [E], from its vector of [`gate_statistics`]."""
    return vector[3:].chunk(3)[2] / vector[0].clamp(min=1.0)


def summarize(statistics: dict[str, torch.Tensor], expert_names: list[str]) -> dict[str, dict]:
    """Usage, entropy and balance of each gate as plain numbers, keyed by the gate's name.

    `usage` is each expert's share of the assignments and `probability` its mean probability, both summing to one;
    `entropy` is in nats, at most log(num_experts); `balance` is 1 for an even load and num_experts when one expert
    takes it all.
    """
    summary = {}
    for name, vector in statistics.items():
        tokens, _, entropy, *per_expert = vector.tolist()
        probabilities, assignments = per_expert[: len(expert_names)], per_expert[len(expert_names) :]  # then weights
        count = max(tokens, 1.0)
        usage = {expert: total / count for expert, total in zip(expert_names, assignments)}
        probability = {expert: total / count for expert, total in zip(expert_names, probabilities)}
        balance = len(expert_names) * sum(usage[expert] * probability[expert] for expert in expert_names)
        summary[name] = {
            "tokens": int(tokens),
            "usage": usage,
            "probability": probability,
            "entropy": entropy / count,
            "balance": balance,
        }
    return summary
