"""Revisions of a model: what their names say of their place in training, and where they are.

step5000-tokens20B    a branch as the OLMoE authors name them: after 5,000 steps, on 20 billion tokens
checkpoint-500        a folder as a Trainer names it
main, final           no number: the end of training
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import list_repo_refs
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from moe_common.models.base_model import resolve_model_name
from moe_ext.moe_models import SMALL_MOE, SMALL_MOE_FOLDER

STEP = re.compile(r"(?<![a-z])step[-_]?(\d+)", re.I)
TOKENS = re.compile(r"tokens[-_]?(\d+(?:\.\d+)?)([KMBT])", re.I)
LAST_NUMBER = re.compile(r"(\d+)(?!.*\d)")
SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
CONFIGS = ("config.json", "adapter_config.json")
NAMED_IN_ERROR = 12


@dataclass(frozen=True)
class Revision:
    """A place in training.

    Args:
        name: as the user or the hub writes it.
        step: optimiser steps; None where the name has no number, which means the end.
        tokens: training tokens, where the name says so.
    """

    name: str
    step: int | None = None
    tokens: float | None = None


def parse_revision(name: str) -> Revision:
    """Read a name as it is; of a path its last part counts."""
    last = Path(name).name
    tokens = TOKENS.search(last)
    found = STEP.search(last) or (None if tokens else LAST_NUMBER.search(last))
    return Revision(
        name,
        step=int(found[1]) if found else None,
        tokens=float(tokens[1]) * SCALES[tokens[2].upper()] if tokens else None,
    )


def in_order(names: Sequence[str]) -> list[Revision]:
    """Revisions from the first to the last in training: by number and not as text, one without a number last.

    Raises:
        ValueError: fewer than two, one that is named twice, or several whose place cannot be told.
    """
    if len(names) < 2:
        raise ValueError(
            f"{len(names)} revision was given, but two are needed to compare: an earlier one and the last."
        )
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"The revision {twice[0]} is named twice.")
    revisions = [parse_revision(name) for name in names]
    unnumbered = [revision.name for revision in revisions if _place(revision) is None]
    if len(unnumbered) > 1:
        raise ValueError(
            f"{' and '.join(unnumbered)} have no number in their names, so their order cannot be told. At most one "
            "revision may have none; it is taken for the end of training."
        )
    return sorted(revisions, key=lambda revision: (_place(revision) is None, _place(revision) or 0))


def _place(revision: Revision) -> float | None:
    return revision.step if revision.step is not None else revision.tokens


def resolve_revision(model: str | Path, revision: str | None) -> tuple[str, str | None]:
    """Where the weights of a revision are.

    Args:
        model: a name or folder of a model.
        revision: a folder below it or of its own, or a branch or tag of a hub model; None is the model itself.

    Returns:
        What `from_pretrained` takes, and its argument `revision`.

    Raises:
        ValueError, FileNotFoundError: there is no such model or revision; those that exist are named.
    """
    name = str(SMALL_MOE_FOLDER) if str(model) == SMALL_MOE else str(model)
    folder = Path(name).expanduser()
    if revision is not None and _is_model(Path(revision).expanduser()):
        return str(Path(revision).expanduser()), None
    if folder.is_dir():
        if revision is None:
            return (str(folder), None) if _is_model(folder) else (resolve_model_name(str(folder)), None)
        if _is_model(folder / revision):
            return str(folder / revision), None
        there = [revision.name for revision in _sorted(path.name for path in folder.iterdir() if _is_model(path))]
        raise ValueError(f"{model} has no revision '{revision}'. {_which(there, 'It holds')}")
    where = resolve_model_name(name)
    if revision is not None:
        there = hub_revisions(where)
        if revision not in there:
            raise ValueError(f"{model} has no revision '{revision}'. {_which(there, 'It has')}")
    return where, revision


def hub_revisions(model: str) -> list[str]:
    """The branches and tags of a hub model, in the order of training.

    Raises:
        ValueError: the hub cannot be reached or does not have the model.
    """
    try:
        refs = list_repo_refs(model)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as refused:
        said = str(refused).strip().splitlines()[0]
        raise ValueError(
            f"The revisions of '{model}' could not be read from the hub: {said.rstrip('.')}. Check its name and the "
            "network, or give local folders."
        ) from refused
    return [revision.name for revision in _sorted(ref.name for ref in [*refs.branches, *refs.tags])]


def _sorted(names) -> list[Revision]:
    revisions = [parse_revision(name) for name in names]
    return sorted(revisions, key=lambda revision: (_place(revision) is None, _place(revision) or 0, revision.name))


def _is_model(folder: Path) -> bool:
    return any((folder / config).is_file() for config in CONFIGS)


def _which(there: list[str], verb: str) -> str:
    if not there:
        return f"{verb} none: give folders of models, each with a config.json."
    more = f" and {len(there) - NAMED_IN_ERROR} more" if len(there) > NAMED_IN_ERROR else ""
    return f"{verb} {', '.join(there[:NAMED_IN_ERROR])}{more}."
