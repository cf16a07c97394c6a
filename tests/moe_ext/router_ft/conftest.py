"""A tiny mixture on disk, plans that mix all formats, and runs of a few seconds."""

import pytest
import torch
from moe_families import FAMILIES, tiny_moe

from moe_common.models.base_model import load_base_model
from moe_ext.router_ft.formats import FORMATS
from moe_ext.router_ft.matrices import find_matrices
from moe_ext.router_ft.plan import Plan


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def model_of():
    """A function that makes a tiny model of a family whose weights bfloat16 can hold."""

    def make(family, **changed):
        model = tiny_moe(family, **changed)
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
def tokenizer():
    return load_base_model()[1]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """Folder of a tiny OLMoE with the committed tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_moe")
    model = tiny_moe("olmoe", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
