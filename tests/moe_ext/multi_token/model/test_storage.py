import json

import pytest
import torch
from multi_token_testing import VOCABULARY, make_backbone, make_model
from safetensors.torch import load_file

from moe_common.models.base_identity import BaseIdentity
from moe_common.models.base_model import load_base_model
from moe_ext.multi_token.model.mixture import MultiTokenConfig, MultiTokenMoE
from moe_ext.multi_token.model.storage import Meta, load, onto, read_config, read_meta, save


def saved(model, tokenizer, folder):
    meta = Meta(stage="s2", backbone=BaseIdentity.of(model.backbone, "tiny"), options={"data": "prose"})
    save(model, tokenizer, meta, folder)
    return folder


def read(backbone, folder):
    return onto(backbone, folder, config=read_config(folder), meta=read_meta(folder), name="tiny")


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_saved_and_loaded_is_the_same(tmp_path, tokenizer, kind):
    model = make_model(kind=kind)
    folder = saved(model, tokenizer, tmp_path / "s2")
    again = read(model.backbone, folder)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_is_written_is_no_backbone(tmp_path, tokenizer):
    folder = saved(make_model(), tokenizer, tmp_path / "s2")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "heads.safetensors", "router.safetensors", "moe_meta.json", "tokenizer.json"}
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    tensors = {**load_file(folder / "heads.safetensors"), **load_file(folder / "router.safetensors")}
    assert all(name.startswith(("blocks.", "prefix.", "layers.")) for name in tensors)


def test_an_older_folder_of_pt_files_is_read(tmp_path, tokenizer):
    model = make_model()
    folder = saved(model, tokenizer, tmp_path / "s2")
    for name in ("heads", "router"):
        plain = folder / f"{name}.safetensors"
        torch.save(load_file(plain), folder / f"{name}.pt")
        plain.unlink()
    again = read(model.backbone, folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_a_folder_from_before_there_was_prefix_attention_is_read_without_it(tmp_path, tokenizer, layout):
    model = make_model(prefix_attention=False)
    folder = saved(model, tokenizer, tmp_path / "s2")
    config = json.loads((folder / "config.json").read_text())
    del config["prefix_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "pt":
        torch.save(load_file(folder / "heads.safetensors"), folder / "heads.pt")
        (folder / "heads.safetensors").unlink()
    again = read(model.backbone, folder)
    assert again.heads.prefix is None
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_folder_from_before_there_were_copies_is_read(tmp_path, tokenizer, caplog):
    model = make_model()
    folder = saved(model, tokenizer, tmp_path / "s2")
    (folder / "copy_router.safetensors").unlink()
    again = read(model.backbone, folder)
    assert torch.equal(again.heads.blocks[0].down.weight, model.heads.blocks[0].down.weight)
    assert "older than copies" in caplog.text


def test_the_tokens_that_heads_may_draft_are_kept(tmp_path, tokenizer):
    model = make_model(draft_vocabulary=4)
    model.draft_only(torch.tensor([3, 9, 11, 30]))
    again = read(model.backbone, saved(model, tokenizer, tmp_path / "s2"))
    assert again.vocabulary().token_C.tolist() == [3, 9, 11, 30, VOCABULARY]


def test_a_pt_file_that_would_run_code_is_not_read(tmp_path, tokenizer):
    model = make_model()
    folder = saved(model, tokenizer, tmp_path / "s2")
    (folder / "heads.safetensors").unlink()
    torch.save(model, folder / "heads.pt")
    with pytest.raises(ValueError, match=r"heads\.pt.*tensors"):
        read(model.backbone, folder)


def test_a_folder_is_not_written_over(tmp_path, tokenizer):
    folder = saved(make_model(), tokenizer, tmp_path / "s2")
    with pytest.raises(FileExistsError, match="there already"):
        saved(make_model(), tokenizer, folder)


@pytest.mark.parametrize("other", [{"family": "gpt2"}, {"seed": 7}])
def test_another_backbone_is_refused(tmp_path, tokenizer, other):
    folder = saved(make_model(), tokenizer, tmp_path / "s2")
    with pytest.raises(ValueError, match="base 'tiny'"):
        read(make_backbone(**other), folder)


def test_another_vocabulary_is_refused(tmp_path, tokenizer):
    folder = saved(make_model(), tokenizer, tmp_path / "s2")
    backbone = make_backbone()
    backbone.resize_token_embeddings(48, mean_resizing=False)
    with pytest.raises(ValueError, match=r"vocab_size.*\b40\b.*\b48\b"):
        read(backbone, folder)


def test_heads_of_another_config_are_refused_with_both_shapes(tmp_path, tokenizer):
    model = make_model()
    folder = saved(model, tokenizer, tmp_path / "s2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "head_width": 2}))
    with pytest.raises(ValueError, match=r"\(128, 64\).*\(64, 64\)"):
        read(model.backbone, folder)


def test_a_folder_without_a_checkpoint_names_the_one_inside_it(tmp_path, tokenizer):
    saved(make_model(), tokenizer, tmp_path / "s2")
    with pytest.raises(ValueError, match=r"one of s2\b"):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("moe_meta.json", "{", "is not JSON"),
        ("moe_meta.json", "{}", "lacks 'stage'"),
        ("moe_meta.json", "[]", "must hold an object"),
        ("config.json", '{"experts": 3}', "no config of token heads"),
        ("heads.safetensors", "nothing", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path, tokenizer, name, content, message):
    model = make_model()
    folder = saved(model, tokenizer, tmp_path / "s2")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(model.backbone, folder)


def test_missing_heads_are_named(tmp_path, tokenizer):
    model = make_model()
    folder = saved(model, tokenizer, tmp_path / "s2")
    (folder / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"heads\.safetensors.*heads\.pt"):
        read(model.backbone, folder)


def test_router_and_heads_are_beside_the_backbone_that_is_named(tmp_path, tokenizer):
    backbone, _ = load_base_model()
    model = MultiTokenMoE(backbone, MultiTokenConfig(num_heads=1, k_max=1))
    meta = Meta(stage="s1", backbone=BaseIdentity.of(backbone, "base"), options={})
    save(model, tokenizer, meta, tmp_path / "s1")
    again, its_tokenizer, noted = load(tmp_path / "s1")
    assert noted.stage == "s1"
    assert len(its_tokenizer) == len(tokenizer)
    assert not again.training
    assert again.config.num_heads == 1
