"""matplotlib's pyplot, drawing into files; matplotlib comes with the extra `demo`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


def load_pyplot():
    """pyplot without a window. To be called before a long work that ends with a picture, so that it fails at once.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("Drawing needs matplotlib. Install it with: pip install '.[demo]'") from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


@contextmanager
def only_a_picture(path: Path) -> Iterator[None]:
    """Warn of a picture that fails, rather than lose the run whose results are written already.

    Args:
        path: of the picture.
    """
    try:
        yield
    except Exception as failed:  # fonts, locales, back ends, disks: none of them is worth the run
        logger.warning("%s could not be drawn: %s: %s", path, type(failed).__name__, failed)
