"""Plans on disk: read as written, and refused where they do not fit."""

import json

import pytest

pytest.importorskip("compressed_tensors", reason="needs the extra 'quant'")

from moe_common.runs.whole_files import write_json
from moe_ext.router_ft.matrices import find_matrices
from moe_ext.router_ft.plan import Plan, read_plan, uniform_plan


def test_a_plan_is_read_as_it_was_written(model_of, mixed_plan, tmp_path):
    plan = mixed_plan(model_of("mixtral"))
    write_json(tmp_path / "plan.json", plan.to_dict())
    assert read_plan(tmp_path / "plan.json") == plan


def test_the_bits_of_a_plan_are_weighted_by_size():
    plan = Plan({"a": "INT4", "b": "MXFP8", "c": "BF16"}, {"a": (96, 128), "b": (32, 128), "c": (128, 128)})
    assert plan.bits_per_weight == pytest.approx((3 * 4.125 + 8.25) / 4)
    assert plan.bits_per_weight_with_bf16 == pytest.approx((3 * 4.125 + 8.25 + 4 * 16) / 8)
    assert plan.counts() == {"INT4": 1, "MXFP8": 1, "BF16": 1}


def test_a_uniform_plan_leaves_what_every_token_passes(model_of):
    matrices = find_matrices(model_of("qwen2_moe"))
    plan = uniform_plan(matrices, "INT3")
    assert {plan.formats[matrix.name] for matrix in matrices if matrix.kind == "expert"} == {"INT3"}
    assert {plan.formats[matrix.name] for matrix in matrices if matrix.kind == "dense"} == {"BF16"}


def test_a_plan_of_another_model_is_refused_with_the_first_matrix_that_differs(model_of, mixed_plan):
    plan = mixed_plan(model_of("olmoe"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.block_sparse_moe\.experts\.0\.w1"):
        plan.check_model(find_matrices(model_of("mixtral")))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.0\.gate_proj.*\b32 x 32\b.*\b64 x"):
        plan.check_model(find_matrices(model_of("olmoe", intermediate_size=64)))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.\S+, which"):
        plan.check_model(find_matrices(model_of("olmoe", num_hidden_layers=1)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no plan"),
        ('{"matrices": {}}', "holds no plan"),
        ('{"matrices": {"q": {"format": "INT4"}}}', "format, rows and columns"),
        ('{"matrices": {"q": {"format": "INT5", "rows": 32, "columns": 32}}}', r"\bq\b.*\'INT5\'"),
        ('{"matrices": {"q": {"format": "MXFP4", "rows": 32, "columns": 40}}}', r"\bq\b.*MXFP4.*\b40 columns"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.json")


def test_no_plan_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="router_ft allocate"):
        read_plan(tmp_path / "plan.json")


def test_what_a_plan_was_made_by_is_kept(tmp_path, model_of):
    plan = uniform_plan(find_matrices(model_of("olmoe")), "INT4")
    write_json(tmp_path / "plan.json", plan.to_dict())
    assert json.loads((tmp_path / "plan.json").read_text())["made_by"] == {"uniform": "INT4", "dense": "BF16"}
