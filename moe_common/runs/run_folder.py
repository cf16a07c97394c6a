"""A run keeps its folder: known by its settings, locked while it writes, continued by the same command.

    run = RunFolder("runs/mine", "train.py", settings, free=("output_dir",))   # looks and refuses; writes nothing
    ...                                                  # read and check everything else
    with run:                                            # from here on the folder is this process's
        loss = run.measured("full precision", measure)   # measured once, whoever was killed meanwhile

A command whose result is one file or one folder, whole or not at all, keeps its run beside it until then:

    run = RunFolder.beside("study", "router_study run", settings)
    if run.is_done:
        return run.done                                  # "... is there already"
    with run, run.whole_result() as folder:
        ...
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from moe_common.runs.folder_lock import LOCK, FolderLock
from moe_common.runs.whole_files import (
    PARTIAL,
    check_free,
    check_writable,
    read_json,
    remove,
    whole_folder,
    write_json,
)

RUN, MEASURED = "run.json", "measured"
LONGEST_NAME = 80  # characters of a measurement's name in the name of its file
SHOWN_VALUE = 200  # characters of a setting in a message

# Keeps what a measurement finds under a name; the type of `RunFolder.measured`.
Measured = Callable[[str, Callable[[], Any]], Any]


class RunFolder:
    """The folder of one run, and what it may do there.

    Making one looks and refuses; nothing is written before `with`.

    Args:
        folder: of the run.
        command: which writes it.
        settings: all that the run is made of, in groups or flat, as JSON holds it.
        free: names of settings that change no number, so that a run may be continued with others.
        option: how the user names the folder.
        writes: whether this process is the one that writes, of those that were started together.
        starts_again: whether what other settings have left there is to be replaced.

    Raises:
        ValueError: the folder is a file, holds something else or a run with other settings, or is in use.
        OSError: it cannot be looked at or written into.
    """

    def __init__(
        self,
        folder: str | Path,
        command: str,
        settings: dict[str, Any],
        *,
        free: Collection[str] = (),
        option: str = "--output_dir",
        writes: bool = True,
        starts_again: bool = False,
    ) -> None:
        self.folder, self.command, self.option, self.writes = Path(folder), command, option, writes
        self.settings = json.loads(json.dumps(settings))
        self.free, self.starts_again = set(free), starts_again
        self.result: Path | None = None
        self._lock, self._made = FolderLock(self.folder), []
        self._look()

    @classmethod
    def beside(cls, result: str | Path, command: str, settings: dict[str, Any], **how: Any) -> "RunFolder":
        """The run behind a file or a folder that appears when all is done; until then the run lies beside it.

        Args:
            result: the file or folder; a file is JSON.
            command, settings, how: as for the class.

        Raises:
            ValueError, FileExistsError: also where something else than this run's result is in that place.
        """
        result = Path(result)
        run = cls(result.with_name(f"{result.name}.unfinished"), command, settings, **how)
        run.result = result
        check_writable(result)
        if result.exists() and not run.is_done:
            check_free(result)
        return run

    @property
    def is_begun(self) -> bool:
        """Whether the same command has begun this run before."""
        return (self.folder / RUN).exists()

    @property
    def is_done(self) -> bool:
        """Whether the result is there, and of this run.

        Raises:
            ValueError: it is of a run with other settings.
        """
        file = self.result / RUN if self.result.is_dir() else self.result
        try:
            held = read_json(file)
        except (FileNotFoundError, ValueError):
            return False
        held = held if self.result.is_dir() else isinstance(held, dict) and held.get("run")
        if not isinstance(held, dict) or "settings" not in held:
            return False
        self._compare(held, self.result)
        return True

    @property
    def done(self) -> str:
        """What is said of a result that is there already."""
        return f"{self.result} is there already, made with the same options."

    def know(self, **found: Any) -> None:
        """Add to the settings what reading has found: the text, the weights.

        Raises:
            ValueError: the folder holds a run for which it was something else.
        """
        self.settings |= json.loads(json.dumps(found))
        if self.is_begun and not self.starts_again:
            self._compare(read_json(self.folder / RUN), self.folder)

    def __enter__(self) -> "RunFolder":
        """Take the folder.

        Raises:
            ValueError: another process holds it, or has begun a run with other settings there.
        """
        if not self.writes:
            return self
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        try:
            self._look(locked=True)
            for left in self.folder.rglob("*.partial"):
                if PARTIAL.fullmatch(left.name):
                    remove(left)
            write_json(self.folder / RUN, {"command": self.command, "settings": self.settings})
        except BaseException as failed:
            self.__exit__(type(failed))
            raise
        return self

    def __exit__(self, error_type: type | None = None, *_: object) -> None:
        """Let go; a run that failed before it kept anything leaves nothing."""
        if not self.writes:
            return
        if error_type is not None and self._holds_no_work():
            for path in [self.folder / RUN, *sorted(self.folder.rglob("*"), reverse=True)]:
                if path.is_dir():
                    path.rmdir()
                elif path.name == RUN:
                    path.unlink(missing_ok=True)
        self._lock.release()
        for folder in self._made:  # empty ones alone: others may write beside this run
            with contextlib.suppress(OSError):
                folder.rmdir()

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was found under this name, as JSON holds it; measured now where it was not.

        Raises:
            ValueError: a number that was found is not finite; says which.
        """
        path = self.folder / MEASURED / f"{_file_name(name)}.json"
        if not path.exists():
            if not self.writes:
                return measure()
            write_json(path, {"name": name, "found": measure()})
        return read_json(path)["found"]

    @contextlib.contextmanager
    def whole_result(self) -> Iterator[Path]:
        """A folder to fill, which becomes the result; then what the run kept to go on is removed."""
        with whole_folder(self.result) as partial:
            yield partial
            write_json(partial / RUN, {"command": self.command, "settings": self.settings})
        self.forget()

    def write_result(self, content: dict[str, Any]) -> None:
        """Write the result as JSON, with its settings as `run`; then what the run kept to go on is removed."""
        write_json(self.result, {**content, "run": {"command": self.command, "settings": self.settings}})
        self.forget()

    def forget(self) -> None:
        """Remove the run's folder."""
        self._lock.release()
        remove(self.folder)

    def _look(self, *, locked: bool = False) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, but must be a folder. Name a folder with {self.option}.")
        check_writable(self.folder)
        if not self.folder.exists():
            return
        if self.writes and not locked:
            self._lock.check()
        if (self.folder / RUN).exists():
            if not self.starts_again:
                self._compare(read_json(self.folder / RUN), self.folder)
        elif any(path.name != LOCK for path in self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds something else than a run. Name another folder with {self.option}, or remove it."
            )

    def _compare(self, held: dict[str, Any], where: Path) -> None:
        if not isinstance(held, dict) or not isinstance(held.get("settings"), dict):
            raise ValueError(f"{where / RUN} does not describe a run. Name another place with {self.option}.")
        if held.get("command") != self.command:
            raise ValueError(
                f"{where} holds a run of '{held.get('command')}', but this is '{self.command}'. Name another place "
                f"with {self.option}."
            )
        there = _by_name(held["settings"])
        differs = [
            f"{name} ({_shown(there.get(name))} there, {_shown(value)} asked for)"
            for name, value in _by_name(self.settings).items()
            if name not in self.free and there.get(name) != value
        ]
        if differs:
            raise ValueError(
                f"{where} holds a run with other settings: {'; '.join(differs)}. Name another place with "
                f"{self.option}, or remove that one."
            )

    def _holds_no_work(self) -> bool:
        own = (self.folder / LOCK, self.folder / RUN)
        return all(path.is_dir() or path in own for path in self.folder.rglob("*"))


def _by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of all groups together."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."


def _file_name(name: str) -> str:
    """A name that any file system takes, another one for each name."""
    plain = re.sub(r"[^\w.@+-]", "_", name)[:LONGEST_NAME]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
