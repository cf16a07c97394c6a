"""Options come from flags, then from the file, then from the defaults; nothing unknown gets in."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Literal

import pytest

from moe_common.runs.options import OptionParser, check_at_least, names_option, read_yaml_options, split_names


@dataclass(kw_only=True)
class Example:
    num_things: int = field(default=3, metadata={"help": "How many."})
    bf16: bool | None = None
    shown: bool = field(default=True, metadata={"help": "Show it."})
    names: list[str] | None = None
    sources: str = "a"
    kind: Literal["soft", "hard"] = field(default="soft", metadata={"help": "Which 100 %."})

    def __post_init__(self):
        if self.num_things < 1:
            raise ValueError(f"num_things is {self.num_things}, but must be at least 1.")


@dataclass(kw_only=True)
class Other:
    rate: float = field(default=0.0, metadata={"help": "How fast."})


def parse(*argv, config=None, folder=None):
    if config is not None:
        (folder / "options.yaml").write_text(config)
        argv = ("--config", str(folder / "options.yaml"), *argv)
    return OptionParser((Example, Other), prog="example").parse(argv)


def test_each_dataclass_gets_its_own_options():
    assert parse("--num_things", "7", "--rate", "0.25") == (Example(num_things=7), Other(rate=0.25))


def test_a_bare_flag_is_true_also_where_the_default_is_none():
    assert parse("--bf16")[0].bf16 is True
    assert parse("--bf16", "false")[0].bf16 is False
    assert parse()[0].bf16 is None


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = "num_things: 5\nkind: hard\nshown: false\nrate: 1.0e-3\n"
    found = parse("--num_things", "9", config=config, folder=tmp_path)
    assert found == (Example(num_things=9, kind="hard", shown=False), Other(rate=1e-3))


def test_lists_are_words_or_comma_separated_as_the_option_takes_them(tmp_path):
    found, _ = parse(config="names: [x, y]\nsources: [a.jsonl, b.jsonl]\n", folder=tmp_path)
    assert (found.names, found.sources) == (["x", "y"], "a.jsonl,b.jsonl")


def test_a_dash_and_null_are_understood(tmp_path):
    found, _ = parse(config="num-things: 4\nbf16: null\n", folder=tmp_path)
    assert found == Example(num_things=4)


def test_an_unknown_key_is_refused_with_the_closest(tmp_path):
    with pytest.raises(ValueError, match="'num_thing'.*'num_things'"):
        parse(config="num_thing: 5\n", folder=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "holds a list, but must hold one 'option: value' a line"),
        ("training:\n  rate: 3\n", "nests values under training"),
    ],
)
def test_a_file_that_is_no_list_of_options_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        parse(config=content, folder=tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no options file"):
        read_yaml_options(tmp_path / "none.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse(config="# nothing\n", folder=tmp_path) == (Example(), Other())


def test_a_value_of_the_file_is_checked_as_a_flag_is(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(config="num_things: many\n", folder=tmp_path)
    assert stopped.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"num_things.*\b0\b"):
        parse(config="num_things: 0\n", folder=tmp_path)


def test_an_error_is_one_line(capsys):
    with pytest.raises(SystemExit):
        parse("--kind", "odd")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", [("--num_thing", "3"), ("--unheard", "of")])
def test_unknown_and_shortened_flags_are_refused(argv):
    with pytest.raises(ValueError, match=argv[0]):
        parse(*argv)


def test_an_option_is_found_on_the_command_line_and_in_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("names: [x]\n")
    assert names_option("names", ["--names", "x"])
    assert names_option("names", ["--names=x"])
    assert names_option("names", ["--config", str(tmp_path / "a.yaml")])
    assert not names_option("names", ["--config", str(tmp_path / "none.yaml")])
    assert not names_option("names", ["--num_things", "names"])


def help_of(capsys, *argv) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        OptionParser((Example, Other), prog="example", epilog="example --rate 1\nexample --shown").parse(["-h", *argv])
    assert stopped.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_is_a_line_an_option_with_its_default_and_the_examples_as_they_stand(capsys):
    said = help_of(capsys)
    assert said[0] == "usage: example [--option value ...]"
    lines = {line.split()[0].rstrip(","): line.strip() for line in said if line.startswith("  -")}
    assert " ".join(lines["--num_things"].split()) == "--num_things N How many. [3]"
    assert " ".join(lines["--shown"].split()) == "--shown, --no_shown Show it. [yes]"
    assert " ".join(lines["--rate"].split()) == "--rate X How fast. [0.0]"
    assert lines["--bf16"] == "--bf16"
    assert " ".join(lines["--names"].split()) == "--names TEXT ..."
    assert lines["--kind"].endswith("Which 100 %: soft, hard. [soft]")
    assert len(lines) == 9  # the seven of the classes, --help and --config
    assert said[-2:] == ["example --rate 1", "example --shown"]


def test_help_is_given_also_where_an_option_lacks_its_value(capsys):
    assert help_of(capsys, "--names") == help_of(capsys)


@dataclass
class WithConfig:
    config: str = field(default="plan.json", metadata={"help": "A plan."})


def test_an_option_named_config_is_the_commands_own():
    (options,) = OptionParser((WithConfig,)).parse(["--config", "other.json"])
    assert options.config == "other.json"


def test_an_option_below_its_bound_is_refused_and_one_that_is_not_set_is_not():
    options = SimpleNamespace(rows=2, most=None)
    check_at_least(options, rows=2, most=1)
    with pytest.raises(ValueError, match=r"^rows.*\b2\b.*\b3\.$"):
        check_at_least(options, rows=3)


def test_names_are_split_at_commas_and_empty_ones_left_out():
    assert split_names(" a,b c ,, d,") == ["a", "b c", "d"] and split_names("") == []
