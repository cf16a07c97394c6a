"""Counts against a loop over tokens: any batch, any padding, any kind of choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from study_testing import GivenGates

from moe_ext.router_study.collect.counts import Counts, confidences
from moe_ext.router_study.collect.vocabulary_counts import VocabularyCounts
from moe_ext.router_study.gates.base import Routing

L, B, S, E, K, PARTS, IDS = 2, 3, 5, 4, 2, 4, 6


def made(seed, *, with_gaps=False):
    generator = torch.Generator().manual_seed(seed)
    routing = GivenGates(L, E, K).decide(torch.randn(L, B * S, E, generator=generator))
    if with_gaps:  # as top-p leaves places of a token empty
        empty = torch.rand(L, B * S, generator=generator) < 0.4
        chosen = routing.chosen_LTK.clone()
        chosen[..., 1] = torch.where(empty, E, chosen[..., 1])
        routing = Routing(routing.logits_LTE, routing.probabilities_LTE, chosen)
    mask = torch.rand(B, S, generator=generator) < 0.7
    part = torch.randint(PARTS, (B,), generator=generator)
    ids, predicted = torch.randint(IDS, (2, B, S), generator=generator)
    return routing, mask, part, ids, predicted


def one_token_at_a_time(routing, mask, part, ids, predicted):
    """The oracle: plain loops."""
    counts = Counts.empty(PARTS, L, E, in_rank=True)
    table = torch.zeros(3, L, IDS, E, dtype=torch.int32)
    chosen = routing.chosen_LTK.view(L, B, S, -1).tolist()
    probability = routing.probabilities_LTE.view(L, B, S, E)
    for row in range(B):
        u = int(part[row])
        for place in range(S):
            if not mask[row, place]:
                continue
            counts.tokens_U[u] += 1
            sets = [[expert for expert in chosen[gate][row][place] if expert < E] for gate in range(L)]
            for gate in range(L):
                p = probability[gate, row, place].double()
                counts.first_ULE[u, gate, sets[gate][0]] += 1
                counts.probability_ULE[u, gate] += p
                ranked = sorted(p.tolist(), reverse=True)
                entropy = float(-(p * p.log()).sum())
                mass = sum(float(p[expert]) for expert in sets[gate])
                counts.confidence_UL4[u, gate] += torch.tensor(
                    [entropy, ranked[0], mass, ranked[len(sets[gate]) - 1] - ranked[len(sets[gate])]],
                    dtype=torch.float64,
                )
                for expert in sets[gate]:
                    counts.chosen_ULE[u, gate, expert] += 1
                    for other_gate in range(L):
                        for other in sets[other_gate]:
                            counts.together_UMM[u, gate * E + expert, other_gate * E + other] += 1
                for one, two in zip(sets[gate], sets[gate][1:], strict=False):
                    counts.next_in_rank_ULEE[u, gate, one, two] += 1
                    counts.next_in_rank_ULEE[u, gate, two, one] += 1
                first = sets[gate][0]
                table[0, gate, ids[row, place], first] += 1
                table[2, gate, predicted[row, place], first] += 1
                if place + 1 < S and mask[row, place + 1]:
                    table[1, gate, ids[row, place + 1], first] += 1
            if place + 1 < S and mask[row, place + 1]:
                counts.neighbours_U[u] += 1
                for gate in range(L):
                    after = [expert for expert in chosen[gate][row][place + 1] if expert < E]
                    counts.repeats_UL2[u, gate, 0] += after[0] == sets[gate][0]
                    counts.repeats_UL2[u, gate, 1] += bool(set(after) & set(sets[gate]))
    return counts, table


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), with_gaps=st.booleans())
def test_counts_are_those_of_a_loop_over_tokens(seed, with_gaps):
    given_batch = made(seed, with_gaps=with_gaps)
    routing, mask, part, ids, predicted = given_batch
    counts = Counts.empty(PARTS, L, E, in_rank=True)
    counts.add(routing, mask, part)
    vocabulary = VocabularyCounts.empty(L, IDS, E)
    vocabulary.add(routing.first_LT, ids, predicted, mask)
    expected, table = one_token_at_a_time(*given_batch)
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(getattr(counts, name), tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(vocabulary.table_3LVE, table)


def test_what_padding_holds_changes_no_count():
    routing, mask, part, *_ = made(3)
    garbage = GivenGates(L, E, K).decide(
        torch.where(mask.flatten()[None, :, None], routing.logits_LTE, 9 * torch.randn_like(routing.logits_LTE))
    )
    held, other = Counts.empty(PARTS, L, E, in_rank=True), Counts.empty(PARTS, L, E, in_rank=True)
    held.add(routing, mask, part)
    other.add(garbage, mask, part)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in held.tensors().items())


def test_experts_in_another_order_are_counted_in_that_order():
    routing, mask, part, *_ = made(4)
    order = torch.tensor([2, 0, 3, 1])
    renamed = GivenGates(L, E, K).decide(routing.logits_LTE[..., order])
    held, other = Counts.empty(PARTS, L, E), Counts.empty(PARTS, L, E)
    held.add(routing, mask, part)
    other.add(renamed, mask, part)
    assert torch.equal(other.chosen_ULE, held.chosen_ULE[..., order])
    assert torch.equal(other.repeats_UL2, held.repeats_UL2)
    torch.testing.assert_close(other.confidence_UL4, held.confidence_UL4)


def test_the_margin_is_zero_where_all_experts_are_chosen():
    routing = GivenGates(1, 3, 3).decide(torch.randn(1, 4, 3))
    entropy, top1, mass, margin = confidences(routing)[0].unbind(dim=-1)
    assert margin.tolist() == [0, 0, 0, 0]
    assert mass.tolist() == pytest.approx([1, 1, 1, 1])
    assert bool((entropy > 0).all() & (top1 > 1 / 3).all())
