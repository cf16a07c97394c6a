"""Options of a command from its dataclasses, from the command line and from a YAML file.

    mixture, training = parse((MixtureConfig, TrainingConfig), argv, description="...")

`--config file.yaml` names a file of `option: value` lines. A flag wins over the file, the file over the default, and a
key of the file that is no option is refused, so that a misspelt one never passes for a default.
"""

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

CONFIG_FLAG = "--config"


class OptionParser(HfArgumentParser):
    """HfArgumentParser with `--config`, and with bare flags also for a `bool | None` (`--bf16` is `--bf16 true`).

    Where a dataclass has an option `config` of its own, that is what the flag means.

    Args:
        classes: the dataclasses.
        kwargs: argparse's; of `description` and `epilog`, `--help` keeps the line breaks. Without an epilog, it ends
            with an example made of the options.
    """

    def __init__(self, classes: Sequence[type], **kwargs: Any) -> None:
        super().__init__(classes, allow_abbrev=False, formatter_class=OneLineHelp, **kwargs)
        self.reads_file = CONFIG_FLAG not in self._option_string_actions  # unless a dataclass has such an option
        if self.reads_file:
            self.add_argument(CONFIG_FLAG, metavar="FILE", help="YAML file of options; flags win over it.")
        for action in self._actions:
            if _is_switch(action) and action.nargs is None:
                action.nargs, action.const = "?", True
        needed = [f"{action.option_strings[0]} {_kind(action)} " for action in self._actions if action.required]
        self.usage = f"%(prog)s {''.join(needed)}[--option value ...]"
        if self.epilog is None:
            self.epilog = f"example:\n{self.prog} {self._example()}"

    def _example(self) -> str:
        """What a call may look like: the options it needs, or the first two that have a default to show."""
        needed = [f"{action.option_strings[0]} {_kind(action)}" for action in self._actions if action.required]
        with_default = [action for action in self._actions if isinstance(action.default, int | float | str)]
        shown = [a for a in with_default if a.default and not _is_switch(a) and a.default != argparse.SUPPRESS]
        return " ".join(needed or [f"{action.option_strings[0]} {action.default}" for action in shown[:2]])

    def error(self, message: str):
        """One line and exit code 2; argparse would print the whole usage before it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One instance of each dataclass.

        Raises:
            ValueError: the file cannot be read as options, holds an unknown key, or a dataclass refuses a value.
            SystemExit: argparse's own errors and --help, which wins over whatever else is there.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help"} & set(argv):
            self.print_help()
            self.exit()
        before = []
        if self.reads_file:
            named, _ = _config_only().parse_known_args(argv)
            # As flags before the user's own: each value is read by the same rules, and the later one wins.
            before = [] if named.config is None else self._as_flags(Path(named.config))
        instances, unknown = self._into_dataclasses([*before, *argv])
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            hint = f"Closest: {close[0]}. " if close else ""
            raise ValueError(f"Unknown option {' '.join(unknown)}. {hint}See --help for all options.")
        return instances

    def _into_dataclasses(self, argv: list[str]) -> tuple[tuple[Any, ...], list[str]]:
        """One instance of each dataclass, and the words that are no option."""
        *found, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        return tuple(found[: len(self.dataclass_types)]), unknown  # behind them: what belongs to none, `--config`

    def _as_flags(self, path: Path) -> list[str]:
        known = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        flags = []
        for key, value in read_yaml_options(path).items():
            name = str(key).replace("-", "_")
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"Closest: '{close[0]}'. " if close else ""
                raise ValueError(f"{path} holds the unknown option '{key}'. {hint}See --help for all options.")
            if value is None:
                continue
            takes_several = known[name].nargs == "+"
            if isinstance(value, list) and not takes_several:
                flags.append(f"--{name}={','.join(map(str, value))}")
            elif isinstance(value, list):
                flags += [f"--{name}", *map(str, value)]
            else:
                flags.append(f"--{name}={value}")
        return flags


class OneLineHelp(argparse.HelpFormatter):
    """A line an option: `--name KIND`, what it does, its default; the spelling with dashes is taken and not shown."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._StoreFalseAction):  # --no_x is shown beside --x
            super().add_argument(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [text]  # how long a line may be is the terminal's affair

    def _format_action(self, action: argparse.Action) -> str:
        name, _, said = super()._format_action(action).rstrip("\n").partition("\n")
        return f"{name}  {said.strip()}\n" if said else f"{name}\n"  # a long name takes no line of its own

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1 if action.dest == "help" else 0]
        if action.nargs == 0:
            return name
        if _is_switch(action):
            return f"{name}, --no_{action.dest}" if action.default is True else name
        return f"{name} {_kind(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("%", "%%")
        if action.choices:
            text = f"{text.removesuffix('.')}: {', '.join(map(str, action.choices))}."
        if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
            return text
        default = action.default
        if default is True:
            default = "yes"
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{text} [{default}]"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


class PlainParser(argparse.ArgumentParser):
    """argparse for a command without a dataclass, with the same `--help` and errors of one line.

    Args:
        description: what the command does, in a line.
        example: a call, or several lines of them.
        kwargs: argparse's.
    """

    def __init__(self, description: str, *, example: str, **kwargs: Any) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n{example}",
            formatter_class=OneLineHelp,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str):
        """One line and exit code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _is_switch(action: argparse.Action) -> bool:
    return getattr(action.type, "__name__", "") == "string_to_bool"


def _kind(action: argparse.Action) -> str:
    """What an option takes, in a word."""
    if action.metavar:
        return str(action.metavar)
    kind = {int: "N", float: "X"}.get(action.type, "CHOICE" if action.choices else "TEXT")
    return f"{kind} ..." if action.nargs in ("+", "*") else kind


def check_at_least(options: Any, **least: float) -> None:
    """Refuse options that are set below their bound, or to no finite number.

    Raises:
        ValueError: which one, its value, and the bound.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"{name} is {value}, but must be {_at_most_finite(value)}at least {bound}.")


def check_above(options: Any, **below: float) -> None:
    """Refuse options that are not above their bound, or no finite number.

    Raises:
        ValueError: which one, its value, and the bound.
    """
    for name, bound in below.items():
        value = getattr(options, name)
        if value is not None and not bound < value < math.inf:
            raise ValueError(f"{name} is {value}, but must be {_at_most_finite(value)}above {bound}.")


def _at_most_finite(value: float) -> str:
    return "" if math.isfinite(value) else "a finite number "


def split_names(text: str) -> list[str]:
    """Names separated by commas, without the blanks around them and without empty ones."""
    return [name.strip() for name in text.split(",") if name.strip()]


def names_option(name: str, argv: Sequence[str] | None = None) -> bool:
    """Whether the command line, or the file it names with `--config`, sets an option; nothing is checked yet."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word == f"--{name}" or word.startswith(f"--{name}=") for word in argv):
        return True
    config, _ = _config_only().parse_known_args(argv)
    if config.config is None or not Path(config.config).is_file():
        return False
    try:
        return read_yaml_options(Path(config.config)).get(name) is not None
    except ValueError:
        return False


def read_yaml_options(path: Path) -> dict[str, Any]:
    """The `option: value` lines of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not a mapping from option to value.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no options file {path}. Check the path given to {CONFIG_FLAG}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        said = " ".join(str(wrong).split())
        raise ValueError(f"{path} is not YAML: {said}. Write one 'option: value' a line.") from wrong
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but must hold one 'option: value' a line.")
    nested = [str(key) for key, value in content.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{path} nests values under {', '.join(nested)}. Write one 'option: value' a line, unnested.")
    return content


def _config_only() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(CONFIG_FLAG)
    return parser
