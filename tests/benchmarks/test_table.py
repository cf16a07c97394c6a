import re
from pathlib import Path

import pytest
import torch

from benchmarks.models import SIZES, Setting, make_base
from benchmarks.table import RANK, as_markdown, speed_table

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


@pytest.fixture(scope="module")
def rows():
    return speed_table(lambda: make_base(Setting(size=SIZES["tiny"])), num_tokens=8, rounds=2)


def test_the_table_has_the_ways_a_user_can_choose_from(rows):
    assert [row.way for row in rows] == [
        "base model",
        "one LoRA of rank 16",
        "one LoRA of rank 64",
        "routed, top-2 of 4",
        "4 separate passes",
        "one LoRA of rank 128",
        "routed, top-2 of 8",
        "8 separate passes",
        "X-LoRA, 4 adapters",
    ]


def test_every_ratio_stands_beside_its_operations(rows):
    base, one_lora = rows[:2]
    assert base.forward.median == base.forward_flops == 1
    assert base.training is None
    assert one_lora.training.median == one_lora.training_flops == 1
    assert all(row.forward.median > 0 and row.forward_flops > 1 for row in rows[1:])
    passes = next(row for row in rows if row.way == "4 separate passes")
    assert passes.forward_flops == pytest.approx(4 * one_lora.forward_flops)
    assert passes.training_flops == pytest.approx(4)


def test_the_markdown_has_a_line_for_each_row(rows):
    lines = as_markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {6}
    assert f"rank {RANK}" in lines[0]


def test_too_few_tokens_or_rounds_are_refused_before_the_model_is_made():
    with pytest.raises(ValueError, match=r"num_tokens.*\b8\b.*rounds.*\b1\b"):
        speed_table(lambda: pytest.fail("the model was made"), num_tokens=8, rounds=1)


def test_the_snippet_of_the_page_prints_a_table(capsys):
    torch.manual_seed(0)
    snippet = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    exec(compile(snippet, str(PAGE), "exec"), {})
    assert "X-LoRA" in capsys.readouterr().out
