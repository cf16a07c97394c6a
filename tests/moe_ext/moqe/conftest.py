"""Small experts: two roundings of one random model, and a mixture of them."""

import pytest
import torch
from moqe_testing import quantize_to

from moe_ext.moqe.mixture.model import MoQEModel
from moe_ext.moqe.mixture.router import RouterConfig


@pytest.fixture(scope="session")
def expert_folders(tiny_base, tmp_path_factory):
    """Folders of int2, int3 and int4 experts of the tiny base."""
    return quantize_to(tmp_path_factory.mktemp("experts"), tiny_base, "int2,int3,int4")


@pytest.fixture
def mixture(expert_folders):
    """A mixture of two experts whose router has an opinion."""
    model = MoQEModel.from_experts(expert_folders[:2], RouterConfig(rank=8))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.router.score.weight.copy_(torch.randn(2, 8, generator=generator))
    return model


@pytest.fixture
def tokens():
    """Three rows of ten tokens."""
    return torch.randint(2, 4000, (3, 10), generator=torch.Generator().manual_seed(0))
