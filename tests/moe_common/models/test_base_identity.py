"""Telling bases apart: by their measures and by a few of their weights, not by their names."""

import json

import pytest
import torch
from tiny_models import tiny_model

from moe_common.models.base_identity import BaseIdentity


def test_it_comes_back_from_json_as_it_was():
    identity = BaseIdentity.of(tiny_model(), "somewhere")
    again = BaseIdentity.from_dict(json.loads(json.dumps(identity.to_dict())))
    assert again == identity and again.name == "somewhere"


def test_the_same_base_under_another_name_or_rounded_is_the_same():
    identity = BaseIdentity.of(tiny_model(), "here")
    identity.check_is(BaseIdentity.of(tiny_model(), "there"))
    identity.check_is(BaseIdentity.of(tiny_model().bfloat16(), "there"))
    BaseIdentity.of(tiny_model().bfloat16(), "here").check_is(BaseIdentity.of(tiny_model(), "there"))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda: tiny_model(num_hidden_layers=3), "num_layers 2 against 3"),
        (lambda: tiny_model(vocab_size=70), "vocab_size 64 against 70"),
        (lambda: tiny_model(hidden_size=64), "hidden_size 32 against 64"),
        (lambda: tiny_model(seed=1), "its weights"),
    ],
)
def test_another_base_is_refused_with_both_names_and_the_difference(other, difference):
    with pytest.raises(ValueError, match=f"'here'.*'there'.*{difference}"):
        BaseIdentity.of(tiny_model(), "here").check_is(BaseIdentity.of(other(), "there"))


def test_an_embedding_that_is_no_number_to_compare_is_left_out():
    base = tiny_model()
    base.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    assert BaseIdentity.of(base).samples == ()
    BaseIdentity.of(base, "here").check_is(BaseIdentity.of(tiny_model(), "there"))
