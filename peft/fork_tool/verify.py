"""Proves that each commit of the pull request stands alone.

At every commit of the branch that `fork.py pr` wrote: the changed Python files pass upstream's own ruff settings in the
version that they pin, the changed modules of the package can be imported, the tests that have come with the commits so
far pass, and so does every test of upstream's files named in `series.toml` that passes before the first commit.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fork_tool.patches import run_git
from fork_tool.pull_request import CommitPlan, places, read_plan
from fork_tool.release import ForkError, cache_folder, load_release
from fork_tool.tree import Fork
from fork_tool.upstream_tests import Side, differences, run_tests


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found at one commit.

    Args:
        subject: its first line.
        counts: what was looked at, in words.
        wrong: what is wrong, one line each; empty when the commit stands alone.
    """

    subject: str
    counts: str
    wrong: list[str]


def verify(fork: Fork, checkout: Path, *, tests: str, workers: int, told: Callable[[Verdict], None]) -> list[Verdict]:
    """Check each commit of the series that HEAD of `checkout` ends with, in a copy of the checkout.

    Args:
        tests: which tests to run: "none" (style and imports alone are checked), "own", or "all", with upstream's.
        workers: processes that run tests.
        told: called with each verdict as soon as it is known.

    Raises:
        ForkError: HEAD does not end with the series, or a tool is missing.
    """
    plan = read_plan(fork, load_release(fork.pin).files)
    log = run_git("log", f"-{len(plan)}", "--reverse", "--format=%H %s", cwd=checkout, as_user=True).stdout
    commits = [line.split(" ", 1) for line in log.splitlines()]
    if [subject for _, subject in commits] != [step.subject for step in plan]:
        raise ForkError(f"HEAD of {checkout} does not end with the series that fork.py pr writes. Run that first.")
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="peft-fork-") as scratch:
        copy = Path(scratch, "checkout")
        run_git("clone", "--quiet", "--shared", str(checkout.resolve()), str(copy), cwd=Path(scratch))
        base = Path(scratch, "base")
        run_git("worktree", "add", "--quiet", "--detach", str(base), f"{commits[0][0]}~", cwd=copy)
        before = {}
        for number, (commit, subject) in enumerate(commits):
            run_git("checkout", "--quiet", "--detach", commit, cwd=copy)
            changed = run_git("diff", "--name-only", f"{commit}~", commit, cwd=copy).stdout.split()
            wrong = _style(copy, changed) + _imports(copy, changed)
            counts = f"{sum(path.endswith('.py') for path in changed)} Python files"
            if tests != "none" and not wrong:
                theirs = plan[number].tests if tests == "all" else []
                passed, failed = _tests(copy, base, plan[: number + 1], theirs, before, workers)
                counts, wrong = f"{counts}, {passed}", failed
            verdicts.append(Verdict(subject=subject, counts=counts, wrong=wrong))
            told(verdicts[-1])
    return verdicts


def _style(copy: Path, changed: list[str]) -> list[str]:
    """What upstream's ruff settings say of the changed Python files, and whether they are formatted as upstream's."""
    settings = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8")).get("tool", {}).get("ruff", {})
    ruff = _ruff(settings.get("required-version", "").removeprefix("=="))
    files = [path for path in changed if path.endswith(".py")]
    wrong = []
    for command in (["check", "--no-cache", "--output-format=concise"], ["format", "--no-cache", "--check"]):
        done = subprocess.run([*ruff, *command, *files], cwd=copy, capture_output=True, text=True)
        if files and done.returncode:
            said = (done.stdout + done.stderr).splitlines()
            named = [line for line in said if ".py" in line or "rror" in line]
            wrong += [f"ruff {command[0]}: {line}" for line in named or said[-1:]]
    return wrong


def _ruff(version: str) -> list[str]:
    """The command of ruff in this version; the installed one where upstream pins none.

    Raises:
        ForkError: it is neither installed nor to be had from the package index.
    """
    installed = subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True, text=True)
    if installed.returncode == 0 and version in ("", installed.stdout.split()[-1]):
        return [sys.executable, "-m", "ruff"]
    if not version:
        raise ForkError("ruff is missing, which checks the style of the commits. Install it with: pip install ruff")
    folder = cache_folder() / f"ruff-{version}"
    if not (folder / "bin/ruff").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--target", str(folder), f"ruff=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise ForkError(f"pip could not fetch ruff {version}, which upstream pins: {done.stderr.splitlines()[-1]}")
    return [str(folder / "bin/ruff")]


def _imports(copy: Path, changed: list[str]) -> list[str]:
    """Import every changed module of the package in one new Python."""
    modules = [
        re.sub(r"(/__init__)?\.py$", "", path.removeprefix("src/")).replace("/", ".")
        for path in changed
        if path.startswith("src/") and path.endswith(".py")
    ]
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(f"import {name}" for name in ["peft", *modules])]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return [f"import: {done.stderr.splitlines()[-1]}"] if done.returncode else []


def _tests(
    copy: Path, base: Path, steps: list[CommitPlan], theirs: list[str], before: dict[str, Side], workers: int
) -> tuple[str, list[str]]:
    """Run the tests that belong to the last of these commits.

    Args:
        copy: the checkout at that commit.
        base: the checkout before the series; `before` keeps what upstream's test files gave there.
        theirs: names of upstream's test files.

    Returns:
        how many passed, in words, and what did not.
    """
    name = steps[-1].subject
    own = [place for step in steps for place in places(step.files) if Path(place).name.startswith("test_")]
    theirs = [f"tests/{test}.py" for test in theirs]
    if fresh := [path for path in theirs if path not in before]:
        outcome = run_tests("before the series", base, fresh, workers)
        for path in fresh:
            kept = {test: found for test, found in outcome.outcomes.items() if test.startswith(f"{path}::")}
            before[path] = Side(outcomes=kept)
    if not own + theirs:
        return "no tests", []
    expected = Side(outcomes={test: found for path in theirs for test, found in before[path].outcomes.items()}).named()
    side = run_tests(name, copy, own + theirs, workers, PEFT_PRISTINE=str(base / "src")).named()
    hub = sum(found == "hub" for found in side.outcomes.values())
    passed = f"{len(side.passed())} tests passed" + (f", {hub} could not run for want of the hub" if hub else "")
    return passed, [
        f"{test}: {side.messages.get(test, side.outcomes.get(test, 'is gone'))}"
        for test in sorted(differences(expected, side))
    ]
