import copy
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from moqe_testing import quantize_to
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_common.models.base_model import load_base_model
from moe_ext.moqe.experts.expert import load_expert
from moe_ext.moqe.experts.gguf_files import supported_architectures, write_gguf
from moe_ext.moqe.experts.tokenizer_contract import check_tokenizers
from moe_ext.moqe.mixture.model import MoQEModel
from moe_ext.router_ft.formats import pack, round_to_nearest, scales_of, scheme_json


@pytest.fixture(scope="module")
def plain(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval(), AutoTokenizer.from_pretrained(tiny_base)


@torch.no_grad()
def test_a_gguf_file_holds_the_model_and_its_tokenizer(plain, tmp_path, tokens):
    model, tokenizer = plain
    write_gguf(tmp_path / "whole.gguf", model, tokenizer, "f16")
    expert = load_expert(tmp_path / "whole.gguf")
    torch.testing.assert_close(expert.model(tokens).logits, model(tokens).logits, atol=2e-3, rtol=2e-3)
    check_tokenizers(("plain", tokenizer), ("gguf", expert.tokenizer))


def test_a_gguf_file_of_a_tokenizer_without_a_first_token_is_written(plain, tmp_path):
    model, tokenizer = plain[0], copy.deepcopy(plain[1])
    tokenizer.bos_token = None
    write_gguf(tmp_path / "whole.gguf", model, tokenizer, "f16")
    fields = pytest.importorskip("gguf").GGUFReader(tmp_path / "whole.gguf").fields
    assert int(fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == tokenizer.eos_token_id
    assert "tokenizer.ggml.bos_token_id" not in fields


@torch.no_grad()
def test_a_gguf_file_is_an_expert_beside_safetensors(tiny_base, tmp_path, tokens):
    gguf, folder = quantize_to(tmp_path, tiny_base, "f16,int4")
    assert gguf.name == "f16.gguf"
    model = MoQEModel.from_experts([gguf, folder])
    first, second = model.expert_set.experts
    torch.testing.assert_close(model(tokens).logits, (first.model(tokens).logits + second.model(tokens).logits) / 2)
    assert first.kind == "GGUF, unpacked"
    assert first.memory_bytes() == sum(p.numel() * 4 for p in first.parameters()) + rotary_bytes(first)


def test_a_gguf_of_an_unsupported_architecture_is_refused_with_those_that_are(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "rwkv9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'rwkv9'.*llama.*qwen3"):
        load_expert(tmp_path / "strange.gguf")
    assert "general" not in supported_architectures()


def test_a_gguf_without_some_weights_is_refused(plain, tmp_path):
    model, tokenizer = plain
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    lacking = types.SimpleNamespace(config=model.config, state_dict=lambda: state, _tied_weights_keys=None)
    write_gguf(tmp_path / "lacking.gguf", lacking, tokenizer, "f16")
    with pytest.raises(ValueError, match=r"\b3 weights.*model\.layers\.1\.mlp"):
        load_expert(tmp_path / "lacking.gguf")


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("no model at all, but more than a few bytes of text")
    with pytest.raises(ValueError, match="no GGUF file"):
        load_expert(tmp_path / "text.gguf")


def test_a_folder_without_some_weights_is_refused(tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    tensors = load_file(tiny_base / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"\b1 weights.*model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_expert(tmp_path)


def test_transformers_itself_does_not_take_a_packed_folder_for_a_model(expert_folders):
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(expert_folders[0])


def test_what_a_packed_expert_takes_is_written_beside_it(expert_folders):
    noted = json.loads((expert_folders[0] / "moqe_expert.json").read_text())
    expert = load_expert(expert_folders[0], dtype="bfloat16")
    assert noted["bits_per_packed_weight"] == 2 + 16 / 16
    assert expert.memory_bytes() - noted["packed_bytes"] - noted["other_bytes"] == rotary_bytes(expert)


def rotary_bytes(expert) -> int:
    return sum(buffer.nbytes for name, buffer in expert.model.named_buffers() if "inv_freq" in name)


@pytest.mark.parametrize("scheme", ["bnb8", "nf4"])
@torch.no_grad()
def test_an_expert_of_bitsandbytes_comes_back(tmp_path, scheme, tokens):
    (folder,) = quantize_to(tmp_path, "base", scheme)
    expert, plain = load_expert(folder, dtype="bfloat16"), load_expert("base", dtype="bfloat16")
    assert expert.kind == "bitsandbytes"
    ours, theirs = (e.model(tokens).logits.float().log_softmax(-1) for e in (expert, plain))
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 0.15  # nats: rounding, and nothing worse
    assert expert.memory_bytes() < 0.85 * plain.memory_bytes()


def test_llama_cpp_is_asked_for_by_its_extra(plain, tmp_path, monkeypatch):
    write_gguf(tmp_path / "whole.gguf", *plain, "f16")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ModuleNotFoundError, match=r"\.\[llama-cpp\]"):
        load_expert(tmp_path / "whole.gguf", gguf_backend="llama.cpp")


@torch.no_grad()
def test_llama_cpp_computes_an_expert_beside_one_of_transformers(plain, tmp_path, tokens, monkeypatch, expert_folders):
    model, tokenizer = plain
    write_gguf(tmp_path / "whole.gguf", model, tokenizer, "f16")

    class Llama:  # stands in for the library: the same calls, answered by transformers
        def __init__(self, **given):
            assert given["logits_all"]

        def n_vocab(self):
            return 4096

        def reset(self):
            self.scores = np.zeros((64, 4096), dtype=np.float32)

        def eval(self, ids):
            self.scores[: len(ids)] = model(torch.tensor([ids])).logits[0].numpy()

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    mixture = MoQEModel.from_experts([tmp_path / "whole.gguf", expert_folders[0]], gguf_backend="llama.cpp")
    other = mixture.expert_set.experts[1]
    expected = (model(tokens).logits + other.model(tokens).logits) / 2
    torch.testing.assert_close(mixture(tokens).logits, expected)
    with_caches = mixture.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(with_caches, mixture.generate(tokens[:1], max_new_tokens=4, do_sample=False, use_cache=False))


def test_packed_weights_take_less_resident_memory(tmp_path):
    """True bytes of a process: one layer of 64 MiB in float32 against its 2-bit codes."""
    program = """
import ctypes, gc, psutil, sys, torch
from moe_ext.moqe.experts.group_quant import GroupFormat, PackedLinear
def resident():
    gc.collect(); ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss
PackedLinear(64, 64, GroupFormat(bits=2))
before = resident()
kept = (torch.nn.Linear(4096, 4096, bias=False) if sys.argv[1] == "plain"
        else PackedLinear(4096, 4096, GroupFormat(bits=2, group_size=64)))
for tensor in (*kept.parameters(), *kept.buffers()):
    tensor.data.fill_(1)
print((resident() - before) / 2**20)
"""
    grown = {
        kind: float(subprocess.run([sys.executable, "-c", program, kind], capture_output=True, text=True).stdout)
        for kind in ("plain", "packed")
    }
    assert grown["plain"] > 60
    assert grown["packed"] < 9  # MiB: 4 of codes, 0.5 of scales, and what the process itself took meanwhile


@torch.no_grad()
def test_an_expert_of_compressed_tensors_comes_back(tmp_path, tokens):
    model, tokenizer = load_base_model()
    state, names = model.state_dict(), []
    for at, block in enumerate(model.model.layers):
        name, layer = f"model.layers.{at}.mlp.down_proj", block.mlp.down_proj
        rounded = round_to_nearest(layer.weight, "INT4")
        del state[f"{name}.weight"]
        parts = pack(rounded, scales_of(layer.weight, "INT4"), "INT4")
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        names.append(name)
        layer.weight.data = rounded
    del state["lm_head.weight"]
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"down": scheme_json("INT4", 672, names)},
        "ignore": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": scheme}))
    tokenizer.save_pretrained(tmp_path)
    expert = load_expert(tmp_path)
    assert expert.kind == "compressed-tensors, unpacked"
    torch.testing.assert_close(expert.model(tokens).logits.float(), model(tokens).logits, atol=0.05, rtol=0.05)
