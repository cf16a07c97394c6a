"""Routing made by hand, and gates that route as they are told to."""

from contextlib import contextmanager

import torch

from moe_ext.router_study.collect.collector import Activations
from moe_ext.router_study.collect.counts import Counts
from moe_ext.router_study.collect.sample import Sample
from moe_ext.router_study.collect.vocabulary_counts import VocabularyCounts
from moe_ext.router_study.gates.base import Gates, Routing

SURE = 30.0  # a score so far above 0 that softmax gives all to it


class GivenGates(Gates):
    """Gates whose scores are given; they choose the k largest of a softmax."""

    def __init__(self, num_gates: int, num_experts: int, num_chosen: int) -> None:
        self.names = [f"gate {place}" for place in range(num_gates)]
        self.labels = [str(place) for place in range(num_gates)]
        self.num_experts, self.num_chosen = num_experts, num_chosen

    def decide(self, logits_LTE):
        probabilities = logits_LTE.softmax(dim=-1)
        return Routing(logits_LTE, probabilities, probabilities.topk(self.num_chosen, dim=-1).indices)

    def weights(self):
        raise NotImplementedError

    def modules(self):
        raise NotImplementedError

    @contextmanager
    def listening(self):
        yield {}

    def routing(self, heard):
        raise NotImplementedError

    @contextmanager
    def overruled(self, place, overrule):
        yield


def activations_of(
    logits_DLRSE: torch.Tensor, num_chosen: int, *, ids_DRS=None, num_ids: int = 50, num_groups: int = 4, in_rank=True
) -> Activations:
    """What a collector makes of these scores, by domain, gate, row and token."""
    D, L, R, S, E = logits_DLRSE.shape
    gates = GivenGates(L, E, num_chosen)
    counts = Counts.empty(D * num_groups, L, E, in_rank=in_rank)
    vocabulary, pieces = VocabularyCounts.empty(L, num_ids, E), []
    mask_RS = torch.ones(R, S, dtype=torch.bool)
    for domain in range(D):
        ids_RS = torch.zeros(R, S, dtype=torch.long) if ids_DRS is None else ids_DRS[domain]
        logits_LTE = logits_DLRSE[domain].flatten(1, 2)
        routing, part_R = gates.decide(logits_LTE), domain * num_groups + torch.arange(R) % num_groups
        counts.add(routing, mask_RS, part_R)
        vocabulary.add(routing.first_LT, ids_RS, ids_RS, mask_RS)
        chosen = routing.chosen_LTK.unflatten(1, (R, S)).transpose(0, 1).to(torch.int16)
        pieces.append(Sample(ids_RS, ids_RS, mask_RS, part_R, logits_DLRSE[domain].transpose(0, 1), chosen))
    domains = [f"domain {number}" for number in range(D)]
    return Activations(domains, num_groups, gates, counts, vocabulary, Sample.joined(pieces))


def sure_of(chosen_DLRSK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Scores [D, L, R, S, E] under which these experts are chosen, the first one first, and get nearly all."""
    ranks = torch.arange(chosen_DLRSK.shape[-1], 0, -1, dtype=torch.float32) * 1e-3 + SURE
    scores = torch.zeros(*chosen_DLRSK.shape[:-1], num_experts)
    return scores.scatter(-1, chosen_DLRSK, ranks.expand(chosen_DLRSK.shape))
