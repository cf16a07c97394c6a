"""Collecting: the batch size, padding and interruptions change nothing; memory is bounded; raw scores on request."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model

from moe_ext.router_study import ActivationCollector, MoEModelWrapper
from moe_ext.router_study.collect.collector import fingerprint
from moe_ext.router_study.collect.data import TokenRows
from moe_ext.router_study.collect.totals import totals_of
from moe_ext.router_study.collect.vocabulary_counts import VocabularyCounts
from moe_ext.router_study.metrics.coactivation import correlation_of_masks


def rows_of(num_rows, num_tokens=16, *, seed=0):
    ids = torch.randint(3, 64, (num_rows, num_tokens), generator=torch.Generator().manual_seed(seed))
    return TokenRows(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.fixture
def wrapper():
    return MoEModelWrapper(tiny_model("olmoe"))


@pytest.fixture
def text():
    return {"one": rows_of(7), "two": rows_of(5, seed=1)}


def held(activations):
    return {**activations.counts.tensors(), "vocabulary": activations.vocabulary.table_3LVE}


def assert_same(one, other):
    for name, tensor in held(one).items():
        torch.testing.assert_close(held(other)[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    for name, tensor in one.sample.tensors().items():
        torch.testing.assert_close(other.sample.tensors()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_batch_size_changes_nothing(wrapper, text, batch_size):
    collector = ActivationCollector(wrapper, num_groups=4, in_rank=True)
    assert_same(
        collector.collect_router_activations(text, batch_size=2),
        collector.collect_router_activations(text, batch_size=batch_size),
    )


def test_padding_on_either_side_changes_nothing(wrapper):
    plain, width = rows_of(4), 21
    right_ids, left_ids = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    right_mask, left_mask = torch.zeros(4, width, dtype=torch.bool), torch.zeros(4, width, dtype=torch.bool)
    right_ids[:, :16], right_mask[:, :16] = plain.ids_NS, True
    left_ids[:, -16:], left_mask[:, -16:] = plain.ids_NS, True
    collector = ActivationCollector(wrapper)
    expected = held(collector.collect_router_activations({"text": plain}))
    for ids, mask in ((right_ids, right_mask), (left_ids, left_mask)):
        found = held(collector.collect_router_activations({"text": TokenRows(ids, mask)}))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-4, msg=name)


def test_a_run_that_was_broken_off_goes_on_and_ends_the_same(wrapper, text, tmp_path, monkeypatch):
    collector = ActivationCollector(wrapper, num_groups=4)
    expected = collector.collect_router_activations(text, batch_size=2)
    run, passes = wrapper.run, []

    def breaks_off(*args):
        if len(passes) == 3:
            raise KeyboardInterrupt
        passes.append(args)
        return run(*args)

    monkeypatch.setattr(wrapper, "run", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        collector.collect_router_activations(text, batch_size=2, resume_folder=tmp_path / "kept")
    resumed = []
    monkeypatch.setattr(wrapper, "run", lambda *args: resumed.append(args) or run(*args))
    found = collector.collect_router_activations(text, batch_size=2, resume_folder=tmp_path / "kept")
    assert len(resumed) == 4 + 3 - 3
    assert_same(expected, found)


def test_a_batch_that_was_half_counted_is_counted_once(wrapper, text, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.router_study.collect.collector.SAVE_SECONDS", 0)
    collector = ActivationCollector(wrapper, num_groups=4)
    expected = collector.collect_router_activations(text, batch_size=2)
    add, batches = VocabularyCounts.add, []

    def breaks_off(counts, *batch):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(batch)
        add(counts, *batch)

    with monkeypatch.context() as broken:
        broken.setattr(VocabularyCounts, "add", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            collector.collect_router_activations(text, batch_size=2, resume_folder=tmp_path / "kept")
    assert_same(expected, collector.collect_router_activations(text, batch_size=2, resume_folder=tmp_path / "kept"))


def test_a_run_knows_its_text_and_its_weights_again(wrapper, text):
    known = fingerprint(wrapper, text)
    assert fingerprint(wrapper, text) == known
    other = fingerprint(wrapper, {"one": rows_of(7, seed=9), "two": text["two"]})
    assert (other["text"] == known["text"], other["weights"] == known["weights"]) == (False, True)
    with torch.no_grad():
        wrapper.gates.modules()[1].weight.add_(1)
    other = fingerprint(wrapper, text)
    assert (other["text"] == known["text"], other["weights"] == known["weights"]) == (True, False)


def test_raw_scores_are_written_one_file_a_batch(wrapper, text, tmp_path):
    collector = ActivationCollector(wrapper)
    activations = collector.collect_router_activations(text, batch_size=4, resume_folder=tmp_path, save_logits=True)
    files = sorted(tmp_path.glob("logits-*.safetensors"))
    assert len(files) == 4
    first = load_file(files[0])
    torch.testing.assert_close(first["logits"].transpose(0, 1), activations.sample.logits_RLSE[:4])
    assert torch.equal(first["chosen"].transpose(0, 1), activations.sample.chosen_RLSK[:4])
    assert torch.equal(first["ids"], text["one"].ids_NS[:4])


def test_the_sample_is_bounded_and_counts_are_of_all_tokens(wrapper):
    long = {"text": rows_of(80, 64)}
    bound = ActivationCollector(wrapper, sample_mb=1)
    bound_tokens = (1 << 20) // (2 * (4 * 4 + 2 * 2))
    activations = bound.collect_router_activations(long, batch_size=1)
    assert activations.sample_is_all  # it fits
    run_bytes = activations.sample.num_bytes(1, 2, 4, 2)
    assert bound_tokens == (1 << 20) // run_bytes
    import moe_ext.router_study.collect.collector as module

    small = module.MEBIBYTE
    try:
        module.MEBIBYTE = 64 * 10 * run_bytes  # room for ten rows
        some = ActivationCollector(wrapper, sample_mb=1, counts_mb=10**6).collect_router_activations(
            long, batch_size=1
        )
    finally:
        module.MEBIBYTE = small
    assert some.sample.num_tokens == 640
    assert int(some.counts.tokens_U.sum()) == 5120


def test_counts_that_do_not_fit_are_refused_with_their_size(wrapper, text, monkeypatch):
    monkeypatch.setattr("moe_ext.router_study.collect.collector.MEBIBYTE", 1024)
    with pytest.raises(ValueError, match=r"\b2 layers.*\b4 experts.*\b10 parts.*\b8 MiB.*counts_mb.*\b1\b"):
        ActivationCollector(wrapper, counts_mb=1).collect_router_activations(text)


def test_correlations_are_those_of_the_masks(wrapper, text):
    collector = ActivationCollector(wrapper)
    activations = collector.collect_router_activations(text)
    masks = activations.sample.routing(activations.gates).mask_LTE().permute(1, 0, 2).flatten(1).double()
    expected = torch.corrcoef(masks.T).nan_to_num(0)
    found = collector.compute_activation_correlations(activations)
    chosen = masks.sum(dim=0)
    varies = (chosen > 0) & (chosen < len(masks))
    torch.testing.assert_close(found[varies][:, varies], expected[varies][:, varies])
    assert torch.equal(found, correlation_of_masks(totals_of(activations.counts, 2)))


def test_no_text_and_no_batch_are_refused(wrapper, text):
    with pytest.raises(ValueError, match="no text to read"):
        ActivationCollector(wrapper).collect_router_activations({})
    with pytest.raises(ValueError, match=r"batch_size.*\b0\b"):
        ActivationCollector(wrapper).collect_router_activations(text, batch_size=0)
    with pytest.raises(ValueError, match=r"num_groups.*\b0\b"):
        ActivationCollector(wrapper, num_groups=0)
