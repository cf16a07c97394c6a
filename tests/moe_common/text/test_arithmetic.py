"""The question generators of reasoning-gym, without its other families and what those need."""

import os
import subprocess
import sys
from random import Random

import pytest

from moe_common.runs.downloads import DownloadError
from moe_common.text import arithmetic
from moe_common.text.arithmetic import question_generators


def test_a_question_has_its_worked_answer():
    written = question_generators()[0](Random(0), 1.0)
    assert written["question"].startswith("Isabella can peel 4 mushrooms a minute")
    assert written["metadata"]["answer_cot"].endswith(f"#### {written['answer']}")


def test_the_same_seed_writes_the_same_question():
    for generator in question_generators().values():
        assert generator(Random(3), 1.0) == generator(Random(3), 1.0)


def test_no_module_is_left_under_the_name_of_the_package():
    program = (
        "import sys; from moe_common.text.arithmetic import question_generators; question_generators();"
        "print([name for name in sys.modules if name.startswith('reasoning_gym')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_wheel_that_changed_in_the_cache_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path))
    damaged = tmp_path / arithmetic.REASONING_GYM.cache_name
    damaged.write_bytes(b"something else")
    with pytest.raises(DownloadError, match=rf"{damaged} is not the file that was fetched\. Delete it"):
        question_generators.__wrapped__()
