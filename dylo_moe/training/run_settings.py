"""An output folder belongs to one run: what it may not do is mix the results of two."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"


def refuse_other_settings(output: Path, settings: dict[str, Any], *, free: Collection[str]) -> None:
    """Refuse to continue, in its folder, a run with other settings.

    Args:
        output: the folder; nothing is refused where it holds no settings.
        settings: of the run that is asked for, by name.
        free: names of settings that change nothing in what a run computes.

    Raises:
        ValueError: settings differ, and which; or the folder is a file.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir is {output}, which is a file. Name a folder with --output_dir.")
    if not (output / SETTINGS).exists():
        return
    held = _by_name(json.loads((output / SETTINGS).read_text(encoding="utf-8")))
    differs = [
        f"{name} ({held.get(name)} there, {value} asked for)"
        for name, value in _by_name(settings).items()
        if name not in free and held.get(name) != value
    ]
    if differs:
        raise ValueError(
            f"{output} holds a run with other settings: {'; '.join(differs)}. Choose another --output_dir, or remove "
            "that folder."
        )


def _by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of all groups together."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
