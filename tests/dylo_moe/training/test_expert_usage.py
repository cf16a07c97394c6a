import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import MoELoraConfig, get_peft_model
from tiny_models import tiny_model

from dylo_moe.training.expert_usage import draw_usage, usage_by_block


@pytest.fixture
def routed():
    config = MoELoraConfig(num_experts=4, top_k=2, r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(num_hidden_layers=3), config)


@pytest.fixture
def blocks():
    ids = torch.randint(0, 64, (5, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[4, 3:] = 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})


def count_by_hand(model, blocks) -> np.ndarray:
    """Each block of the model: how often each expert is among a real token's two, over all its layers."""
    counts = np.zeros((3, 4))
    model.eval()
    for row in blocks:
        with torch.no_grad(), model.record_routing() as recorded:
            model(input_ids=torch.tensor([row["input_ids"]]), attention_mask=torch.tensor([row["attention_mask"]]))
        for site, (weights,) in recorded.items():
            block = int(site.split("layers.")[1].split(".")[0])
            for token, real in enumerate(row["attention_mask"]):
                if real:
                    counts[block] += (weights[0, token] > 0).numpy() / 2
    return counts / counts.sum(axis=1, keepdims=True)


def test_usage_equals_a_count_over_every_layer_and_real_token(routed, blocks):
    # float32 sums of up to 7 x 35 assignments against a count in float64
    np.testing.assert_allclose(usage_by_block(routed, blocks, batch_size=2), count_by_hand(routed, blocks), rtol=1e-5)


def test_measuring_leaves_the_model_in_the_mode_it_came_in(routed, blocks):
    routed.train()
    usage_by_block(routed, blocks)
    assert routed.training


def test_a_router_with_one_gate_gives_one_row(blocks):
    config = MoELoraConfig(num_experts=3, r=2, target_modules=["q_proj"], router_scope="model", task_type="CAUSAL_LM")
    assert usage_by_block(get_peft_model(tiny_model(), config), blocks).shape == (1, 3)


def test_the_picture_is_written_whole(tmp_path):
    usage = {"prose": np.full((3, 2), 0.5), "code": np.array([[0.1, 0.9]] * 3)}
    draw_usage(usage, ["expert_0", "expert_1"], tmp_path / "usage.png")
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["usage.png"]
