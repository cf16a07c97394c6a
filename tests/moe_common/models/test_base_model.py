"""Base models by name, and that the committed one is what its report says."""

import json
import socket
import sys

import pytest
import torch

from moe_common.models import base_model
from moe_common.models.base_model import COMMITTED_FOLDER, load_base_model, resolve_model_name
from moe_common.models.perplexity import measure_texts
from moe_common.runs.allocator import keep_freed_memory
from moe_common.text.documents import load_documents

# Held-out perplexity of the first 16 validation blocks that the committed base must stay below. An untrained one is
# near 4096; the questions of math are of templates that no training document follows, which is why it is the hardest.
WORST_PERPLEXITY = {"prose": 33.0, "code": 11.0, "math": 60.0}
QUICK = "validation_perplexity_of_first_16_blocks"


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((COMMITTED_FOLDER / "training_report.json").read_text())


@pytest.fixture(scope="module")
def base():
    return load_base_model()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_committed_base_loads_without_a_network(no_network):
    model, tokenizer = load_base_model()
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == 4096


def test_model_and_tokenizer_agree_on_the_special_tokens(base):
    model, tokenizer = base
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_it_is_small_enough_to_commit():
    assert sum(path.stat().st_size for path in COMMITTED_FOLDER.iterdir()) < 12_200_000


@pytest.mark.parametrize("domain", ["prose", "code", "math"])
def test_the_held_out_perplexity_is_what_the_report_says(domain, base, report):
    keep_freed_memory()
    model, tokenizer = base
    texts = load_documents(domain, "validation")["text"]
    found = measure_texts(model, tokenizer, texts, block_size=512, max_blocks=16).perplexity
    assert found < WORST_PERPLEXITY[domain]
    # Code is the text of the Python at hand, so another version than the report's moves its figure.
    same_text = domain != "code" or report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found == pytest.approx(report[QUICK][domain], rel=0.01 if same_text else 0.4)


def test_the_report_says_how_it_was_made(report):
    assert report["parameters"] == 5_721_344
    assert report["tokens"] == report["steps"] * report["config"]["blocks_per_step"] * report["config"]["block_size"]
    assert sum(report["tokens_by_domain"].values()) == report["tokens"]
    assert report["minutes"] > 0
    for key in ("validation_perplexity", "test_perplexity"):
        assert all(1 < report[key][domain] < WORST_PERPLEXITY[domain] * 1.5 for domain in WORST_PERPLEXITY)


@pytest.mark.parametrize("domain", ["prose", "code", "math"])
def test_the_tokenizer_gives_every_text_back(domain, base):
    _, tokenizer = base
    for text in load_documents(domain, "validation")["text"][:20]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_cuts_numbers_into_digits_and_adds_nothing(base):
    _, tokenizer = base
    tokens = tokenizer("12345")["input_ids"]
    assert [tokenizer.decode([token]) for token in tokens] == list("12345")


def test_a_chat_is_laid_out_as_the_math_domain_is(base):
    _, tokenizer = base
    chat = [{"role": "user", "content": "What is 1 + 1?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "Question: What is 1 + 1?\nAnswer:"
    )
    answered = [*chat, {"role": "assistant", "content": "2"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == (
        "Question: What is 1 + 1?\nAnswer: 2<|endoftext|>"
    )


def test_a_folder_and_a_hub_name_pass_through(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_name(tmp_path) == str(tmp_path)
    assert resolve_model_name("owner/name") == "owner/name"


def test_smollm2_that_was_not_fetched_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="smollm2-135m.*make smollm2"):
        resolve_model_name("smollm2-135m")


def test_smollm2_that_was_fetched_is_found_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path))
    folder = base_model.smollm2_folder()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model_name("smollm2-135m") == str(folder)


def test_an_unknown_model_gives_the_closest_name():
    with pytest.raises(ValueError, match="'smollm2'.*'smollm2-135m'.*'base'"):
        resolve_model_name("smollm2")


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="folder.*/nowhere/at/all"):
        resolve_model_name("/nowhere/at/all")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json, so it holds no model"):
        resolve_model_name(tmp_path)


def test_the_dtype_that_is_asked_for_is_the_one_that_comes():
    assert load_base_model(dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_hub_model_that_cannot_be_read_is_one_line():
    with pytest.raises(ValueError, match=r"^The model 'owner/nowhere'.*folder\.$"):
        load_base_model("owner/nowhere")
