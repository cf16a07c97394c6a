"""A report's numbers, and tasks of lm-eval on a mixture from a local folder."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from moe_common.models.lm_eval_tasks import find_tasks, run_tasks
from moe_common.models.perplexity import measure_blocks
from moe_ext.router_ft.evaluate import losses_by_source, summary


def blocks_of(count: int, seed: int) -> Dataset:
    tokens = torch.randint(3, 64, (count, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * 20] * count, "labels": tokens})


def test_the_losses_of_all_blocks_have_the_mean_of_the_shared_measure(model_of):
    model, blocks = model_of("olmoe"), blocks_of(5, seed=0)
    losses = losses_by_source(model, {"a": blocks}, batch_size=2)["a"]
    assert losses.shape == (5,)
    assert losses.mean() == pytest.approx(measure_blocks(model, blocks).mean_nll, rel=1e-6)  # batches of 2 and of 5


def test_a_summary_gives_perplexity_by_source_and_the_mean_loss(model_of):
    found = losses_by_source(model_of("olmoe"), {"a": blocks_of(2, seed=0), "b": blocks_of(3, seed=1)})
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
    manager = find_tasks(["tiny_sums"], include_path=str(tmp_path))
    found = run_tasks(*load_moe(tiny_folder), ["tiny_sums"], manager, limit=None, batch_size=8)
    assert 0 <= found["tiny_sums"]["acc,none"] <= 1
