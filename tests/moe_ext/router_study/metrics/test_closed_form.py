"""Routers whose every figure is known: uniform, one expert a domain, one expert a token, layers that agree."""

import math

import pytest
import torch
from study_testing import activations_of, sure_of

from moe_ext.router_study.analysis.measure import measure_all
from moe_ext.router_study.collect.totals import totals_of
from moe_ext.router_study.metrics import coactivation, confidence, domains, load, paths, repetition, transitions

E, K, L, R, S = 8, 2, 3, 64, 32
EXACT = {"rtol": 0, "atol": 1e-6}


def totals(activations):
    return totals_of(activations.counts, len(activations.domains))


@pytest.fixture(scope="module")
def uniform():
    """Every token draws two of eight experts, at every gate anew; two domains."""
    generator = torch.Generator().manual_seed(0)
    # Small scores: the draw decides the choice, the probabilities stay even.
    return activations_of(1e-4 * torch.randn(2, L, R, S, E, generator=generator), K)


@pytest.fixture(scope="module")
def by_domain():
    """Four domains; domain d chooses expert d and nothing else, at every gate."""
    chosen = torch.arange(4).view(4, 1, 1, 1, 1).expand(4, L, R, S, 1)
    return activations_of(sure_of(chosen, 4), 1)


@pytest.fixture(scope="module")
def by_token():
    """Token x chooses the experts x and x + 1 of eight, at every gate; ids come in blocks of 16 of a kind."""
    ids_DRS = (torch.arange(2 * R * S) // 16 % E).view(2, R, S)
    chosen = torch.stack([ids_DRS, (ids_DRS + 1) % E], dim=-1)[:, None].expand(2, L, R, S, K)
    return activations_of(sure_of(chosen, E), K, ids_DRS=ids_DRS)


@pytest.fixture(scope="module")
def agreeing():
    """The first gate draws one of four experts; the next choose what follows from it: e + 1, then e + 2."""
    first = torch.randint(4, (1, 1, R, S, 1), generator=torch.Generator().manual_seed(1))
    return activations_of(sure_of(torch.cat([first, (first + 1) % 4, (first + 2) % 4], dim=1), 4), 1)


def test_a_uniform_router_has_the_chance_value_of_every_figure(uniform):
    measured = measure_all(uniform, replicates=20)
    tokens = 2 * R * S
    loose = {
        "load.share": 0.02,
        "load.variation": 0.02,
        "load.busiest": 0.15,
        "load.evenness": 0.002,
        "load.dead": 0,
        "load.balance": 1e-3,
        "confidence.entropy": 1e-6,
        "confidence.top1": 1e-4,
        "confidence.mass": 1e-4,
        "confidence.margin": 1e-4,
        "coactivation.conditional": 0.05,
        "coactivation.jaccard": 0.12,  # two of eight exclude each other a little: not independent
        "coactivation.strongest": 0.05,
        "coactivation.excess": 0.02,
        "coactivation.across_layers": 0.06,
        "repetition.first": 0.02,
        "repetition.either": 0.03,
        "repetition.first_by_domain": 0.03,
        "domains.rate": 0.03,
        "domains.share_of_expert": 0.05,
        "domains.divergence": 0.003,
        "domains.pairwise_divergence": 0.003,
        "domains.information": 0.005,
        "transitions.probability": 0.05,
        "transitions.information": 0.02,
    }
    assert tokens == 4096
    for name, tolerance in loose.items():
        found = measured[name]
        assert float((found.value - found.chance).abs().max()) <= tolerance, name
        assert float((found.value - found.shuffled).abs().max()) <= 2 * tolerance + 1e-4, name
        assert bool((found.low <= found.value + 1e-9).all() & (found.value <= found.high + 1e-9).all()), name


def test_one_expert_a_domain_gives_the_domain_away(by_domain):
    t = totals(by_domain)
    one_hot = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(domains.rate(t), one_hot[:, None].expand(4, L, 4), **EXACT)
    torch.testing.assert_close(domains.share_of_expert(t), one_hot[:, None].expand(4, L, 4), **EXACT)
    torch.testing.assert_close(domains.information(t), torch.ones(L, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(domains.divergence(t), torch.full((L,), math.log(4), dtype=torch.float64), **EXACT)
    apart = (1 - one_hot)[..., None].expand(4, 4, L) * math.log(2)
    torch.testing.assert_close(domains.pairwise_divergence(t), apart, **EXACT)
    torch.testing.assert_close(load.evenness(t), torch.ones(L, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(repetition.first_choice(t), torch.ones(L, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(confidence.top1(t), torch.ones(L, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(confidence.entropy(t), torch.zeros(L, dtype=torch.float64), rtol=0, atol=1e-5)


def test_shuffling_tokens_takes_the_domain_away(by_domain):
    measured = measure_all(by_domain, replicates=5)
    assert float(measured["domains.information"].shuffled.max()) < 0.01
    assert float(measured["repetition.first"].shuffled.max()) < 0.3


def test_one_expert_a_token_is_decided_by_the_vocabulary(by_token):
    measured = measure_all(by_token, replicates=5)
    ones = torch.ones(L, dtype=torch.float64)
    torch.testing.assert_close(measured["vocabulary.input"].value, ones, **EXACT)
    torch.testing.assert_close(measured["vocabulary.input"].low, ones, **EXACT)
    assert float(measured["vocabulary.input"].shuffled.max()) < 0.2
    # A block of 16 of a kind is followed by the next kind, and a row holds two blocks.
    next_token = ones * ((31 - 1) / 31)
    torch.testing.assert_close(measured["repetition.first"].value, next_token, **EXACT)
    torch.testing.assert_close(measured["repetition.either"].value, ones, **EXACT)  # x and x + 1 share an expert


def test_of_one_expert_a_token_pairs_are_known(by_token):
    t = totals(by_token)
    conditional = torch.zeros(E, E, dtype=torch.float64)
    places = torch.arange(E)
    conditional[places, (places + 1) % E] = 0.5  # half of x's tokens are of kind x, and choose x + 1 as well
    conditional[places, (places - 1) % E] = 0.5
    torch.testing.assert_close(coactivation.conditional(t), conditional.expand(L, E, E), **EXACT)
    torch.testing.assert_close(coactivation.conditional_as_in_script(t), conditional.expand(L, E, E), **EXACT)
    torch.testing.assert_close(coactivation.jaccard(t), conditional.expand(L, E, E) * 2 / 3, **EXACT)
    torch.testing.assert_close(coactivation.strongest(t), torch.full((L,), 0.5, dtype=torch.float64), **EXACT)
    chance = (1 - torch.eye(E, dtype=torch.float64)) / (E - 1)
    torch.testing.assert_close(coactivation.conditional_by_chance(t), chance.expand(L, E, E), **EXACT)


def test_layers_that_agree_are_perfectly_correlated(agreeing):
    t = totals(agreeing)
    torch.testing.assert_close(coactivation.across_layers(t), torch.ones(L, L, dtype=torch.float64), **EXACT)
    follows = torch.roll(torch.eye(4, dtype=torch.float64), 1, dims=1)  # row e, column e + 1
    torch.testing.assert_close(transitions.transition(t), follows.expand(L - 1, 4, 4), **EXACT)
    share = load.share(t)[0]
    entropy = -(share * share.log()).sum()
    torch.testing.assert_close(transitions.information(t), entropy.expand(L - 1), **EXACT)
    numbers = paths.path_numbers(agreeing.sample.routing(agreeing.gates).first_LT, 4)
    torch.testing.assert_close(paths.entropy(numbers), entropy.expand(1), **EXACT)
    assert paths.distinct(numbers).tolist() == [4.0]


def test_a_transition_is_of_the_choices_that_follow_an_expert():
    first = torch.arange(4).repeat(R * S // 4).view(1, 1, R, S, 1)
    t = totals(activations_of(sure_of(torch.cat([first, first // 2], dim=1), 4), 1))
    expected = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(transitions.transition(t)[0], expected, **EXACT)
    assert float(transitions.information(t)[0]) == pytest.approx(math.log(2))


def test_shuffling_tokens_takes_the_agreement_of_layers_away(agreeing):
    measured = measure_all(agreeing, replicates=5)
    apart = ~torch.eye(L, dtype=torch.bool)
    assert float(measured["coactivation.across_layers"].shuffled[apart].max()) < 0.1
    assert float(measured["transitions.information"].shuffled.max()) < 0.02
    assert float(measured["paths.distinct"].shuffled.min()) > 50


def test_a_dead_expert_is_counted_and_uneven_loads_are_what_they_are():
    chosen = torch.tensor([0, 0, 0, 1]).repeat(R * S // 4).view(1, 1, R, S, 1)
    t = totals(activations_of(sure_of(chosen, 4), 1))
    torch.testing.assert_close(load.share(t)[0], torch.tensor([0.75, 0.25, 0, 0], dtype=torch.float64), **EXACT)
    assert load.dead(t).tolist() == [2.0]
    assert load.busiest(t).tolist() == pytest.approx([3.0])
    # mean 1/4, squared distances 1/4, 0, 1/16, 1/16
    assert load.variation(t).tolist() == pytest.approx([math.sqrt((0.25 + 0 + 0.0625 + 0.0625) / 4) / 0.25])
    assert load.balance(t).tolist() == pytest.approx([4 * (0.75**2 + 0.25**2)], abs=1e-5)


def test_mixtrals_chance_levels_are_those_of_its_paper(uniform):
    measured = measure_all(uniform, replicates=2)
    assert float(measured["repetition.first"].chance[0]) == pytest.approx(0.125)
    assert float(measured["repetition.either"].chance[0]) == pytest.approx(0.4643, abs=1e-4)


def test_the_divergence_of_domains_is_their_information_where_they_are_equally_long(uniform):
    t = totals(uniform)
    torch.testing.assert_close(domains.divergence(t), domains.information(t) * math.log(2), rtol=1e-6, atol=1e-9)
