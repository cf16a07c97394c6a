"""Conversations: the loss is on the answers alone, and what is too long is left out or cut as asked."""

import pytest
from tiny_models import committed_tokenizer

from moe_common.text.instructions import encode_conversation, encode_examples, is_instruction, with_chat_template
from moe_common.text.packing import IGNORED_LABEL

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And three more?"},
    {"role": "assistant", "content": "Then it is 7."},
]
# A turn ends with its own mark, as ChatML's does.
MARKED = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Writes earlier answers differently once the conversation goes on.
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}{{ message['content'] }}|"
    "{% else %}...|{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    return committed_tokenizer()  # one of its own, for tests give it another template


@pytest.fixture
def bare_tokenizer(tokenizer):
    tokenizer.chat_template = None
    return tokenizer


def trained_text(tokenizer, labels) -> list[str]:
    """The text of each run of labels that count."""
    runs, current = [], []
    for label in [*labels, IGNORED_LABEL]:
        if label != IGNORED_LABEL:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def test_only_the_answers_are_labelled_with_what_ends_them(tokenizer):
    input_ids, labels = encode_conversation(CHAT, tokenizer)
    end = tokenizer.eos_token
    assert trained_text(tokenizer, labels) == [f" It is 4.{end}", f" Then it is 7.{end}"]
    assert tokenizer.decode(input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(input_ids, labels, strict=True))


def test_the_part_before_an_answer_is_tokenised_as_the_prompt_of_a_generation_is(tokenizer):
    input_ids, labels = encode_conversation(CHAT[:3], tokenizer)
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert input_ids[: len(prompt_ids)] == prompt_ids
    assert labels[: len(prompt_ids)] == [IGNORED_LABEL] * len(prompt_ids)
    assert labels[len(prompt_ids) :] == input_ids[len(prompt_ids) :]


def test_the_tokenizers_own_template_is_used(tokenizer):
    tokenizer.chat_template = MARKED
    input_ids, labels = encode_conversation(CHAT[1:3], tokenizer)
    assert tokenizer.decode(input_ids) == "<user>Two plus two?</>\n<assistant>It is 4.</>\n"
    assert trained_text(tokenizer, labels) == ["It is 4.</>\n"]


def test_without_a_template_the_default_is_used_and_the_tokenizer_stays_as_it_is(bare_tokenizer):
    input_ids, labels = encode_conversation(CHAT[1:3], with_chat_template(bare_tokenizer))
    end = bare_tokenizer.eos_token
    assert bare_tokenizer.decode(input_ids) == f"User: Two plus two?\nAssistant: It is 4.{end}\n"
    assert trained_text(bare_tokenizer, labels) == [f" It is 4.{end}\n"]
    assert bare_tokenizer.chat_template is None


def test_a_prompt_and_its_response_are_a_conversation_of_two(tokenizer):
    as_pair = encode_examples([{"prompt": "Two? ", "response": " 2"}], tokenizer, max_seq_length=99).rows
    chat = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    as_chat = encode_examples([{"messages": chat}], tokenizer, max_seq_length=99).rows
    assert as_pair[0] == as_chat[0]
    assert as_pair[0]["attention_mask"] == [1] * len(as_pair[0]["input_ids"])


def test_what_is_too_long_is_left_out_unless_it_is_to_be_kept(tokenizer):
    short, long = ({"prompt": "Count", "response": " ".join(["word"] * count)} for count in (3, 300))
    encoded = encode_examples([short, long], tokenizer, max_seq_length=32)
    assert (len(encoded.rows), encoded.num_truncated, encoded.num_left_out) == (1, 1, 1)
    kept = encode_examples([short, long], tokenizer, max_seq_length=32, keep_truncated=True)
    assert (len(kept.rows), kept.num_truncated, kept.num_left_out) == (2, 1, 0)
    whole = encode_examples([long], tokenizer, max_seq_length=1000).rows[0]
    assert {name: values[:32] for name, values in whole.items()} == kept.rows[1]
    trained = sum(label != IGNORED_LABEL for row in kept.rows for label in row["labels"])
    assert kept.num_trained_tokens == trained


def test_a_prompt_that_fills_the_row_leaves_nothing_to_learn_and_is_left_out_in_any_case(tokenizer):
    example = {"prompt": " ".join(["word"] * 300), "response": "yes"}
    kept = encode_examples([example], tokenizer, max_seq_length=32, keep_truncated=True)
    assert (len(kept.rows), kept.num_left_out) == (0, 1)


def test_an_answer_is_needed(tokenizer):
    with pytest.raises(ValueError, match=r"example 2\b.*'assistant'.*system, user"):
        encode_examples([{"messages": CHAT}, {"messages": CHAT[:2]}], tokenizer, max_seq_length=99)
    with pytest.raises(ValueError, match=r"^chats\.jsonl.*example 8\b.*'assistant'"):
        encode_examples([{"messages": CHAT[:2]}], tokenizer, max_seq_length=99, where=["chats.jsonl, example 8"])


def test_a_template_that_rewrites_what_it_wrote_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match=r"\b5 messages"):
        encode_conversation(CHAT, tokenizer)


def test_conversations_are_told_from_text_by_their_columns():
    assert is_instruction(["text", "messages"])
    assert is_instruction(["prompt", "response", "text"])
    assert not is_instruction(["text", "prompt"])
