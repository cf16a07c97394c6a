"""Saturation of constructed checkpoints with a known overlap, and the names of revisions."""

import pytest
import torch

from moe_common.runs.run_folder import RunFolder
from moe_ext.router_study.analysis.evolution import Choices, follow, overlap, saturation
from moe_ext.router_study.collect.revisions import Revision, hub_revisions, in_order, parse_revision, resolve_revision

L, R, S, K, E = 2, 6, 50, 4, 16


def choices(chosen):
    return Choices(chosen.to(torch.int16), torch.ones(R, S, dtype=torch.bool), E)


@pytest.fixture
def last():
    generator = torch.Generator().manual_seed(0)
    return choices(torch.rand(L, R, S, E, generator=generator).argsort(dim=-1)[..., :K])


def changed(last, kept):
    """A checkpoint that shares `kept` of each token's K experts with the last; the others are none of the last's."""
    chosen = last.chosen_LRSK.long()
    others = torch.ones(L, R, S, E).scatter(-1, chosen, 0.0).argsort(dim=-1, descending=True)[..., : K - kept]
    return choices(torch.cat([chosen[..., :kept], others], dim=-1))


@pytest.mark.parametrize("kept", range(K + 1))
def test_a_checkpoint_that_shares_some_experts_is_saturated_by_that_part(last, kept):
    found = saturation(changed(last, kept), last, replicates=20)
    assert found.chosen == pytest.approx([kept / K] * L)
    assert found.low == pytest.approx(found.chosen)
    assert found.high == pytest.approx(found.chosen)
    assert found.first == [1.0 if kept else 0.0] * L
    assert found.chance == K / E
    assert found.shuffled == pytest.approx([K / E] * L, abs=0.06)


def test_an_untrained_checkpoint_is_at_chance(last):
    generator = torch.Generator().manual_seed(7)
    random = choices(torch.rand(L, R, S, E, generator=generator).argsort(dim=-1)[..., :K])
    found = saturation(random, last)
    assert found.chosen == pytest.approx([K / E] * L, abs=0.06)
    assert all(low < value < high for low, value, high in zip(found.low, found.chosen, found.high, strict=True))


def test_the_order_of_a_tokens_choices_does_not_matter(last):
    turned = choices(last.chosen_LRSK.flip(-1))
    assert saturation(turned, last).chosen == [1.0] * L
    assert max(saturation(turned, last).first) == 0.0


def test_places_without_an_expert_are_no_part_of_a_set():
    one, other = torch.tensor([[[[0, 1, 16, 16]]]]), torch.tensor([[[[1, 2, 16, 16]]]])
    assert overlap(one, other, E).tolist() == [[[0.5]]]


def test_checkpoints_of_other_models_are_refused(last):
    with pytest.raises(ValueError, match=r"\b8 experts.*\[2, 6, 50, 4\].*\b16\b"):
        saturation(Choices(last.chosen_LRSK, last.mask_RS, 8), last)


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step5000-tokens20B", 5000, 20e9),
        ("step1220000-tokens5117B", 1220000, 5117e9),
        ("stage2-step30-tokens1.5T", 30, 1.5e12),
        ("checkpoint-500", 500, None),
        ("runs/moe/checkpoint-70", 70, None),
        ("tokens20B", None, 20e9),
        ("main", None, None),
    ],
)
def test_names_of_revisions_are_read_as_they_are(name, step, tokens):
    assert parse_revision(name) == Revision(name, step, tokens)


def test_revisions_are_ordered_by_number_and_main_is_last():
    names = ["main", "step120000-tokens503B", "step5000-tokens20B", "step490000-tokens2055B"]
    assert [revision.name for revision in in_order(names)] == [
        "step5000-tokens20B",
        "step120000-tokens503B",
        "step490000-tokens2055B",
        "main",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["main"], r"\b1 revision\b"),
        (["main", "final"], "main and final"),
        (["step1", "step1"], r"\bstep1\b.*twice"),
    ],
)
def test_revisions_that_cannot_be_compared_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        in_order(names)


def test_a_revision_is_a_folder_below_the_model_or_of_its_own(revisions_folder):
    below = str(revisions_folder / "step5-tokens1K")
    assert resolve_revision(revisions_folder, "step5-tokens1K") == (below, None)
    assert resolve_revision("small-moe", below) == (below, None)


def test_a_revision_that_is_not_there_is_refused_and_those_that_are_come_by_number(revisions_folder):
    with pytest.raises(ValueError, match="'step6'.*step5-tokens1K, step40-tokens8K, main"):
        resolve_revision(revisions_folder, "step6")


def test_revisions_of_the_hub_are_listed_in_order_and_a_missing_one_is_refused(monkeypatch):
    class Refs:
        branches = [Revision(name) for name in ("main", "step20-tokens1B", "step3-tokens1B")]
        tags = []

    monkeypatch.setattr("moe_ext.router_study.collect.revisions.list_repo_refs", lambda model: Refs)
    assert hub_revisions("owner/name") == ["step3-tokens1B", "step20-tokens1B", "main"]
    assert resolve_revision("owner/name", "step3-tokens1B") == ("owner/name", "step3-tokens1B")
    with pytest.raises(ValueError, match="'step4'.*step3-tokens1B, step20-tokens1B, main"):
        resolve_revision("owner/name", "step4")


def test_a_hub_that_cannot_be_reached_is_said():
    with pytest.raises(ValueError, match="'owner/name'.*hub"):
        resolve_revision("owner/name", "main")


def test_a_comparison_that_was_made_is_not_made_again(revisions_folder, tmp_path):
    from moe_ext.router_study import MoEModelWrapper
    from moe_ext.router_study.collect.data import TokenRows

    ids = torch.randint(3, 4000, (4, 16), generator=torch.Generator().manual_seed(0))
    rows, loaded = TokenRows(ids, torch.ones_like(ids, dtype=torch.bool)), []

    def load(name):
        loaded.append(name)
        return MoEModelWrapper.load(revisions_folder, revision=name)

    names = ["main", "step40-tokens8K", "step5-tokens1K"]
    with RunFolder(tmp_path, "evolution", {}) as run:
        found, labels = follow(names, load, lambda wrapper: rows, measured=run.measured, replicates=5)
    assert loaded == ["main", "step5-tokens1K", "step40-tokens8K"]
    assert [one.revision for one in found] == ["step5-tokens1K", "step40-tokens8K"]
    assert found[1].chosen == [1.0, 1.0]  # the same weights
    assert max(found[0].chosen) < 0.9
    assert labels == ["0", "1"]
    with RunFolder(tmp_path, "evolution", {}) as run:
        again, _ = follow(names, load, lambda wrapper: rows, measured=run.measured, replicates=5)
    assert again == found
    assert loaded[3:] == ["main"]
