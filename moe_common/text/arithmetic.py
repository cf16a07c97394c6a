"""The question generators of `gsm_symbolic`, read out of the wheel of reasoning-gym.

Installed, reasoning-gym brings a dozen packages for its other families, among them a solver that only a C compiler
builds. Its generators need nothing but Python, so the wheel is fetched, as data, and they alone are taken from it.
"""

import zipfile
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from moe_common.runs.downloads import DownloadError, PinnedFile, fetch, file_sha256

REASONING_GYM = PinnedFile(
    package="reasoning-gym",
    version="0.1.25",
    sha256="7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    member=None,
    megabytes=7,
)
GSM_SYMBOLIC = "reasoning_gym/arithmetic/gsm_symbolic"
SOURCES = (
    "reasoning_gym/utils.py",
    f"{GSM_SYMBOLIC}/generators_00_49.py",
    f"{GSM_SYMBOLIC}/generators_50_99.py",
)
# Says where two functions of the first source come from. All sources run in one namespace, which has them.
OWN_IMPORT = "from reasoning_gym.utils import format_number, is_integer"
GENERATOR_PREFIX = "generate_"


@cache
def question_generators() -> dict[int, Callable[[Random, float], dict[str, Any]]]:
    """Number -> function of a source of randomness and a difficulty, which writes `question`, `answer` and `metadata`.

    Raises:
        DownloadError: the wheel has not been fetched yet and cannot be, or the kept one is damaged.
    """
    wheel = fetch(REASONING_GYM)
    if file_sha256(wheel) != REASONING_GYM.sha256:  # what runs is what was pinned
        raise DownloadError(f"{wheel} is not the file that was fetched. Delete it, and the next run fetches it again.")
    namespace: dict[str, Any] = {"__name__": "reasoning_gym"}
    with zipfile.ZipFile(wheel) as archive:
        for source in SOURCES:
            text = archive.read(source).decode().replace(OWN_IMPORT, "")
            exec(compile(text, f"{wheel}/{source}", "exec"), namespace)
    return {
        int(name.removeprefix(GENERATOR_PREFIX)): function
        for name, function in namespace.items()
        if name.startswith(GENERATOR_PREFIX)
    }
