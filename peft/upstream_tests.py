"""Run PEFT's own LoRA tests on the pristine release and on the fork, and demand that the same tests pass.

    pip install $(python peft/upstream_tests.py --requirements)
    python peft/upstream_tests.py

The release's source distribution carries the tests. Both sides run in trees of their own, with the tests' models from
the local Hugging Face cache only, unless HF_HUB_OFFLINE=0 is set. The result of the pristine side is kept in the cache
folder of fork.py, so that later runs repeat only the fork's side. This file is also the pytest plugin of those runs.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fork_tool.patches import apply_queue
from fork_tool.release import ForkError, cache_folder, load_release
from fork_tool.tree import Fork, build, own_files


HERE = Fork(Path(__file__).resolve().parent)

# Package -> the module that upstream's tests, or modules of PEFT that they import, need. `attrs` is used by
# peft.tuners.lora.corda, which PEFT's own dependencies do not cover.
REQUIREMENTS = {
    "attrs": "attr",
    "datasets": "datasets",
    "diffusers": "diffusers",
    "parameterized": "parameterized",
    "pytest": "pytest",
    "pytest-xdist": "xdist",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
}
# Every test of these files is LoRA's or common to all methods, but for the first, see `pytest_collection_modifyitems`.
FILES = (
    "test_custom_models",
    "test_lora_variants",
    "test_arrow",
    "test_xlora",
    "test_mixed",
    "test_tuners_utils",
    "test_low_level_api",
    "test_config",
    "test_lora_conversion",
    "test_initialization",
    "test_bdlora",
    "test_helpers",
    "test_integrations",
    "test_lora_ga",
    "test_lora_intruders",
    "test_lorafa",
    "test_loraplus",
    "test_velora",
    "test_mapping",
    "test_other",
    "test_target_parameters",
    "test_trainable_tokens",
)
# What a failure says when only a model or a data set of the hub was missing.
WANTS_THE_HUB = re.compile(
    r"LocalEntryNotFound|OfflineMode|offline mode|[Cc]ouldn't connect to|[Cc]ouldn't reach|huggingface\.co|"
    r"not the path to a directory|Can't load .* for|cannot find the requested files in the local cache|"
    r"Couldn't find any data file|Cannot find an appropriate cached snapshot"
)
# pytest names a case that is a dict by its argument and by its row in the table of cases, such as config_kwargs38.
ROW = re.compile(r"(?<=kwargs)\d+")
# Goes up when the plugin below runs the same files otherwise, so that kept results are not used any more.
RULES = 1
# Versions that can change which tests pass.
VERSIONS = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "diffusers",
    "numpy",
    "safetensors",
    "scikit-learn",
    "scipy",
)


@dataclass(kw_only=True)
class Side:
    """The outcome of one side.

    Args:
        seconds: how long the tests took.
        outcomes: test id -> passed, failed, hub (failed for want of it), skipped or xfailed.
        messages: test id -> last line of what it failed with.
    """

    seconds: float = 0.0
    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def count(self, outcome: str) -> int:
        return sum(found == outcome for found in self.outcomes.values())

    def passed(self) -> set[str]:
        return {test for test, found in self.outcomes.items() if found == "passed"}

    def names(self) -> dict[str, str]:
        """Test id -> a name that a further row in a table of cases leaves as it is: the id without the row.

        Of tests that are alike but for their rows, the second by its row is named `... (2)`, and so on.
        """
        alike = defaultdict(list)
        for test in self.outcomes:
            alike[ROW.sub("", test)].append(test)
        return {
            test: name if number == 1 else f"{name} ({number})"
            for name, tests in alike.items()
            for number, test in enumerate(sorted(tests, key=_rows), start=1)
        }

    def named(self) -> "Side":
        """The same by these names, to be compared with a side whose tables have more rows."""
        names = self.names()
        return Side(
            seconds=self.seconds,
            outcomes={names[test]: found for test, found in self.outcomes.items()},
            messages={names[test]: message for test, message in self.messages.items()},
        )


def main(argv: list[str] | None = None) -> int:
    """Run both sides; returns 0 when the same tests pass, 1 when not or when something else went wrong."""
    parser = argparse.ArgumentParser(
        prog="upstream_tests.py",
        description=__doc__.split("\n\n")[0],
        epilog="example: python peft/upstream_tests.py --workers 4 --again",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=30, width=160),
    )
    parser.add_argument("--workers", type=int, default=2, help="processes a side (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE.state / "upstream-tests",
        help="folder of the summary; by default .fork/upstream-tests",
    )
    parser.add_argument("--again", action="store_true", help="run the pristine side even when its result is kept")
    parser.add_argument(
        "--select",
        nargs="+",
        default=FILES,
        choices=FILES,
        metavar="FILE",
        help="only these test files; by default all of LoRA's",
    )
    parser.add_argument("--requirements", action="store_true", help="print the packages the tests need, and stop")
    options = parser.parse_args(argv)
    if options.requirements:
        print(" ".join(REQUIREMENTS))
        return 0
    try:
        summary = compare(options.select, workers=options.workers, again=options.again)
    except ForkError as refused:
        print(f"upstream_tests.py: {refused}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    text = describe(summary)
    (options.output / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nwritten to {options.output}/summary.json and summary.txt")
    return 0 if summary["same"] else 1


def compare(files: list[str], *, workers: int, again: bool) -> dict:
    """Run both sides of these test files; returns the summary that `describe` puts into words.

    Tests that pass on one side only are run once more on both, alone, before they count as different.

    Raises:
        ForkError: a package is missing, the fork cannot be built, or a test file cannot be collected.
    """
    missing = [package for package in REQUIREMENTS if _version(package) is None]
    if missing:
        raise ForkError(f"Upstream's tests need {', '.join(missing)}. Install with: pip install {' '.join(missing)}")
    build(HERE)
    release = load_release(HERE.pin)
    patched = apply_queue(release.files, HERE.patches)
    own = {path: (HERE.root / path).read_bytes() for path in own_files(HERE, release.files)}
    with tempfile.TemporaryDirectory(prefix="peft-upstream-tests-") as scratch:
        trees = {"pristine": Path(scratch, "pristine"), "fork": Path(scratch, "fork")}
        _write_tree(trees["pristine"], release.files)
        _write_tree(trees["fork"], patched | own)
        kept = cache_folder() / "upstream-tests" / f"{_key(files)}.json"
        if kept.is_file() and not again:
            print(f"pristine: result of an earlier run ({kept})", file=sys.stderr, flush=True)
            pristine = Side(**json.loads(kept.read_text(encoding="utf-8")))
        else:
            pristine = run_tests("pristine", trees["pristine"], [f"tests/{name}.py" for name in files], workers)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(dataclasses.asdict(pristine)), encoding="utf-8")
        fork = run_tests("fork", trees["fork"], [f"tests/{name}.py" for name in files], workers)
        flaky = []
        if different := differences(pristine.named(), fork.named()):
            print(f"{len(different)} tests differ; running them once more on both sides", file=sys.stderr, flush=True)
            for side, name in ((pristine, "pristine"), (fork, "fork")):
                if present := [test for test, named in side.names().items() if named in different]:
                    second = run_tests(name, trees[name], present, 0)
                    side.outcomes |= second.outcomes
                    side.messages |= second.messages
            flaky = sorted(different - differences(pristine.named(), fork.named()))
    return _summary(pristine.named(), fork.named(), flaky)


def describe(summary: dict) -> str:
    """The summary in words, for a terminal."""
    lines = [f"PEFT's own LoRA tests, {summary['release']} against {summary['fork']} ({summary['python']}):"]
    for name in ("pristine", "fork"):
        side = summary["sides"][name]
        lines += [
            f"  {name:<9} {side['ran']} tests in {side['seconds']:.0f} s: {side['passed']} passed, "
            f"{side['failed']} failed, {side['hub']} could not run for want of the hub, {side['skipped']} skipped, "
            f"{side['xfailed']} failed as expected"
        ]
    for title, tests in summary["tests"].items():
        if tests:
            shown = "\n".join(f"    {test}" for test in tests[:40])
            more = f"\n    ... and {len(tests) - 40} more in summary.json" if len(tests) > 40 else ""
            lines.append(f"  {title.replace('_', ' ')}: {len(tests)}\n{shown}{more}")
    lines.append("the same tests pass" if summary["same"] else "NOT the same tests pass")
    return "\n".join(lines)


def differences(pristine: Side, fork: Side) -> set[str]:
    """Tests of the release that pass on one side only, and tests that only the fork has and that fail; both `named`."""
    common = pristine.outcomes.keys()
    added = {test for test, found in fork.outcomes.items() if test not in common and found == "failed"}
    return (pristine.passed() ^ (fork.passed() & common)) | added


def _summary(pristine: Side, fork: Side, flaky: list[str]) -> dict:
    different = differences(pristine, fork)
    outcomes = ("passed", "failed", "hub", "skipped", "xfailed")
    both = [test for test, found in pristine.outcomes.items() if found == fork.outcomes.get(test) == "failed"]
    return {
        "release": f"{HERE.pin.name} {HERE.pin.version}",
        "fork": f"{HERE.pin.name} {HERE.pin.fork_version}",
        "python": f"Python {platform.python_version()}, "
        + ", ".join(f"{package} {_version(package)}" for package in ("torch", "transformers")),
        "same": not different,
        "sides": {
            name: {"ran": len(side.outcomes), "seconds": round(side.seconds, 1)}
            | {outcome: side.count(outcome) for outcome in outcomes}
            for name, side in (("pristine", pristine), ("fork", fork))
        },
        "tests": {
            "pass_on_the_pristine_side_only": sorted(different & pristine.passed()),
            "pass_on_the_fork_only": sorted(different & fork.passed()),
            "fail_in_the_fork_which_alone_has_them": sorted(different - pristine.outcomes.keys()),
            "added_by_the_fork": sorted(fork.outcomes.keys() - pristine.outcomes.keys()),
            "passed_at_the_second_try": flaky,
            "fail_on_both_sides": [f"{test}: {pristine.messages[test]}" for test in sorted(both)],
        },
        "for_want_of_the_hub": sorted(test for test, found in fork.outcomes.items() if found == "hub"),
        "messages": {test: fork.messages.get(test) or pristine.messages.get(test, "") for test in sorted(different)},
    }


def _rows(test: str) -> list[int]:
    return [int(row) for row in ROW.findall(test)]


def _write_tree(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in (files | {"tests/__init__.py": b""}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def run_tests(name: str, tree: Path, tests: list[str], workers: int, **variables: str) -> Side:
    """Run tests in a tree and read what the plugin part of this file reported.

    Args:
        name: what to call the tree on the terminal.
        tests: files or test ids, relative to the tree.
        workers: processes; 0 runs the tests in one.
        variables: more environment variables for the run.

    Raises:
        ForkError: pytest could not run, or could not collect a file.
    """
    report = tree / "report.jsonl"
    report.unlink(missing_ok=True)
    (tree / "selection.txt").write_text("\n".join(tests), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "upstream_tests", "-p", "no:cacheprovider", "-q", "--no-header"]
    command += ["--tb=no", "-rN", "--disable-warnings", "--rootdir", ".", "--numprocesses", str(workers)]
    command += ["--override-ini", "addopts=", "--override-ini", "filterwarnings="]
    # Called from a test that pytest-xdist runs, this run must not take itself for that worker.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = inherited | {
        "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(HERE.root)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PEFT_UPSTREAM_REPORT": str(report),
        **variables,
    }
    print(f"{name}: running upstream's tests", file=sys.stderr, flush=True)
    start = time.monotonic()
    # The output goes to stderr (2): pytest's rows of dots with their percentage are the progress.
    done = subprocess.run([*command, "@selection.txt"], cwd=tree, env=environment, stdout=2)
    if done.returncode not in (0, 1) or not report.is_file():
        raise ForkError(f"pytest could not run the {name} side (exit code {done.returncode}); see its output above.")
    side = Side(seconds=time.monotonic() - start)
    for line in report.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        # A test reports set-up, call and tear-down: the first that is not a pass decides.
        if side.outcomes.get(entry["test"], "passed") == "passed":
            side.outcomes[entry["test"]] = entry["outcome"]
            if entry["message"]:
                side.messages[entry["test"]] = entry["message"]
    return side


def _key(files: list[str]) -> str:
    """What the pristine result depends on, as a file name."""
    parts = [HERE.pin.sha256, platform.python_version(), platform.machine(), os.environ.get("HF_HUB_OFFLINE", "1")]
    parts += [str(RULES), *sorted(files), *(f"{package} {_version(package)}" for package in VERSIONS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The pytest plugin: what follows is called by pytest inside the runs.


def pytest_configure(config) -> None:
    """Keep upstream's `hub_online_once` from going online: each such try would wait for the network 46 s."""
    gathers_only = config.getoption("numprocesses") and "PYTEST_XDIST_WORKER" not in os.environ
    if os.environ["HF_HUB_OFFLINE"] == "1" and not gathers_only:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Those of torch's import, which pytest does not catch this early.
            from tests import testing_utils

        @contextmanager
        def stay_offline(model_id):
            yield

        testing_utils.hub_online_once = stay_offline


def pytest_collection_modifyitems(config, items) -> None:
    """Of the custom models, keep the tests of LoraConfig and MoELoraConfig, and those that are for no single method."""

    def wanted(item) -> bool:
        other = "Config-" in item.name and not re.search("-(MoE)?LoraConfig-", item.name)
        return item.path.name != "test_custom_models.py" or not other

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_runtest_logreport(report) -> None:
    """Write each phase of each test as one line; workers of pytest-xdist leave it to the process that gathers."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    outcome, text = report.outcome, report.longreprtext
    if outcome == "failed" and WANTS_THE_HUB.search(text):
        outcome = "hub"
    if outcome == "skipped" and hasattr(report, "wasxfail"):
        outcome = "xfailed"
    reason = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:]
    entry = {"test": report.nodeid, "outcome": outcome, "message": reason[0][1:].strip()[:300] if reason else ""}
    with open(os.environ["PEFT_UPSTREAM_REPORT"], "a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    sys.exit(main())
