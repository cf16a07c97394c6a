"""A base model and text that are small enough to train in a test."""

import json

import pytest
from tiny_models import committed_tokenizer, tiny_folder

TEXTS = {
    "rain": "rain falls on the hills and runs to the sea again and again",
    "code": "def f(x):\n    return x + 1  # one more, and one more",
}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a random model with the committed tokenizer: quick, and good enough to run through."""
    return tiny_folder(tmp_path_factory.mktemp("tiny_base"))


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the committed base model; a test that changes one loads its own."""
    return committed_tokenizer()


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory):
    """Two folders of plain text with their splits, comma separated as `--datasets` takes them."""
    folder = tmp_path_factory.mktemp("text")
    for name, text in TEXTS.items():
        for split, count in {"train": 60, "validation": 6, "test": 6}.items():
            (folder / name).mkdir(exist_ok=True)
            rows = [json.dumps({"text": f"{split} {i} {text}"}) for i in range(count)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows))
    return ",".join(str(folder / name) for name in TEXTS)


@pytest.fixture(scope="session")
def tiny_chats(tmp_path_factory):
    """A folder of prompts and responses with their splits; every fifth answer is longer than 64 tokens."""
    folder = tmp_path_factory.mktemp("chats")
    for split, count in {"train": 40, "validation": 10, "test": 10}.items():
        rows = [
            {"prompt": f"What is {i} plus one?", "response": f"It is {i + 1}." + " Surely so." * (40 * (i % 5 == 0))}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_options(tiny_base, tiny_sources):
    """A function that writes the command line of a run of a few seconds, with `output_dir` and what is changed."""

    def command_line(output_dir, **changed) -> list[str]:
        chosen = {
            "model_name": tiny_base,
            "datasets": tiny_sources,
            "output_dir": output_dir,
            "num_experts": 3,
            "lora_r": 2,
            "num_steps": 4,
            "train_batch_size": 2,
            "max_seq_length": 16,
            "save_steps": 2,
            "eval_blocks": 3,
            "bf16": False,
            **changed,
        }
        return [f"--{name}={value}" for name, value in chosen.items() if value is not None]

    return command_line
