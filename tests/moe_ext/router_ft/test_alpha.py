"""Heavy-tail exponents: known power laws, the formulas by hand, and weightwatcher as a loose witness."""

import math

import numpy as np
import pytest
import torch

from moe_ext.router_ft.alpha import (
    ESTIMATES,
    alpha_hill,
    alpha_ks,
    alpha_mid,
    alpha_table,
    eigenvalues,
    read_alpha_csv,
    write_alpha_csv,
)
from moe_ext.router_ft.matrices import find_matrices


def power_law(alpha, count=4000):
    """Quantiles of p(x) ~ x^-alpha from 1 on, ascending."""
    return (1 - (np.arange(count) + 0.5) / count) ** (-1 / (alpha - 1))


def test_the_eigenvalues_are_those_of_the_matrix_times_its_transpose():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    weight[0] = weight[1]  # one eigenvalue of zero, which is left out
    expected = np.linalg.eigvalsh((weight.double() @ weight.double().T).numpy())[1:]
    np.testing.assert_allclose(eigenvalues(weight), expected, rtol=1e-10)


def test_the_middle_value_counts_in_one_form_and_not_in_the_other():
    values = np.array([0.1, 0.5, 1.0, 2.0, 4.0])  # the middle is 1
    logarithms = math.log(2) + math.log(4)
    assert alpha_mid(values) == (pytest.approx(1 + 3 / logarithms), 1.0, 3)
    assert alpha_hill(values) == (pytest.approx(1 + 2 / logarithms), 1.0, 2)


@pytest.mark.parametrize("estimate", sorted(ESTIMATES))
@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_found(estimate, alpha):
    values = power_law(alpha, count=600)
    assert ESTIMATES[estimate](values)[0] == pytest.approx(alpha, rel=0.03)


def test_the_best_beginning_of_the_tail_is_where_the_power_law_begins():
    body = np.linspace(0.05, 0.95, 300)
    values = np.concatenate([body, power_law(2.5, count=300)])
    alpha, xmin, num_tail = alpha_ks(values)
    assert alpha == pytest.approx(2.5, rel=0.1)
    assert 0.9 < xmin < 1.3
    assert num_tail > 150


def test_a_heavier_tail_has_a_smaller_exponent_and_a_scale_changes_nothing():
    heavy, light = (power_law(alpha, count=200) for alpha in (1.9, 3.0))
    for estimate in ESTIMATES.values():
        assert estimate(heavy)[0] < estimate(light)[0]
        assert estimate(7 * heavy)[0] == pytest.approx(estimate(heavy)[0])


@pytest.mark.slow
def test_weightwatcher_finds_about_the_same():
    weightwatcher = pytest.importorskip("weightwatcher", reason="weightwatcher is not installed")
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(200, 200))[0] for _ in range(2))
    singular = torch.from_numpy(power_law(2.5, count=200)).float().sqrt()
    layer = torch.nn.Linear(200, 200, bias=False)
    layer.weight.data = left @ torch.diag(singular) @ right
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))
    theirs = watcher.analyze()["alpha"].item()
    assert alpha_ks(eigenvalues(layer.weight.data))[0] == pytest.approx(theirs, rel=0.15)


def test_the_table_has_a_row_for_every_matrix_and_is_read_as_it_was_written(family, model_of, tmp_path):
    model = model_of(family)
    matrices = find_matrices(model)
    rows = alpha_table(model, matrices)
    write_alpha_csv(rows, tmp_path / "alpha.csv")
    assert (tmp_path / "alpha.csv").read_text().startswith("layer_name,alpha_hill,")
    assert read_alpha_csv(tmp_path / "alpha.csv") == {row.layer_name: row.alpha_hill for row in rows}
    assert [row.layer_name for row in rows] == [matrix.name for matrix in matrices]


def test_an_expert_of_zeros_is_named(model_of):
    model = model_of("olmoe")
    model.model.layers[1].mlp.experts.down_proj.data[2] = 0
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.2\.down_proj.*\b0 eigenvalues"):
        alpha_table(model, find_matrices(model))


def test_a_matrix_without_a_tail_is_named_before_a_table_is_written(model_of):
    model = model_of("olmoe")
    down = model.model.layers[1].mlp.experts.down_proj.data
    down[2] = torch.eye(*down.shape[1:])
    with pytest.raises(ValueError, match=r"experts\.2\.down_proj.*eigenvalue beyond 1,"):
        alpha_table(model, find_matrices(model))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer_name,alpha\nq,2\n", "alpha_hill.*layer_name, alpha"),
        ("", "alpha_hill and layer_name"),
        ("layer_name,alpha_hill\nq,two\n", "line 2 holds 'two'"),
        ("layer_name,alpha_hill\nq,inf\n", "line 2 holds 'inf'"),
        ("layer_name,alpha_hill\nq,0.5\n", "line 2 holds '0.5'"),
        ("layer_name,alpha_hill\nq,2\nq,3\n", "names q twice"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "alpha.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_alpha_csv(tmp_path / "alpha.csv")


def test_no_table_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="router_ft alpha"):
        read_alpha_csv(tmp_path / "alpha.csv")
