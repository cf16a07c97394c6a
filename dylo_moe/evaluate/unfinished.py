"""What a long measurement has found so far, in a file from which the same command goes on."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_common.runs.whole_files import write_json

logger = logging.getLogger(__name__)


class Unfinished:
    """Findings by name, kept in a JSON file until the measurement is through.

    Args:
        path: of the file; None keeps nothing.
        about: what the findings depend on, as JSON holds it; those of a file about something else are not taken up.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.found: dict[str, Any] = {}
        if path is None or not path.is_file():
            return
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["about"] == about:
            self.found = held["found"]
            logger.info("going on from %s, which holds %d findings", path, len(self.found))
        else:
            logger.info("%s is of another measurement; beginning anew", path)

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was found under this name; measured now where it was not."""
        if name not in self.found:
            self.found[name] = measure()
            if self.path is not None:
                write_json(self.path, {"about": self.about, "found": self.found})
        return self.found[name]

    def finish(self) -> None:
        """Take the file away."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
