"""The commands from end to end, and every bad input: one line, exit code 2, nothing written."""

import json
import shutil

import pyarrow as pa
import pytest
from moqe_testing import quantize_to, refused
from pyarrow.parquet import write_table
from transformers import AutoTokenizer

from moe_ext.moqe.__main__ import COMMANDS, main
from moe_ext.moqe.experts.schemes import parse_schemes


@pytest.fixture
def command(tiny_sources, expert_folders, tmp_path):
    """A function that writes the command line of a training of a few seconds."""

    def write(*expert_paths, **changed) -> list[str]:
        chosen = {
            "data_dir": tiny_sources,
            "save_dir": tmp_path / "out",
            "row_length": 16,
            "batch_size": 8,
            "max_tokens": 200,
            "validation_tokens": 40,
            "rank": 4,
            **changed,
        }
        paths = expert_paths or expert_folders[:2]
        return [
            "--train",
            "--expert_paths",
            *map(str, paths),
            *(f"--{name}={value}" for name, value in chosen.items()),
        ]

    return write


@pytest.fixture(scope="module")
def trained(tiny_sources, expert_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    words = ["--train", "--expert_paths", *map(str, expert_folders[:2]), f"--data_dir={tiny_sources}"]
    words += ["--row_length=16", "--max_tokens=200", "--validation_tokens=40", "--rank=4"]
    assert main([*words, f"--save_dir={out}"]) == 0
    return out


def nothing_written(tmp_path):
    return not (tmp_path / "out").exists()


def test_training_and_evaluation_lead_to_one_table(trained, tiny_sources, tiny_base, tmp_path, capsys):
    words = ["--eval", f"--checkpoint_path={trained}", f"--data_dir={tiny_sources}", f"--reference={tiny_base}"]
    words += ["--row_length=16", "--max_tokens=60", "--resamples=50", "--speed_rounds=1"]
    assert main([*words, f"--output={tmp_path / 'table.md'}"]) == 0
    said = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert said.strip() == table.strip()
    ways = ("full precision", "int2", "int3", "uniform mean of logits", "static learned weights", "router, by token")
    for way in (*ways, "oracle, per sequence", "oracle, per token"):
        assert f"\n| {way} |" in table
    assert "the interval" in table and "0 samples could not be read" in table
    held = json.loads((tmp_path / "table.json").read_text())
    assert held["ways"]["router, by token"]["forwards"] == 2.0
    assert held["ways"]["int2"]["mib"] < held["ways"]["full precision"]["mib"]


def test_a_second_call_trains_nothing_again(command, tmp_path, caplog):
    assert main(command()) == 0
    before = (tmp_path / "out" / "moqe" / "router.safetensors").stat().st_mtime_ns
    caplog.set_level("INFO")
    assert main(command()) == 0
    assert (tmp_path / "out" / "moqe" / "router.safetensors").stat().st_mtime_ns == before
    assert "is there already" in caplog.text


def test_from_scratch_begins_anew(command, tmp_path):
    assert main(command()) == 0
    before = (tmp_path / "out" / "moqe" / "router.safetensors").read_bytes()
    assert main([*command(seed=3), "--from_scratch"]) == 0
    assert (tmp_path / "out" / "moqe" / "router.safetensors").read_bytes() != before


def test_run_makes_experts_routers_and_tables(tiny_base, tiny_sources, tmp_path, capsys):
    words = ["run", f"--model={tiny_base}", f"--data_dir={tiny_sources}", f"--output={tmp_path / 'out'}"]
    words += ["--sets", "int2,f16", "--row_length=16", "--max_tokens=100", "--validation_tokens=30"]
    words += ["--test_tokens=30", "--rank=4", "--resamples=20", "--group_size=16", "--prefix_length=4"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "| router, by token (token) |" in said and "| router, by sequence (sequence) |" in said
    assert (tmp_path / "out" / "table.md").exists()
    assert main(words) == 0  # what is there is not made again
    assert capsys.readouterr().out == said


def test_memory_says_what_an_expert_takes(expert_folders, capsys):
    assert main(["memory", f"--expert={expert_folders[0]}"]) == 0
    said = capsys.readouterr().out
    assert "int2 (packed)" in said and "MiB of weight files" in said and "resident memory grew by" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_options_are(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "--data_dir" in capsys.readouterr().out or name in ("quantize", "memory")


def test_the_options_of_the_paper_s_command_are_there(capsys):
    with pytest.raises(SystemExit):
        main(["--train", "--help"])
    said = capsys.readouterr().out
    names = ("expert_paths", "data_dir", "save_dir", "batch_size", "gradient_accumulation_steps", "learning_rate")
    names += ("epochs", "checkpoint_path", "from_scratch", "curriculum", "curriculum_epochs")
    assert all(f"--{name}" in said for name in names)


# Bad input


def test_no_command_is_refused(capsys):
    assert main(["--colour"]) == 2
    assert "Give one of --train, --eval, quantize, run, memory" in capsys.readouterr().err


def test_experts_whose_tokenizers_differ_are_refused(command, expert_folders, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(expert_folders[1], other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(other)
    said = refused(command(expert_folders[0], other), capsys)
    assert "tokenizers of int2 and other differ" in said and "<one more>" in said
    assert nothing_written(tmp_path)


def test_one_expert_only_is_refused(command, expert_folders, tmp_path, capsys):
    assert "names 1 expert, but a mixture needs at least two" in refused(command(expert_folders[0]), capsys)
    assert nothing_written(tmp_path)


def test_a_missing_path_is_refused(command, expert_folders, tmp_path, capsys):
    said = refused(command(expert_folders[0], tmp_path / "nowhere"), capsys)
    assert "There is no model folder" in said and "nowhere" in said
    assert nothing_written(tmp_path)


def test_a_missing_gguf_file_is_refused(command, expert_folders, tmp_path, capsys):
    assert "There is no GGUF file" in refused(command(expert_folders[0], tmp_path / "no.gguf"), capsys)
    assert nothing_written(tmp_path)


def test_a_gguf_of_an_unsupported_architecture_is_refused(command, expert_folders, tmp_path, capsys):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "rwkv9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refused(command(expert_folders[0], tmp_path / "strange.gguf"), capsys)
    assert "architecture 'rwkv9'" in said and "It can read bloom" in said and "llama" in said
    assert nothing_written(tmp_path)


def test_an_empty_data_folder_is_refused(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no file to read" in refused(command(data_dir=tmp_path / "empty"), capsys)
    assert nothing_written(tmp_path)


def test_a_parquet_without_a_text_column_is_refused_with_the_columns_there_are(command, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_table(pa.table({"body": ["one"], "title": ["two"]}), tmp_path / "data" / "a.parquet")
    said = refused(command(data_dir=tmp_path / "data"), capsys)
    assert "has no column 'text'; its columns are body, title" in said
    assert nothing_written(tmp_path)


def test_samples_that_cannot_be_read_alone_are_refused_and_counted(command, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("not json\n{}\n")
    assert "(2 samples cannot be read)" in refused(command(data_dir=tmp_path / "data"), capsys)
    assert nothing_written(tmp_path)


def test_unreadable_samples_are_counted_in_what_is_written(command, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        rows = [json.dumps({"text": f"{split} text number {n}"}) for n in range(20)]
        (data / f"{split}.jsonl").write_text("\n".join([*rows, "not json"]))
    assert main(command(data_dir=data)) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["unreadable_samples"] == 1


def test_a_checkpoint_for_other_experts_is_refused(command, trained, expert_folders, tmp_path, capsys):
    checkpoint = next((trained / "checkpoints").glob("checkpoint-*"))
    line = command(expert_folders[0], expert_folders[2], checkpoint_path=checkpoint)
    assert "was trained for the experts int2, int3 and not for int2, int4" in refused(line, capsys)
    assert nothing_written(tmp_path)


def test_a_save_dir_of_other_experts_is_refused(command, trained, expert_folders, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    said = refused(command(expert_folders[1], expert_folders[0], save_dir=trained), capsys)
    assert "was trained for the experts int2, int3 and not for int3, int2" in said
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_a_run_begun_otherwise_is_not_gone_on_with(command, tmp_path, capsys):
    assert main(command()) == 0
    assert "learning_rate (0.005 there, 0.1 asked for)" in refused(command(learning_rate=0.1), capsys)


def test_a_folder_of_something_else_is_not_written_to(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    assert "holds something else than a run" in refused(command(), capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_evaluating_with_other_experts_is_refused(trained, expert_folders, tiny_sources, capsys):
    words = ["--eval", f"--checkpoint_path={trained}", f"--data_dir={tiny_sources}"]
    said = refused([*words, "--expert_paths", expert_folders[0], expert_folders[2]], capsys)
    assert "and not for int2, int4" in said


def test_evaluating_what_is_no_mixture_is_refused(tmp_path, tiny_sources, capsys):
    assert "holds no mixture" in refused(
        ["--eval", f"--checkpoint_path={tmp_path}", f"--data_dir={tiny_sources}"], capsys
    )


@pytest.mark.parametrize(
    ("schemes", "message"),
    [("int1", "Unknown scheme 'int1'"), ("", "No scheme was named"), ("int2,int2", "is named twice")],
)
def test_schemes_that_are_none_are_refused(schemes, message, tmp_path, capsys):
    assert message in refused(["quantize", f"--schemes={schemes}", f"--output={tmp_path / 'out'}"], capsys)
    assert nothing_written(tmp_path)


def test_schemes_name_their_bits_and_their_text():
    group, bnb, gguf = parse_schemes("int3@math+notes/own.jsonl, nf4, q4_1")
    assert (group.bits, group.sources, group.file_name) == (3, ("math", "notes/own.jsonl"), "int3-math+own")
    assert (bnb.kind, gguf.kind, gguf.file_name) == ("bitsandbytes", "gguf", "q4_1.gguf")


def test_an_expert_that_is_there_is_not_made_again(tiny_base, tmp_path):
    (folder,) = quantize_to(tmp_path, tiny_base, "int2")
    before = (folder / "packed.safetensors").stat().st_mtime_ns
    quantize_to(tmp_path, tiny_base, "int2")
    assert (folder / "packed.safetensors").stat().st_mtime_ns == before
