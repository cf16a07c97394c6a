"""What a router, fixed weights or a single expert cost on a text, from the experts' states.

Shape letters: B rows, L tokens, T tokens that are predicted, D size of a state, E experts, V vocabulary.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moe_common.models.perplexity import token_losses
from moe_common.text.packing import IGNORED_LABEL
from moe_ext.moqe.mixture.expert_set import ExpertSet

STATIC_LEARNING_RATE = 0.05
STATIC_BATCHES = 64


def mixed_losses(experts: ExpertSet, states: Sequence[Tensor], weights: Tensor, labels: Tensor) -> Tensor:
    """The loss of mixed logits at every place [...], in nats; zero where the label is -100.

    Args:
        experts: whose heads are used.
        states: of every expert [..., D].
        weights: [..., E], or [E] for the same everywhere.
        labels: [...], aligned with the predictions.
    """
    return token_losses(experts.mix(states, weights.expand(*labels.shape, -1)), labels)


@torch.no_grad()
def single_losses(experts: ExpertSet, states: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The loss of every expert by itself at every place [..., E], in nats; zero where the label is -100."""
    losses = [token_losses(experts.logits_of(number, state), labels) for number, state in enumerate(states)]
    return torch.stack(losses, dim=-1)


def predicted(states: Sequence[Tensor], labels_BL: Tensor) -> tuple[list[Tensor], Tensor]:
    """States [T, D] and labels [T] of those places alone whose label is not -100."""
    real_BL = labels_BL != IGNORED_LABEL
    return [state[real_BL] for state in states], labels_BL[real_BL]


def balance_loss(weights_TE: Tensor) -> Tensor:
    """How unequally the experts are used: 0 for equal mean weights, E - 1 where one has all."""
    usage_E = weights_TE.mean(0)
    return len(usage_E) * usage_E.square().sum() - 1


def choice_loss(scores_BLE: Tensor, losses_BE: Tensor, attention_mask_BL: Tensor, prefix_length: int) -> Tensor:
    """How far the router's choice is from the experts' own losses, in nats, summed over the rows by their tokens.

    The label of a row is what its text says of the experts, softmax(-losses): the posterior over experts that were
    equally likely before. Every score has a gradient although one expert alone runs, also where one expert is far
    ahead (the expected loss of a drawn choice has none there). Every place of the prefix decides, so that shorter
    prompts are learnt too.

    Args:
        scores_BLE: of the router.
        losses_BE: of every expert on what is behind the prefix, summed over its tokens.
        attention_mask_BL: 1 for tokens, padding on the right.
        prefix_length: tokens that choose.
    """
    labels_BE = (-losses_BE).softmax(-1)
    prefix_BL = attention_mask_BL[:, :prefix_length].float()
    crossed_BL = -(scores_BLE[:, :prefix_length].log_softmax(-1) * labels_BE[:, None]).sum(-1)
    by_row_B = (crossed_BL * prefix_BL).sum(-1) / prefix_BL.sum(-1)
    return (by_row_B * (attention_mask_BL.sum(-1) - 1)).sum()


def fit_static_weights(experts: ExpertSet, batches: Iterable[tuple[dict[str, Tensor], list[Tensor]]]) -> list[float]:
    """As many numbers as experts that no input changes: what a mixture reaches without a router.

    Args:
        experts: the experts.
        batches: of `state_cache.batches_of_states`, in random order.
    """
    scores_E = torch.zeros(len(experts), requires_grad=True)
    optimizer = torch.optim.Adam([scores_E], lr=STATIC_LEARNING_RATE)
    for number, (batch, states) in enumerate(batches):
        if number == STATIC_BATCHES:
            break
        # The rate falls to nothing: the last batches must not be what the weights are about.
        optimizer.param_groups[0]["lr"] = STATIC_LEARNING_RATE * (1 - number / STATIC_BATCHES)
        device = experts.embedding.weight.device
        states, labels_T = predicted([state.to(device) for state in states], batch["labels"].to(device))
        loss = mixed_losses(experts, states, scores_E.softmax(-1).to(device), labels_T).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scores_E.detach().softmax(-1).tolist()
