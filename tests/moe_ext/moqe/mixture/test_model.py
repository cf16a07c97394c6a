import pytest
import torch
from moqe_testing import quantize_to
from tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

from moe_ext.moqe.experts.expert import load_expert
from moe_ext.moqe.mixture.expert_set import ExpertSet
from moe_ext.moqe.mixture.model import MoQEModel


def logits_one_expert_after_the_other(model, tokens, mask=None):  # oracle: whole models, mixed by hand
    weights = model.routing_weights(tokens, torch.ones_like(tokens) if mask is None else mask)
    logits = torch.stack([e.model(tokens, attention_mask=mask).logits for e in model.expert_set.experts])
    return torch.einsum("ble,eblv->blv", weights, logits)


@torch.no_grad()
def test_the_logits_are_the_weighted_mean_of_the_experts_logits(mixture, tokens):
    expected = logits_one_expert_after_the_other(mixture, tokens)
    torch.testing.assert_close(mixture(tokens).logits, expected)
    assert not torch.allclose(mixture.routing_weights(tokens, torch.ones_like(tokens)), torch.tensor(0.5), atol=0.05)


@torch.no_grad()
def test_mixing_log_probabilities_is_the_same_function(mixture, tokens):
    weights = mixture.routing_weights(tokens, torch.ones_like(tokens))
    logs = torch.stack([e.model(tokens).logits.log_softmax(-1) for e in mixture.expert_set.experts])
    expected = torch.einsum("ble,eblv->blv", weights, logs).log_softmax(-1)
    torch.testing.assert_close(mixture(tokens).logits.log_softmax(-1), expected)


@torch.no_grad()
def test_one_head_does_for_all_where_it_is_shared(mixture, tokens):
    assert mixture.expert_set.shares_head
    shared = mixture(tokens).logits
    mixture.expert_set.shares_head = False
    torch.testing.assert_close(mixture(tokens).logits, shared)


def test_experts_of_one_model_share_its_embedding(mixture):
    first, second = mixture.expert_set.experts
    assert mixture.expert_set.shares_embedding
    assert first.embedding.weight.data_ptr() == second.embedding.weight.data_ptr()
    shared = first.embedding.weight.nbytes + first.head.weight.nbytes
    assert mixture.expert_set.memory_bytes() == first.memory_bytes() + second.memory_bytes() - shared


@torch.no_grad()
def test_experts_of_other_widths_keep_their_embeddings(expert_folders, tokenizer, tmp_path, tokens):
    padded = len(tokenizer) + 32  # cut to the real tokens
    tiny_folder(tmp_path / "narrow", seed=1, hidden_size=16, num_hidden_layers=1, vocab_size=padded)
    model = MoQEModel.from_experts([expert_folders[0], tmp_path / "narrow"])
    assert not model.expert_set.shares_embedding
    first, second = (expert.model(tokens).logits for expert in model.expert_set.experts)
    torch.testing.assert_close(model(tokens).logits, (first + second[..., : len(tokenizer)]) / 2)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_generation_with_the_caches_is_that_without(mixture, tokens, mode):
    mixture.router.config.mode = mode
    mixture.router.config.prefix_length = 4
    cached = mixture.generate(tokens, max_new_tokens=8, do_sample=False)
    plain = mixture.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=False)
    assert cached.shape[1] > tokens.shape[1]
    assert torch.equal(cached, plain)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_prompts_of_several_lengths_go_on_as_each_alone(mixture, tokens, mode):
    mixture.router.config.mode = mode
    mixture.router.config.prefix_length = 4
    mask = torch.ones_like(tokens)
    tokens[1, :5], mask[1, :5] = 1, 0
    together = mixture.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = mixture.generate(tokens[1:2, 5:], max_new_tokens=6, do_sample=False)
    assert torch.equal(together[1, 10:], alone[0, 5:])


@torch.no_grad()
def test_beams_follow_the_caches(mixture, tokens):
    cached = mixture.generate(tokens, max_new_tokens=5, do_sample=False, num_beams=2)
    plain = mixture.generate(tokens, max_new_tokens=5, do_sample=False, num_beams=2, use_cache=False)
    assert torch.equal(cached, plain)


def test_beams_in_sequence_mode_are_refused(mixture, tokens):
    mixture.router.config.mode = "sequence"
    with pytest.raises(ValueError, match="num_beams=1"):
        mixture.generate(tokens, max_new_tokens=3, do_sample=False, num_beams=2)


@torch.no_grad()
def test_in_sequence_mode_the_chosen_expert_alone_runs(mixture, tokens, monkeypatch):
    mixture.router.config.mode = "sequence"
    mixture.router.score.weight.zero_()
    mixture.router.score.bias.copy_(torch.tensor([0.0, 9.0]))
    first, second = mixture.expert_set.experts
    monkeypatch.setattr(first, "states", lambda *_: pytest.fail("an expert ran that was not chosen"))
    torch.testing.assert_close(mixture(tokens).logits, second.model(tokens).logits)
    mixture.generate(tokens, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_each_row_may_choose_another_expert(mixture, tokens, monkeypatch):
    mixture.router.config.mode = "sequence"
    monkeypatch.setattr(mixture.router, "choice", lambda scores, mask: torch.tensor([1, 0, 1]))
    logits = mixture(tokens).logits
    for row, expert in enumerate((1, 0, 1)):
        expected = mixture.expert_set.experts[expert].model(tokens[[row]]).logits[0]
        torch.testing.assert_close(logits[row], expected)


@torch.no_grad()
def test_the_loss_is_that_of_the_next_tokens(mixture, tokens):
    outputs = mixture(tokens, labels=tokens)
    chosen = outputs.logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(outputs.loss, -chosen.mean())


@torch.no_grad()
def test_what_was_saved_comes_back(mixture, tokens, tmp_path):
    mixture.static_weights, mixture.default_expert = [0.25, 0.75], 1
    mixture.save_pretrained(tmp_path / "saved")
    loaded = MoQEModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, mixture(tokens).logits)
    assert (loaded.static_weights, loaded.default_expert) == ([0.25, 0.75], 1)


def test_a_mixture_is_not_read_onto_other_experts(mixture, expert_folders, tmp_path):
    mixture.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"int2, int3\b.*int2, int4\b"):
        MoQEModel.from_pretrained(tmp_path / "saved", [expert_folders[0], expert_folders[2]])


def test_one_expert_is_no_mixture(expert_folders):
    with pytest.raises(ValueError, match=r"\b1 was"):
        MoQEModel.from_experts(expert_folders[:1])


def test_nothing_of_the_experts_is_trained(mixture, tokens):
    trained = sum(p.numel() for p in mixture.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in mixture.router.parameters())
    mixture.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is None for expert in mixture.expert_set.experts for p in expert.parameters())
    assert mixture.router.score.weight.grad.abs().sum() > 0


def test_experts_of_one_name_are_told_apart(tiny_base, tmp_path):
    folders = [quantize_to(tmp_path / part, tiny_base, scheme)[0] for part, scheme in (("a", "int2"), ("b", "int2"))]
    experts = ExpertSet([load_expert(folder) for folder in folders])
    assert experts.names == ["int2", "int2 (2)"]


@torch.no_grad()
def test_a_packed_expert_is_close_to_the_model_it_was_made_of(tiny_base, tmp_path, tokens):
    (folder,) = quantize_to(tmp_path, tiny_base, "int8")
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)(tokens).logits
    found = load_expert(folder).model(tokens).logits
    assert (found - plain).abs().max() < 0.02 * plain.abs().max()
