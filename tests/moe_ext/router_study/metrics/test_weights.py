"""Figures of weights against plain loops, constructed subspaces, and random ones."""

import math

import pytest
import torch
from tiny_models import lora_mixture, tiny_model

from moe_ext.router_study import ExpertAnalyzer, MoEModelWrapper, RouterAnalyzer
from moe_ext.router_study.analysis.experts import experts_of
from moe_ext.router_study.metrics import experts, weights

E, H = 5, 40


@pytest.fixture
def rows():
    return torch.randn(E, H, generator=torch.Generator().manual_seed(0))


def test_cosines_are_those_of_a_loop(rows):
    expected = [[float(torch.cosine_similarity(one, other, dim=0)) for other in rows] for one in rows]
    torch.testing.assert_close(
        weights.cosines(rows), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )
    apart = [abs(expected[i][j]) for i in range(E) for j in range(E) if i != j]
    assert float(weights.mean_cosine(rows)) == pytest.approx(sum(apart) / len(apart), rel=1e-5)


def test_random_rows_have_the_mean_cosine_that_chance_gives():
    generator = torch.Generator().manual_seed(0)
    drawn = weights.random_like(torch.zeros(200, 256), generator)
    assert float(weights.mean_cosine(drawn)) == pytest.approx(weights.mean_cosine_by_chance(drawn), rel=0.02)


def test_the_effective_rank_of_equal_directions_is_their_number_and_of_one_it_is_one():
    assert float(weights.effective_rank(torch.eye(4, 9))) == pytest.approx(4)
    assert float(weights.effective_rank(torch.ones(4, 9))) == pytest.approx(1)


def test_principal_angles_of_known_subspaces_are_their_angles():
    angle = 0.3
    one, other = torch.zeros(2, 6), torch.zeros(2, 6)
    one[0, 0] = one[1, 1] = 1
    other[0, 0], other[0, 2] = math.cos(angle), math.sin(angle)
    other[1, 1], other[1, 3] = math.cos(1e-9), math.sin(1e-9)
    found = weights.principal_angles(one, other, num_dimensions=2)
    assert found.tolist() == pytest.approx([0, angle], abs=1e-7)
    turned = torch.linalg.qr(torch.randn(2, 2)).Q @ other  # the same subspace
    torch.testing.assert_close(weights.principal_angles(one, turned, num_dimensions=2), found, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"num_dimensions.*\b3\b.*\b1 and 2\b"):
        weights.principal_angles(one, other, num_dimensions=3)
    with pytest.raises(ValueError, match=r"\b6 numbers.*\b7\b"):
        weights.principal_angles(one, torch.zeros(2, 7), num_dimensions=1)


def test_random_subspaces_are_as_far_apart_as_random_ones_in_the_study():
    wrapper = MoEModelWrapper(tiny_model("olmoe"))
    found = RouterAnalyzer(wrapper).analyze_router_subspaces()
    assert found["angles"].shape == (1, 4)
    torch.testing.assert_close(found["angles"].mean(dim=0), found["random"], rtol=0, atol=0.25)


def test_equal_routers_have_no_angle_between_them_and_equal_rows_are_seen():
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.copy_(model.model.layers[0].mlp.gate.weight)
    analyzer = RouterAnalyzer(MoEModelWrapper(model))
    assert float(analyzer.analyze_router_subspaces()["angles"].max()) < 1e-6
    similarity = analyzer.compute_router_similarity_matrix()
    torch.testing.assert_close(similarity[:4, 4:], similarity[:4, :4])
    smallest = next(found for found in analyzer.compare() if found.name == "weights.smallest_angle")
    assert smallest.mean < 1e-6 < smallest.chance


def test_router_weights_come_by_name(family):
    model = tiny_model(family)
    held = RouterAnalyzer(MoEModelWrapper(model)).extract_all_router_weights()
    for name, weight in held.items():
        assert torch.equal(weight, model.get_submodule(name).weight.float())


def test_alignment_is_one_for_random_directions_and_largest_for_the_only_one_that_is_read():
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(E, 400, generator=generator)
    random = [torch.randn(300, 400, generator=generator) for _ in range(E)]
    torch.testing.assert_close(
        experts.alignment(router, random), torch.ones(E, E, dtype=torch.float64), rtol=0, atol=0.15
    )
    reading_own = [torch.outer(torch.ones(3), row) for row in router]
    own, others = experts.own_and_others(experts.alignment(router, reading_own))
    assert float(own) == pytest.approx(math.sqrt(400))
    assert float(others) < 2


def test_alignment_of_a_model_is_that_of_a_loop(family):
    model = tiny_model(family)
    wrapper = MoEModelWrapper(model)
    found = ExpertAnalyzer(wrapper).analyze_expert_router_alignment()
    layer = wrapper.gates.layers[0]
    for row in range(4):
        for expert in range(4):
            direction = layer.router.weight[row].detach().double()
            matrix = layer.experts.gate_up_proj[expert].detach().double()
            answer = (matrix @ direction).norm() / direction.norm() / matrix.norm() * math.sqrt(32)
            assert float(found[0, row, expert]) == pytest.approx(float(answer), rel=1e-5)


def test_the_output_norms_are_those_of_each_expert_alone(family):
    wrapper = MoEModelWrapper(tiny_model(family))
    layer, hidden = wrapper.gates.layers[0], torch.randn(6, 32)
    found = experts_of(wrapper.gates, 0).output_norms(hidden)
    up, down = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
    for expert in range(4):
        gate, value = (hidden @ up[expert].T).chunk(2, dim=-1)
        alone = (layer.experts.act_fn(gate) * value) @ down[expert].T
        torch.testing.assert_close(found[:, expert], alone.norm(dim=-1), rtol=1e-4, atol=1e-6)


def test_similarities_agree_where_alike_experts_have_alike_rows():
    generator = torch.Generator().manual_seed(0)
    table = weights.cosines(torch.randn(20, 8, generator=generator))
    assert float(experts.agreement(table, table)) == pytest.approx(1)
    order = torch.randperm(20, generator=generator)
    assert abs(float(experts.agreement(table, table[order][:, order]))) < 0.2


def test_ranks_by_gate_and_norm_are_compared_as_spearman_does():
    spearmanr = pytest.importorskip("scipy.stats", reason="needs the extra 'quant'").spearmanr
    generator = torch.Generator().manual_seed(0)
    gate, norms = torch.randn(7, E, generator=generator), torch.rand(7, E, generator=generator)
    expected = [spearmanr(one, other).statistic for one, other in zip(gate.numpy(), norms.numpy(), strict=True)]
    assert experts.rank_correlation(gate, norms).tolist() == pytest.approx(expected)
    torch.testing.assert_close(experts.rank_table(gate, gate), torch.eye(E, dtype=torch.float64))
    assert experts.rank_table(gate, norms).sum(dim=1).tolist() == pytest.approx([1.0] * E)


def test_lora_experts_are_compared_by_the_update_that_they_make():
    wrapper = MoEModelWrapper(lora_mixture())
    held = experts_of(wrapper.gates, 0)
    (layer,) = wrapper.gates.layers_of(0)
    names = wrapper.gates.router.expert_names
    updates = [
        (layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]).flatten() for name in names
    ]
    torch.testing.assert_close(held.similarity().float(), weights.cosines(torch.stack(updates).detach()).float())
    hidden = torch.randn(5, layer.in_features)
    expected = torch.stack(
        [(hidden @ update.view(-1, layer.in_features).T).norm(dim=-1) for update in updates], dim=-1
    )
    torch.testing.assert_close(held.output_norms(hidden), expected.detach())
    assert set(held.matrices()) == {"0.A", "0.B"}


def test_a_whole_comparison_of_experts_has_chance_and_control(family):
    analyzer = ExpertAnalyzer(MoEModelWrapper(tiny_model(family)))
    ids = torch.arange(3, 35).view(2, 16)
    found = {one.name: one for one in analyzer.compare(ids, torch.ones_like(ids, dtype=torch.bool))}
    assert found["experts.alignment"].mean == pytest.approx(1, abs=0.3)
    assert found["experts.norm_rank"].mean == pytest.approx(0, abs=0.5)
    assert all(one.low <= one.mean <= one.high for one in found.values())
    held = analyzer.extract_all_expert_weights()
    assert list(held) == analyzer.gates.names
    assert all(len(matrices) == 4 for of_gate in held.values() for matrices in of_gate.values())
