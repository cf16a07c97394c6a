import torch
from multi_token_testing import make_model
from torch import nn

from moe_ext.multi_token.decoding.generation import generate
from moe_ext.multi_token.decoding.planning import FixedPlan
from moe_ext.multi_token.decoding.sources import HeadSource
from moe_ext.multi_token.model.vocabulary import draft_vocabulary, most_frequent


def test_the_most_frequent_tokens_are_taken_in_the_order_of_their_numbers():
    rows = [[3, 3, 3, -100, 7], [5, 5, 7, -100], [7, 0]]
    assert most_frequent(rows, 10, 3).tolist() == [3, 5, 7]
    assert most_frequent(rows, 10, 5).tolist() == [0, 1, 3, 5, 7]


def test_scores_are_the_lm_heads_own_for_the_tokens_that_are_drafted():
    torch.manual_seed(0)
    lm_head, states = nn.Linear(6, 9), torch.randn(4, 6)
    tokens = torch.tensor([1, 4, 8])
    vocabulary = draft_vocabulary(tokens, 9, lm_head, lm_head)
    torch.testing.assert_close(vocabulary.score(states), lm_head(states)[:, tokens])
    assert vocabulary.token_C.tolist() == [1, 4, 8, 9]  # OFF last
    assert vocabulary.classes(torch.tensor([8, 0, -100, 9, 1])).tolist() == [2, -100, -100, 3, 0]


def test_the_text_is_that_of_generate_whatever_heads_may_say():
    model = make_model(draft_vocabulary=5)
    model.draft_only(torch.tensor([3, 8, 13, 21, 34]))
    prompt = torch.tensor([[3, 4, 5, 6]])
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    decoding = generate(model, prompt, plan=FixedPlan(3), **asked)
    assert torch.equal(decoding.sequences, model.backbone.generate(prompt, **asked))
    assert decoding.report.sources["heads"].drafted[0] > 0


def test_a_head_drafts_the_likeliest_of_the_tokens_it_may():
    model = make_model(draft_vocabulary=5)
    allowed = torch.tensor([3, 8, 13, 21, 34])
    model.draft_only(allowed)
    states, text, mask = torch.randn(50, 1, 32), torch.full((50, 2), 4), torch.ones(50, 1)
    source = HeadSource(model)
    source.start(text[:, :1], mask)
    source.gates(states, text)
    drafted = source.write(text[:, 1], 1)[:, 0]
    with torch.no_grad():
        first = model.first_states(states, text, mask)[0][:, 0]
        logits = model.lm_head(model.heads.step(0, first, first, model.embed(text[:, 1])))
    assert torch.equal(drafted, allowed[logits[:, allowed].argmax(dim=-1)])


def test_a_target_that_is_not_drafted_is_wrong_and_teaches_the_heads_nothing():
    model = make_model(draft_vocabulary=3)
    model.draft_only(torch.tensor([5, 6, 7]))
    states = torch.randn(2, 32)
    nll, right, _ = model.read_windows(states, torch.tensor([[5, 9, 9, 9], [5, 6, 7, 5]]), 1.0)
    assert (nll[0] == 0).all() and not right[0].any()
    assert (nll[1] > 0).all()
