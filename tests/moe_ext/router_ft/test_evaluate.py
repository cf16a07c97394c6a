"""Losses block by block are those that the shared measure sums up; tasks run from a local folder."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from moe_common.models.perplexity import measure_blocks
from moe_ext.router_ft.evaluate import HeldOut, block_losses, evaluate_tasks, losses_by_source, summary

BLOCKS = torch.randint(3, 64, (5, 20), generator=torch.Generator().manual_seed(0))


def test_the_losses_of_all_blocks_sum_up_to_the_shared_measure(model_of):
    model = model_of("olmoe")
    rows = {
        "input_ids": BLOCKS.tolist(),
        "attention_mask": torch.ones_like(BLOCKS).tolist(),
        "labels": BLOCKS.tolist(),
    }
    expected = measure_blocks(model, Dataset.from_dict(rows))
    losses = block_losses(model, BLOCKS, batch_size=2)
    assert losses.shape == (5,)
    assert losses.mean() == pytest.approx(expected.mean_nll, rel=1e-5)


def test_held_out_text_is_the_first_blocks_of_each_source(tiny_sources, tokenizer, tiny_folder):
    sources = tiny_sources.split(",")
    held_out = HeldOut.read(sources, "test", tokenizer, block_size=16, max_blocks=3)
    assert {source: blocks.shape for source, blocks in held_out.blocks.items()} == dict.fromkeys(sources, (3, 16))


def test_a_source_shorter_than_a_block_is_refused(tiny_sources, tokenizer):
    with pytest.raises(ValueError, match=r"\b5000 tokens.*'test'"):
        HeldOut.read(tiny_sources.split(","), "test", tokenizer, block_size=5000)


def test_a_summary_gives_perplexity_by_source_and_the_mean_loss(model_of):
    found = losses_by_source(model_of("olmoe"), HeldOut({"a": BLOCKS[:2], "b": BLOCKS[2:]}))
    told = summary(found)
    assert told["perplexity"]["a"] == pytest.approx(np.exp(found["a"].mean()), abs=1e-4)
    assert told["loss"] == pytest.approx((found["a"].mean() + found["b"].mean()) / 2, abs=1e-5)
    assert told["blocks"] == {"a": 2, "b": 3}


def test_a_task_runs_from_a_local_folder(tmp_path, tiny_folder):
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    from moe_ext.moe_models import load_moe

    rows = [{"question": f"{n} and one is", "choices": [str(n + 1), str(n + 5)], "answer": 0} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(
        "task: tiny_sums\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    found = evaluate_tasks(*load_moe(tiny_folder), ["tiny_sums"], tasks_dir=tmp_path)
    assert 0 <= found["tiny_sums"]["acc"] <= 1
    with pytest.raises(ValueError, match="tiny_products"):
        evaluate_tasks(*load_moe(tiny_folder), ["tiny_products"], tasks_dir=tmp_path)
