"""Matrices of a mixture by their checkpoint names, for all families."""

import pytest
import torch
from safetensors.torch import load_file

from moe_ext.router_ft.matrices import find_matrices
from moe_ext.routers import moe_layers, router_parameters


def test_each_matrix_is_the_tensor_that_save_pretrained_writes_under_its_name(family, model_of, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    matrices = find_matrices(model)
    assert len({matrix.name for matrix in matrices}) == len(matrices)
    for matrix in matrices:
        assert torch.equal(matrix.weight(model), written[f"{matrix.name}.weight"])
        assert matrix.weight(model).shape == (matrix.num_rows, matrix.num_columns)


def test_every_two_dimensional_tensor_of_the_layers_is_found_but_routers_and_single_gates(family, model_of, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    routers = {id(parameter) for parameter in router_parameters(model).values()}
    num_routers = len(routers)
    expected = {
        name.removesuffix(".weight")
        for name, tensor in written.items()
        if ".layers." in name and tensor.ndim == 2 and tensor.shape[0] > 1
    }
    found = {matrix.name for matrix in find_matrices(model)}
    assert found < expected
    assert len(expected - found) == num_routers


def test_writing_into_a_matrix_changes_the_model(model_of):
    model = model_of("mixtral")
    matrix = next(matrix for matrix in find_matrices(model) if matrix.name.endswith("experts.2.w3"))
    matrix.weight(model).fill_(7)
    layer = moe_layers(model)[0]
    assert (layer.experts.gate_up_proj[2, 32:] == 7).all()
    assert not (layer.experts.gate_up_proj[2, :32] == 7).any()


def test_experts_and_what_every_token_passes_are_told_apart(model_of):
    matrices = find_matrices(model_of("deepseek_v3"))
    experts = [matrix for matrix in matrices if matrix.kind == "expert"]
    assert {matrix.layer for matrix in experts} == {1}
    assert len(experts) == 4 * 3
    assert [matrix.reads_hidden for matrix in experts[:3]] == [True, True, False]
    dense = {matrix.name.split(".", 3)[3] for matrix in matrices if matrix.kind == "dense" and matrix.layer == 0}
    assert {"mlp.gate_proj", "self_attn.kv_b_proj"} < dense


def test_experts_of_another_layout_are_refused(model_of):
    model = model_of("olmoe")
    model.model.layers[0].mlp.experts.is_transposed = True
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts .*layout"):
        find_matrices(model)
