"""An X-LoRA that was taken over computes what PEFT's X-LoRA computes, or is refused."""

import pytest
import torch
from peft import LoraConfig, MoELoraConfig, PeftModel, XLoraConfig, get_peft_model
from tiny_models import tiny_model, tokens

from dylo_moe.xlora import load_xlora, xlora_experts

IDS = tokens(2, 9)
WAYS = {
    "dense": {"softmax_temperature": 0.5},
    "deep": {"xlora_depth": 3, "xlora_size": 16},
    "top-k": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
}


def adapters(folder) -> dict[str, str]:
    """Three LoRA adapters that change something, each otherwise."""
    for seed in range(3):
        base = tiny_model()  # which seeds too
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(folder / f"adapter{seed}")
    return {str(seed): str(folder / f"adapter{seed}") for seed in range(3)}


def saved_xlora(folder, **options):
    """An X-LoRA whose classifier tells tokens apart, and the folder it was saved to."""
    base = tiny_model(use_cache=False)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters(folder), **options)
    model = get_peft_model(base, config).eval()
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder / "xlora")
    return model, folder / "xlora"


@torch.no_grad()
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_it_is_the_same_function(options, tmp_path):
    theirs, folder = saved_xlora(tmp_path, **options)
    ours = load_xlora(tiny_model(), folder)
    expected = theirs(input_ids=IDS).logits
    assert not torch.allclose(expected, tiny_model()(input_ids=IDS).logits, atol=1e-2)
    torch.testing.assert_close(ours(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layerwise_scalings": True}, "weighs each layer otherwise"),
        ({"global_scaling_weight": 2.0}, "do not sum to one"),
        ({"top_k_lora": 2}, "no softmax over the experts kept"),
        ({"enable_softmax": False}, "no softmax over the experts kept"),
    ],
)
def test_what_no_router_can_do_is_refused(options, why, tmp_path):
    _, folder = saved_xlora(tmp_path, **options)
    with pytest.raises(ValueError, match=why):
        load_xlora(tiny_model(), folder)


@torch.no_grad()
def test_its_experts_can_be_mixed_by_a_router_of_one_pass(tmp_path):
    _, folder = saved_xlora(tmp_path)
    config = MoELoraConfig(experts=xlora_experts(folder), train_experts=False, top_k=1, task_type="CAUSAL_LM")
    mixture = get_peft_model(tiny_model(), config)
    mixture.set_adapter("expert_1")
    alone = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter1")
    assert torch.equal(mixture.eval()(input_ids=IDS).logits, alone.eval()(input_ids=IDS).logits)


def test_another_folder_and_adapters_that_changed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="LORA.*X-LoRA"):
        xlora_experts(adapters(tmp_path)["0"])
    with pytest.raises(ValueError, match="holds no adapter, but must"):
        load_xlora(tiny_model(), tmp_path)
    _, folder = saved_xlora(tmp_path, use_trainable_adapters=True)
    with pytest.raises(ValueError, match="changed its adapters"):
        xlora_experts(folder)
