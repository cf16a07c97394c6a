"""The three built-in domains: their splits are disjoint, stable, and what is held out is held out."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import zipfile

import pytest

from moe_common.runs.downloads import fetch
from moe_common.text.arithmetic import GSM_SYMBOLIC, REASONING_GYM, question_generators
from moe_common.text.domains import (
    DOMAINS,
    SPLITS,
    UNSOUND_GENERATORS,
    code_documents,
    split_of,
)


def digest(parts) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def documents():
    return {domain: {split: list(read(split)) for split in SPLITS} for domain, read in DOMAINS.items()}


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_document_is_in_two_splits(domain, documents):
    keys = [document["key"] for split in SPLITS for document in documents[domain][split]]
    assert len(keys) == len(set(keys)) > 0


@pytest.mark.parametrize("domain", ["prose", "math"])
def test_no_text_is_in_two_splits(domain, documents):
    texts = [document["text"] for split in SPLITS for document in documents[domain][split]]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_held_out_split_is_big_enough_to_measure_on_and_training_has_the_most(domain, documents):
    sizes = {split: sum(len(d["text"]) for d in documents[domain][split]) for split in SPLITS}
    assert min(sizes["validation"], sizes["test"]) > 150_000
    assert sizes["train"] > 3 * (sizes["validation"] + sizes["test"])
    assert sizes["pretraining"] > 1_000_000


def test_what_the_base_has_read_is_no_training_document_of_an_adapter(documents):
    for domain, parts in documents.items():
        read, new = ({document["text"] for document in parts[split]} for split in ("pretraining", "train"))
        # a few modules of the standard library have a twin of the same text
        assert len(read & new) <= (2 if domain == "code" else 0)


def test_prose_is_the_same_on_every_machine(documents):
    counts = [len(documents["prose"][split]) for split in SPLITS]
    assert counts == [5467, 3527, 508, 531]
    assert digest(d["key"] + d["text"] for d in documents["prose"]["validation"]) == "90d75a79ae52f135"


def test_math_is_the_same_on_every_machine(documents):
    assert digest(d["key"] + d["text"] for d in documents["math"]["validation"]) == "425b3c4e263b7e17"


def test_math_does_not_depend_on_the_hash_seed_of_the_process(documents):
    program = (
        "import hashlib; from moe_common.text.domains import math_documents;"
        "print(hashlib.sha256(''.join(d['text'] for d in math_documents('test')).encode()).hexdigest())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    here = hashlib.sha256("".join(d["text"] for d in documents["math"]["test"]).encode()).hexdigest()
    assert elsewhere.stdout.strip() == here


def test_a_modules_split_follows_from_its_path_alone():
    assert {key: split_of("code", key) for key in ("typing.py", "tarfile.py", "argparse.py", "asyncio/tasks.py")} == {
        "typing.py": "validation",
        "tarfile.py": "test",
        "argparse.py": "train",
        "asyncio/tasks.py": "pretraining",
    }


def test_whole_generators_are_held_out(documents):
    generators = {split: {d["key"].split("/")[0] for d in documents["math"][split]} for split in SPLITS}
    assert generators["validation"] == {"12", "13", "20", "22", "46", "55", "64", "70", "71", "89", "94"}
    assert generators["test"] == {"9", "26", "28", "34", "38", "43", "47", "60", "67", "69"}
    assert [len(generators[split]) for split in ("pretraining", "train")] == [10, 54]
    assert len(set.union(*generators.values())) == 85  # none is in two splits
    assert {str(number) for number in UNSOUND_GENERATORS}.isdisjoint(set.union(*generators.values()))


def test_the_unsound_generators_are_those_the_package_leaves_out():
    with zipfile.ZipFile(fetch(REASONING_GYM)) as archive:
        source = archive.read(f"{GSM_SYMBOLIC}/gsm_symbolic.py").decode()
    tasks_ok = ast.literal_eval(re.search(r"^tasks_ok = (\[.*?^\])", source, flags=re.M | re.S)[1])
    assert set(question_generators()) - set(tasks_ok) == UNSOUND_GENERATORS


def test_a_math_document_is_its_prompt_and_a_worked_answer(documents):
    for document in documents["math"]["validation"]:
        assert document["text"] == document["prompt"] + document["response"]
        assert document["prompt"].startswith("Question: ")
        assert document["prompt"].endswith("\nAnswer:")
        assert "\n#### " in document["response"]


def test_the_first_math_documents_show_every_generator(documents):
    first = documents["math"]["train"][:54]
    assert len({document["key"].split("/")[0] for document in first}) == 54


def test_code_is_programs_and_neither_tests_nor_tables(documents):
    keys = {document["key"] for split in SPLITS for document in documents["code"][split]}
    assert {"argparse.py", "asyncio/base_events.py", "json/decoder.py"} <= keys
    folders = {part for key in keys for part in key.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert not any(key.startswith("_sysconfigdata") for key in keys)


def test_code_is_read_from_the_folder_that_is_given(tmp_path):
    (tmp_path / "package" / "tests").mkdir(parents=True)
    program = "import os\n" * 50
    for name in ("argparse.py", "package/module.py", "package/tests/module.py"):
        (tmp_path / name).write_text(program)
    (tmp_path / "package" / "__init__.py").write_text("")
    found = [document for split in SPLITS for document in code_documents(split, tmp_path)]
    assert sorted(document["key"] for document in found) == ["argparse.py", "package/module.py"]
    assert found[0]["text"] == program
