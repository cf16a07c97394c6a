"""A tiny mixture on disk, plans that mix all formats, and runs of a few seconds."""

import pytest
import tiny_models
import torch
from tiny_models import MOE_KINDS, tiny_model

from moe_ext.router_ft.formats import FORMATS
from moe_ext.router_ft.matrices import find_matrices
from moe_ext.router_ft.plan import Plan


@pytest.fixture(params=MOE_KINDS)
def family(request):
    return request.param


@pytest.fixture
def model_of():
    """A function that makes a tiny model of a family whose weights bfloat16 can hold."""

    def make(family, **changed):
        model = tiny_model(family, **changed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model

    return make


@pytest.fixture
def mixed_plan():
    """A function that gives the matrices of a model all formats in turn."""

    def make(model):
        matrices = find_matrices(model)
        names = list(FORMATS)
        return Plan(
            {matrix.name: names[place % len(names)] for place, matrix in enumerate(matrices)},
            {matrix.name: (matrix.num_rows, matrix.num_columns) for matrix in matrices},
        )

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of a tiny OLMoE with the committed tokenizer."""
    return str(tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny_moe"), "olmoe", dtype=torch.bfloat16))
