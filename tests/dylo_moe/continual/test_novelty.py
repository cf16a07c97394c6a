"""The novelty detector: thresholds measured on held-out text, verdicts on text that is known and text that is not."""

import pytest
import torch

from dylo_moe.continual.data import spread
from dylo_moe.continual.novelty import NoveltyDetector, batch_means
from dylo_moe.skills import SkillLibrary, embed_blocks, measure_background
from moe_common.models.base_model import load_base_model
from moe_common.text.documents import load_documents
from moe_common.text.packing import pack_documents


def cloud(direction: list[float], count: int, *, seed: int, noise: float = 0.3) -> torch.Tensor:
    """Blocks scattered around a direction."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(direction) + noise * torch.randn(count, len(direction), generator=generator)


RAIN, SUN, BETWEEN = [1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 1.0, 0, 0]


@pytest.fixture
def detector():
    library = SkillLibrary()
    detector = NoveltyDetector(library)
    for seed, (name, direction) in enumerate({"rain": RAIN, "sun": SUN}.items()):
        library.add(name, cloud(direction, 32, seed=seed))
        detector.calibrate(name, cloud(direction, 64, seed=seed + 10))
    return detector


def test_a_threshold_lies_as_far_below_the_quantile_as_margin_says():
    library = SkillLibrary()
    library.add("rain", cloud(RAIN, 32, seed=0))
    held_out = cloud(RAIN, 64, seed=1)
    measured = sorted(library.similarity("rain", batch) for batch in batch_means(held_out))
    assert len(measured) == 8
    for margin in (0.0, 1.0, 2.5):
        threshold = NoveltyDetector(library, quantile=0.0, margin=margin).calibrate("rain", held_out)
        assert threshold == pytest.approx(measured[0] - margin * (1 - measured[0]))
        assert library["rain"].threshold == threshold
    middle = NoveltyDetector(library, quantile=0.5, margin=0.0).calibrate("rain", held_out)
    assert middle == pytest.approx((measured[3] + measured[4]) / 2)


def test_new_text_of_a_known_skill_is_known_and_the_skill_is_named(detector):
    for seed, (name, direction) in enumerate({"rain": RAIN, "sun": SUN}.items()):
        verdict = detector.judge(cloud(direction, 16, seed=seed + 20))
        assert not verdict.is_novel
        assert verdict.nearest == name == next(iter(verdict.similarities))
        assert verdict.similarity >= verdict.threshold == detector.library[name].threshold


def test_text_of_another_kind_is_novel_and_the_nearest_skill_is_named(detector):
    verdict = detector.judge(cloud(BETWEEN, 16, seed=30))
    assert verdict.is_novel and verdict.nearest in ("rain", "sun")
    assert verdict.similarity < verdict.threshold


def test_to_an_empty_library_everything_is_novel():
    verdict = NoveltyDetector(SkillLibrary()).judge(cloud(RAIN, 8, seed=0))
    assert verdict.is_novel and verdict.nearest is None and verdict.similarities == {}


def test_batches_are_of_blocks_that_lie_far_apart():
    blocks = torch.arange(20.0)[:, None]
    assert [batch.item() for batch in batch_means(blocks)] == [7.0, 8.0]  # 0, 2, ... 14 and 1, 3, ... 15


def test_too_few_blocks_are_refused(detector):
    with pytest.raises(ValueError, match=r"'rain'.*\b31\b.*\b32\b"):
        detector.calibrate("rain", cloud(RAIN, 31, seed=0))
    with pytest.raises(ValueError, match=r"\b7 blocks.*\b8\b"):
        detector.judge(cloud(RAIN, 7, seed=0))
    with pytest.raises(ValueError, match="'snow'"):
        detector.calibrate("snow", cloud(RAIN, 32, seed=0))


def test_a_skill_that_was_never_calibrated_is_refused(detector):
    detector.library.add("snow", cloud(BETWEEN, 8, seed=0))
    with pytest.raises(ValueError, match=r"threshold.*\bsnow\b"):
        detector.judge(cloud(RAIN, 8, seed=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"quantile": 1.5}, r"quantile.*\b1\.5\b"), ({"margin": -1}, r"margin.*-1\b")],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoveltyDetector(SkillLibrary(), **arguments)


def test_the_three_domains_are_told_apart_by_the_committed_base():
    base, tokenizer = load_base_model()

    def embed(domain, split, count):
        texts = load_documents(domain, split)["text"][: {"prose": 200, "code": 30, "math": 100}[domain]]
        blocks = pack_documents(texts, tokenizer, block_size=128, keep_remainder=False)
        return embed_blocks(base, spread(blocks, count), batch_size=16)

    detector = NoveltyDetector(SkillLibrary(measure_background(base)))
    for domain in ("prose", "code", "math"):
        verdict = detector.judge(embed(domain, "train", 16))
        assert verdict.is_novel, f"{domain} was taken for {verdict.nearest}"
        detector.library.add(domain, embed(domain, "train", 16))
        detector.calibrate(domain, embed(domain, "validation", 32))
    for domain in ("prose", "code", "math"):
        verdict = detector.judge(embed(domain, "test", 16))
        assert not verdict.is_novel and verdict.nearest == domain
