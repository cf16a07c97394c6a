"""The skill library: embeddings that leave padding and adapters out, what it keeps on disk, and what it refuses."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_models import tiny_mixture, tiny_model, tokens

from dylo_moe.skills import SkillLibrary, embed_blocks, measure_background


def blocks_of(ids, mask=None) -> Dataset:
    mask = torch.ones_like(ids) if mask is None else mask
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})


@torch.no_grad()
def test_an_embedding_is_the_mean_of_the_last_hidden_states():
    base, ids = tiny_model(), tokens(5, 9)
    states = base(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(embed_blocks(base, blocks_of(ids), batch_size=2), states.mean(dim=1))


def test_padding_is_left_out_of_an_embedding():
    base, ids = tiny_model(), tokens(2, 6)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 3] * 2)
    torch.testing.assert_close(embed_blocks(base, blocks_of(padded, mask)), embed_blocks(base, blocks_of(ids)))


def test_an_embedding_is_the_bases_whatever_its_experts_have_learnt():
    blocks = blocks_of(tokens(3, 9))
    model = tiny_mixture().train()
    assert torch.equal(embed_blocks(model, blocks), embed_blocks(tiny_model(), blocks))
    assert model.training
    with torch.no_grad():
        model.eval()(tokens(2, 9))
    assert model.last_routing_weights is not None  # the adapters are on again


def test_the_background_is_the_same_each_time_and_has_a_spread():
    base = tiny_model()
    background_2H = measure_background(base)
    assert background_2H.shape == (2, 32) and (background_2H[1] > 0).all()
    assert torch.equal(background_2H, measure_background(tiny_mixture()))
    assert not torch.equal(background_2H, measure_background(base, seed=1))


def test_a_block_of_padding_alone_has_no_embedding():
    ids = tokens(2, 4)
    with pytest.raises(ValueError, match="nothing but padding"):
        embed_blocks(tiny_model(), blocks_of(ids, torch.tensor([[1] * 4, [0] * 4])))
    with pytest.raises(ValueError, match="no block to embed"):
        embed_blocks(tiny_model(), blocks_of(ids).select([]))


def test_similarity_is_the_cosine_seen_against_the_background():
    generator = torch.Generator().manual_seed(0)
    mean, deviation, one, other = torch.rand(4, 6, generator=generator)
    library = SkillLibrary(torch.stack([mean, deviation]))
    library.add("rain", one[None])
    a, b = [((x - mean) / deviation).tolist() for x in (one, other)]
    product = sum(p * q for p, q in zip(a, b, strict=True))
    by_hand = product / (sum(p * p for p in a) * sum(q * q for q in b)) ** 0.5
    assert library.similarity("rain", other) == pytest.approx(by_hand, abs=1e-6)
    assert library.similarity("rain", one) == pytest.approx(1)


def test_a_common_part_of_all_embeddings_does_not_make_them_alike():
    common, deviation = torch.tensor([100.0, 0, 0, 0]), torch.ones(4)
    rain, sun = common + torch.tensor([0, 1.0, 0, 0]), common + torch.tensor([0, 0, 1.0, 0])
    plain, seen = SkillLibrary(), SkillLibrary(torch.stack([common, deviation]))
    for library in (plain, seen):
        library.add("rain", rain[None])
    assert plain.similarity("rain", sun) > 0.999
    assert seen.similarity("rain", sun) == pytest.approx(0)


def test_similarities_name_the_nearest_first():
    library = SkillLibrary()
    library.add("rain", torch.tensor([[1.0, 0.0]]))
    library.add("sun", torch.tensor([[0.0, 1.0]]))
    assert list(library.similarities(torch.tensor([0.1, 0.9]))) == ["sun", "rain"]


def test_updating_is_the_mean_over_all_blocks():
    blocks = torch.rand(7, 4)
    library = SkillLibrary()
    library.add("rain", blocks[:3], expert="expert_1")
    library.update("rain", blocks[3:])
    torch.testing.assert_close(library.embedding("rain"), blocks.mean(dim=0))
    assert (library["rain"].num_blocks, library["rain"].expert) == (7, "expert_1")


def test_a_removed_skill_is_gone():
    library = SkillLibrary()
    library.add("rain", torch.rand(1, 4))
    library.add("sun", torch.rand(1, 4))
    library.remove("rain")
    assert library.names == ["sun"] and "rain" not in library and len(library) == 1


def full_library() -> SkillLibrary:
    library = SkillLibrary(torch.rand(2, 4))
    for name in ("sun", "rain", "a/folder with space"):
        library.add(name, torch.rand(2, 4), expert=f"expert of {name}")
    library["rain"].threshold = 0.75
    return library


def test_saving_and_loading_is_the_identity(tmp_path):
    library = full_library()
    library.save(tmp_path)
    loaded = SkillLibrary.load(tmp_path)
    assert list(loaded) == list(library)
    assert torch.equal(loaded.background_2H, library.background_2H)
    assert all(torch.equal(loaded.embedding(name), library.embedding(name)) for name in library.names)
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_without_a_library_gives_an_empty_one(tmp_path):
    assert len(SkillLibrary.load(tmp_path)) == 0


@pytest.mark.parametrize("size", [0, 5, 40, 100])
def test_a_cut_off_tensor_file_is_refused(tmp_path, size):
    full_library().save(tmp_path)
    file = tmp_path / "skills.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"skills\.safetensors.*damaged"):
        SkillLibrary.load(tmp_path)


@pytest.mark.parametrize("text", ["", '{"format": 1, "ski', "[]", '{"format": 1}', '{"skills": [{"nam": 1}]}'])
def test_a_damaged_list_is_refused(tmp_path, text):
    full_library().save(tmp_path)
    (tmp_path / "skills.json").write_text(text)
    with pytest.raises(ValueError, match=r"skills\.json.*damaged"):
        SkillLibrary.load(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    full_library().save(tmp_path)
    listed = json.loads((tmp_path / "skills.json").read_text())
    (tmp_path / "skills.json").write_text(json.dumps({**listed, "skills": listed["skills"][:2]}))
    with pytest.raises(ValueError, match=r"\b2 skills.*skills\.safetensors.*\b3 embeddings"):
        SkillLibrary.load(tmp_path)
    (tmp_path / "skills.json").write_text(json.dumps({**listed, "format": 7}))
    with pytest.raises(ValueError, match=r"format 7\b.*format 1\b"):
        SkillLibrary.load(tmp_path)
    (tmp_path / "skills.json").unlink()
    with pytest.raises(ValueError, match=r"skills\.safetensors.*\bno\b.*skills\.json"):
        SkillLibrary.load(tmp_path)


def test_embeddings_of_unequal_width_are_refused(tmp_path):
    full_library().save(tmp_path)
    tensors = load_file(tmp_path / "skills.safetensors")
    save_file({**tensors, "embedding.1": torch.rand(5)}, tmp_path / "skills.safetensors")
    with pytest.raises(ValueError, match=r"\b5\b.*\b4\b"):
        SkillLibrary.load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda library: library.add("rain", torch.rand(1, 4)), "'rain'.*taken"),
        (lambda library: library.add("", torch.rand(1, 4)), "named ''"),
        (lambda library: library.add("new", torch.rand(0, 4)), r"block.*\[0, 4\]"),
        (lambda library: library.add("new", torch.rand(4)), r"block.*\[4\]"),
        (lambda library: library.add("new", torch.rand(1, 5)), r"\b5\b.*\b4\b"),
        (lambda library: library.update("snow", torch.rand(1, 4)), "skill 'snow'.*sun, rain"),
        (lambda library: library.remove("snow"), "skill 'snow'"),
        (lambda library: library.embedding("snow"), "skill 'snow'"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    library = full_library()
    with pytest.raises(ValueError, match=message):
        call(library)
    assert library.names == ["sun", "rain", "a/folder with space"]
