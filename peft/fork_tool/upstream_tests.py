"""PEFT's own LoRA tests on the pristine release and on the fork: a run of pytest on each, and their reports compared.

The release's source distribution carries the tests. Both sides run in trees of their own, with the tests' models from
the local Hugging Face cache only, unless HF_HUB_OFFLINE=0 is set. The report of the pristine side is kept in the cache
folder of fork.py, so that later runs repeat only the fork's side. This file is also the pytest plugin of those runs.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fork_tool.patches import apply_queue
from fork_tool.release import ForkError, cache_folder, load_release
from fork_tool.tree import Fork, build, own_files


# What upstream's tests, or modules of PEFT that they import, need. `attrs` is used by peft.tuners.lora.corda, which
# PEFT's own dependencies do not cover.
REQUIREMENTS = (
    "attrs",
    "datasets",
    "diffusers",
    "parameterized",
    "pytest",
    "pytest-xdist",
    "scikit-learn",
    "scipy",
)
# Every test of these files is LoRA's or common to all methods, but for the first, see WANTED.
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
# Of the custom models, the tests of LoraConfig and MoELoraConfig, and those that are for no single method.
WANTED = "not (test_custom_models.py and Config- and not -LoraConfig- and not -MoELoraConfig-)"
# What a failure says when only a model or a data set of the hub was missing.
WANTS_THE_HUB = re.compile(
    r"LocalEntryNotFound|OfflineMode|offline mode|[Cc]ouldn't connect to|[Cc]ouldn't reach|huggingface\.co|"
    r"not the path to a directory|Can't load .* for|cannot find the requested files in the local cache|"
    r"Couldn't find any data file|Cannot find an appropriate cached snapshot"
)
# pytest names a case that is a dict by its argument and by its row in the table of cases, such as config_kwargs38.
ROW = re.compile(r"(?<=kwargs)\d+")
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


REPORT = "report.xml"


@dataclass(kw_only=True)
class Side:
    """The outcome of one side.

    Args:
        seconds: how long the tests took.
        outcomes: test id -> passed, failed, hub (failed for want of it), skipped or xfailed.
        messages: test id -> first line of what it failed with.
    """

    seconds: float = 0.0
    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

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


def compare(fork: Fork, output: Path, *, files: list[str], workers: int, again: bool) -> tuple[str, bool]:
    """Run both sides of these test files; tests that pass on one side only are run once more on both, alone.

    Args:
        output: receives `pristine.xml` and `fork.xml`, pytest's reports, and `summary.txt`.
        files: names of upstream's test files, without their suffix.
        workers: processes of a side.
        again: run the pristine side even when its report is kept.

    Returns:
        The comparison in words, and whether the same tests pass.

    Raises:
        ForkError: a package is missing, the fork cannot be built, or a test file cannot be collected.
    """
    if missing := [package for package in REQUIREMENTS if _version(package) is None]:
        raise ForkError(f"Upstream's tests need {', '.join(missing)}. Install with: pip install {' '.join(missing)}")
    build(fork)
    release = load_release(fork.pin)
    own = {path: (fork.root / path).read_bytes() for path in own_files(fork, release.files)}
    tests = [f"tests/{name}.py" for name in files]
    kept = cache_folder() / "upstream-tests" / f"{_key(fork, files)}.xml"
    for folder in (kept.parent, output):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peft-upstream-tests-") as scratch:
        trees = {"pristine": Path(scratch, "pristine"), "fork": Path(scratch, "fork")}
        _write_tree(trees["pristine"], release.files)
        _write_tree(trees["fork"], apply_queue(release.files, fork.patches) | own)
        if again or not kept.is_file():
            run_tests("pristine", trees["pristine"], tests, workers)
            shutil.copy(trees["pristine"] / REPORT, kept)
        else:
            print(f"pristine: result of an earlier run ({kept})", file=sys.stderr, flush=True)
        sides = {
            "pristine": read_report(kept, trees["pristine"]),
            "fork": run_tests("fork", trees["fork"], tests, workers),
        }
        shutil.copy(kept, output / "pristine.xml")
        shutil.copy(trees["fork"] / REPORT, output / "fork.xml")
        different = differences(*(side.named() for side in sides.values()))
        if different:
            print(f"{len(different)} tests differ; running them once more on both sides", file=sys.stderr, flush=True)
        for name, side in sides.items():
            if present := [test for test, named in side.names().items() if named in different]:
                second = run_tests(name, trees[name], present, 0)
                side.outcomes |= second.outcomes
                side.messages |= second.messages
    pristine, forked = (side.named() for side in sides.values())
    title = (
        f"PEFT's own LoRA tests, {fork.pin.name} {fork.pin.version} against {fork.pin.name} {fork.pin.fork_version} "
        f"(Python {platform.python_version()}, torch {_version('torch')}, transformers {_version('transformers')}):"
    )
    text = f"{title}\n{describe(pristine, forked, different - differences(pristine, forked))}"
    (output / "summary.txt").write_text(text + "\n", encoding="utf-8")
    return text, not differences(pristine, forked)


def differences(pristine: Side, fork: Side) -> set[str]:
    """Tests of the release that pass on one side only, and tests that only the fork has and that fail; both `named`."""
    common = pristine.outcomes.keys()
    added = {test for test, found in fork.outcomes.items() if test not in common and found == "failed"}
    return (pristine.passed() ^ (fork.passed() & common)) | added


def describe(pristine: Side, fork: Side, second_try: set[str]) -> str:
    """The comparison in words; both sides `named`, and the tests that were the same on both at the second try alone."""
    lines = []
    for name, side in (("pristine", pristine), ("fork", fork)):
        count = Counter(side.outcomes.values())
        lines.append(
            f"  {name:<9} {len(side.outcomes)} tests in {side.seconds:.0f} s: {count['passed']} passed, "
            f"{count['failed']} failed, {count['hub']} could not run for want of the hub, {count['skipped']} skipped, "
            f"{count['xfailed']} failed as expected"
        )
    different = differences(pristine, fork)
    both = {test for test, found in pristine.outcomes.items() if found == fork.outcomes.get(test) == "failed"}
    groups = {
        "pass on the pristine side only": different & pristine.passed(),
        "pass on the fork only": different & fork.passed(),
        "fail in the fork which alone has them": different - pristine.outcomes.keys(),
        "added by the fork": fork.outcomes.keys() - pristine.outcomes.keys(),
        "passed at the second try": second_try,
        "fail on both sides": both,
    }
    for title, tests in groups.items():
        if tests:
            lines.append(f"  {title}: {len(tests)}")
            messages = {test: fork.messages.get(test) or pristine.messages.get(test) for test in tests}
            lines += [f"    {test}" + (f": {said}" if said else "") for test, said in sorted(messages.items())]
    return "\n".join([*lines, "NOT the same tests pass" if different else "the same tests pass"])


def run_tests(name: str, tree: Path, tests: list[str], workers: int, **variables: str) -> Side:
    """Run tests in a tree and read pytest's report.

    Args:
        name: what to call the tree on the terminal.
        tests: files or test ids, relative to the tree.
        workers: processes; 0 runs the tests in one.
        variables: more environment variables for the run.

    Raises:
        ForkError: pytest could not run, or could not collect a file.
    """
    report = tree / REPORT
    report.unlink(missing_ok=True)
    (tree / "selection.txt").write_text("\n".join(tests), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", __name__, "-p", "no:cacheprovider", "-q", "--no-header"]
    command += ["--tb=no", "-rN", "--disable-warnings", "--rootdir", ".", "--numprocesses", str(workers)]
    command += ["--override-ini", "addopts=", "--override-ini", "filterwarnings=", "-k", WANTED]
    # Called from a test that pytest-xdist runs, this run must not take itself for that worker.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = inherited | {
        "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(Path(__file__).parents[1])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **variables,
    }
    print(f"{name}: running upstream's tests", file=sys.stderr, flush=True)
    # The output goes to stderr (2): pytest's rows of dots with their percentage are the progress.
    done = subprocess.run([*command, f"--junitxml={REPORT}", "@selection.txt"], cwd=tree, env=environment, stdout=2)
    if done.returncode not in (0, 1) or not report.is_file():
        raise ForkError(f"pytest could not run the {name} side (exit code {done.returncode}); see its output above.")
    return read_report(report, tree)


def read_report(report: Path, tree: Path) -> Side:
    """What pytest's JUnit file says of each test; of a test that stands in it twice, the first that is not a pass."""
    suite = ElementTree.parse(report).find("testsuite")
    side = Side(seconds=float(suite.get("time")))
    for case in suite.iter("testcase"):
        test = _test_id(case, tree)
        if side.outcomes.get(test, "passed") != "passed":
            continue
        said = next((element for element in case if element.tag in ("failure", "error", "skipped")), None)
        if said is None:
            side.outcomes[test] = "passed"
            continue
        text = said.text or ""
        if said.tag == "skipped":
            side.outcomes[test] = "xfailed" if said.get("type") == "pytest.xfail" else "skipped"
        else:
            side.outcomes[test] = "hub" if WANTS_THE_HUB.search(text) else "failed"
            reason = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:] or [""]
            side.messages[test] = reason[0][1:].strip()[:300]
    return side


def _test_id(case: ElementTree.Element, tree: Path) -> str:
    """The id that pytest runs a test by; the report joins its file and its classes by dots."""
    parts = case.get("classname").split(".")
    paths = (("/".join(parts[:depth]) + ".py", depth) for depth in range(1, len(parts) + 1))
    path, depth = next((path, depth) for path, depth in paths if (tree / path).is_file())
    return "::".join([path, *parts[depth:], case.get("name")])


def _rows(test: str) -> list[int]:
    return [int(row) for row in ROW.findall(test)]


def _write_tree(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in (files | {"tests/__init__.py": b""}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def _key(fork: Fork, files: list[str]) -> str:
    """What the pristine report depends on, as a file name."""
    parts = [fork.pin.sha256, platform.python_version(), platform.machine(), os.environ.get("HF_HUB_OFFLINE", "1")]
    parts += [WANTED, *sorted(files), *(f"{package} {_version(package)}" for package in VERSIONS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
