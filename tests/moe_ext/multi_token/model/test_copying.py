import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.multi_token.model.copying import (
    LONGEST_KEY,
    LONGEST_MATCH,
    Copy,
    CopyIndex,
    copies_everywhere,
    judge_copies,
)


def searched(text, num_tokens):
    """The same by search: the longest key that stood before with something behind it, where it did so last."""
    for length in range(min(LONGEST_KEY, len(text) - 1), 0, -1):
        for place in range(len(text) - 1, length - 1, -1):
            if text[place - length : place] == text[-length:]:
                matched = length
                while matched < min(LONGEST_MATCH, place) and text[place - matched - 1] == text[-matched - 1]:
                    matched += 1
                going_on = list(text)
                for step in range(num_tokens):
                    going_on.append(going_on[place + step])
                return Copy(matched, going_on[len(text) :])
    return Copy(0, [])


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=60), cut=st.integers(0, 60))
def test_a_copy_is_what_a_search_of_the_text_finds(text, cut):
    index = CopyIndex(text[:cut])
    index.extend(text[cut:])
    assert index.copy(5) == searched(text, 5)


def test_a_text_that_turns_in_a_circle_is_copied_round():
    assert CopyIndex([9, 1, 2, 3, 1, 2, 3, 1]).copy(7) == Copy(4, [2, 3, 1, 2, 3, 1, 2])


def test_the_last_of_several_places_is_copied_from():
    assert CopyIndex([5, 1, 5, 2, 5]).copy(1) == Copy(1, [2])


def test_where_the_last_token_is_new_nothing_is_copied():
    assert CopyIndex([1, 2, 1, 3]).copy(4) == Copy(0, [])
    assert CopyIndex([]).copy(4) == Copy(0, [])


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_known_text_are_those_that_generation_would_have_made(seed):
    tokens = torch.randint(0, 4, (2, 20), generator=torch.Generator().manual_seed(seed))
    matched, copied = copies_everywhere(tokens, 3)
    for row in range(2):
        for place in range(19):
            copy = searched(tokens[row, : place + 2].tolist(), 3)
            assert matched[row, place] == copy.matched
            assert copied[row, place].tolist() == (copy.tokens or [-1, -1, -1])
    assert (copied[:, -1] == -1).all()


def test_copies_are_judged_up_to_the_first_that_is_wrong():
    labels = torch.tensor([[1, 2, 4, 9, 6, -100]])
    copied = torch.full((1, 6, 3), -1)
    copied[0, 0] = torch.tensor([4, 5, 6])  # of 4, 9, 6: right, wrong, not judged
    copied[0, 1] = torch.tensor([9, 6, 7])  # of 9, 6 and what is not learnt
    right, judged = judge_copies(copied, labels)
    assert right[0, 0, :2].tolist() == [True, False]
    assert right[0, 1, :2].tolist() == [True, True]
    assert judged[0].tolist() == [[True, True, False], [True, True, False], *[[False] * 3] * 4]
