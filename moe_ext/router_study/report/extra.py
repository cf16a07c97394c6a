"""The packages of the extra `study`, imported where they are used."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_study() -> Iterator[None]:
    """Around an import: what is missing is named, and how to install it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"Reports are drawn with {missing.name}, which is not installed. Install it with: pip install '.[study]'"
        ) from missing


def check_drawing() -> None:
    """Refuse before anything is computed for a report.

    Raises:
        ModuleNotFoundError: a package that draws is not installed.
    """
    with needs_study():
        import matplotlib  # noqa: F401
        import plotly  # noqa: F401
