import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_common.text.packing import IGNORED_LABEL
from moe_ext.multi_token.model.windows import window_targets

END, OFF = 1, 9


def one_window_at_a_time(labels, place, num_heads):
    """What follows a place, written out: a token, -100 where it is not known, OFF after an end."""
    following = [*labels[place + 1 :], *[IGNORED_LABEL] * (num_heads + 1)][: num_heads + 1]
    if following[0] == IGNORED_LABEL:
        return [IGNORED_LABEL] * (num_heads + 1)
    targets, ended = [], False
    for token in following:
        targets.append(OFF if ended else token)
        ended = ended or token == END
    return targets


TOKEN = st.sampled_from([END, 2, 3, 4, IGNORED_LABEL])


@given(rows=st.lists(st.lists(TOKEN, min_size=7, max_size=7), min_size=1, max_size=3), num_heads=st.integers(1, 9))
def test_windows_are_those_written_out_place_by_place(rows, num_heads):
    found = window_targets(torch.tensor(rows), num_heads=num_heads, end_ids=[END], off_id=OFF)
    expected = [[one_window_at_a_time(row, place, num_heads) for place in range(7)] for row in rows]
    assert found.tolist() == expected


def test_every_position_has_its_window_and_after_the_end_heads_are_off():
    found = window_targets(torch.tensor([[5, 6, 7, END]]), num_heads=2, end_ids=[END], off_id=OFF)
    unknown = [IGNORED_LABEL] * 3
    assert found.tolist() == [[[6, 7, END], [7, END, OFF], [END, OFF, OFF], unknown]]


def test_each_of_several_end_tokens_ends_a_text():
    found = window_targets(torch.tensor([[5, 8, 6, 6]]), num_heads=1, end_ids=[END, 8], off_id=OFF)
    assert found[0, 0].tolist() == [8, OFF]


def test_without_an_end_token_nothing_is_off():
    found = window_targets(torch.tensor([[5, END, 6, 6]]), num_heads=1, end_ids=[], off_id=OFF)
    assert found[0, 0].tolist() == [END, 6]
