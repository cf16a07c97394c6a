"""What the world does to a command is a line; what the program does wrong is a traceback."""

import json
import zipfile

import pytest
import torch
from jinja2 import Template
from pyarrow.parquet import ParquetFile
from safetensors.torch import load_file, save_file

from moe_common.runs.failures import WORLD, as_line, reading


def damaged_safetensors(folder):
    save_file({"a": torch.zeros(8)}, folder / "a.safetensors")
    (folder / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:60])
    load_file(folder / "a.safetensors")


def truncated_weights(folder):
    torch.save({"a": torch.zeros(512)}, folder / "a.pt")
    (folder / "a.pt").write_bytes((folder / "a.pt").read_bytes()[:700])
    torch.load(folder / "a.pt", weights_only=True)


def weights_with_code(folder):
    torch.save({"a": print}, folder / "a.pt")
    torch.load(folder / "a.pt", weights_only=True)


def damaged_parquet(folder):
    (folder / "a.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    ParquetFile(folder / "a.parquet")


def deep_json(folder):
    json.loads("[" * 100_000)


def endless_links(folder):
    (folder / "a").symlink_to(folder / "a")
    (folder / "a").read_text()


def long_name(folder):
    (folder / ("n" * 300)).read_text()


def full_disk(folder):
    with open("/dev/full", "w") as full:
        full.write("a" * 100_000)


def full_disk_by_torch(folder):
    torch.save({"a": torch.zeros(1 << 20)}, "/dev/full")


def template_that_raises(folder):
    Template("{{ 'a' | no_such_filter }}").render()


def no_archive(folder):
    (folder / "a.whl").write_bytes(b"no zip")
    zipfile.ZipFile(folder / "a.whl")


def too_large(folder):
    int(float("inf"))


EVENTS = [
    damaged_safetensors,
    truncated_weights,
    weights_with_code,
    damaged_parquet,
    deep_json,
    endless_links,
    long_name,
    full_disk,
    full_disk_by_torch,
    template_that_raises,
    no_archive,
    too_large,
]


@pytest.mark.parametrize("event", EVENTS)
def test_what_the_world_does_is_told_in_words_and_never_advises_to_run_code(event, tmp_path):
    with pytest.raises(WORLD) as raised:
        event(tmp_path)
    line = as_line(raised.value)
    assert line and "weights_only" not in line and "Traceback" not in line


@pytest.mark.parametrize(
    "fault", [RuntimeError("The size of tensor a (3) must match b (4)"), NotImplementedError("x")]
)
def test_a_fault_of_the_program_is_not_told_in_a_line(fault):
    assert as_line(fault) is None


@pytest.mark.parametrize("event", [damaged_safetensors, deep_json, template_that_raises, too_large])
def test_what_is_read_is_named(event, tmp_path):
    with (
        pytest.raises(ValueError, match=r"^the model 'mine' cannot be read: .* Restore it"),
        reading("the model 'mine'"),
    ):
        event(tmp_path)


def test_what_names_the_file_already_is_left_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="^a.json holds no plan$"), reading("a.json"):
        raise ValueError("a.json holds no plan")
    with pytest.raises(FileNotFoundError), reading("a.json"):
        (tmp_path / "a.json").read_text()
