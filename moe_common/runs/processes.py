"""Which of the processes this is that torchrun or accelerate started together."""

import os


def process_rank() -> int:
    """The number of this process, from 0; it alone writes if it is 0.

    Raises:
        ValueError: the environment says something else than a number.
    """
    return _whole_number("RANK", 0)


def num_processes() -> int:
    """How many processes were started together.

    Raises:
        ValueError: as `process_rank`.
    """
    return _whole_number("WORLD_SIZE", 1)


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(
            f"{name} is '{text}' in the environment, but must be a whole number, as torchrun sets it. Unset it to "
            "start one process."
        )
    return int(text)
