"""peft/upstream_tests.py: what counts as the same tests passing, and running it on a made-up upstream."""

import json
import os
import subprocess
import sys

import pytest
import upstream_tests
from fake_upstream import FILES, FORK_FOLDER, write_sdist
from fork_tool import tree as fork_tree
from upstream_tests import WANTS_THE_HUB, Side, describe, differences


def side(**outcomes) -> Side:
    return Side(outcomes=outcomes, messages=dict.fromkeys(outcomes, "AssertionError"))


@pytest.mark.parametrize(
    ("fork", "different"),
    [
        ({"a": "passed", "b": "failed", "c": "hub"}, set()),
        ({"a": "passed", "b": "failed", "c": "hub", "new": "passed"}, set()),
        ({"a": "passed", "b": "failed", "c": "hub", "new": "hub"}, set()),
        ({"a": "failed", "b": "failed", "c": "hub"}, {"a"}),
        ({"a": "skipped", "b": "failed", "c": "hub"}, {"a"}),
        ({"b": "failed", "c": "hub"}, {"a"}),
        ({"a": "passed", "b": "passed", "c": "hub"}, {"b"}),
        ({"a": "passed", "b": "failed", "c": "hub", "new": "failed"}, {"new"}),
    ],
)
def test_a_test_that_passes_on_one_side_only_is_a_difference(fork, different):
    assert differences(side(a="passed", b="failed", c="hub"), side(**fork)) == different


def test_a_row_more_in_a_table_of_cases_is_no_difference_but_what_it_hides_is():
    def at(config, row):
        return f"tests/test_config.py::test_copy[{config}-mandatory_kwargs{row}]"

    pristine = Side(
        outcomes={at("LoraConfig", 9): "passed", at("MissConfig", 10): "passed", at("OSFConfig", 11): "failed"}
    )
    further = {at("LoraConfig", 9): "passed", at("MissConfig", 10): "passed", at("MoELoraConfig", 11): "passed"}
    fork = Side(outcomes=further | {at("OSFConfig", 12): "failed"})
    assert differences(pristine.named(), fork.named()) == set()
    fork.outcomes[at("OSFConfig", 12)] = "passed"
    assert differences(pristine.named(), fork.named()) == {
        "tests/test_config.py::test_copy[OSFConfig-mandatory_kwargs]"
    }


def test_tests_alike_but_for_their_rows_are_numbered_in_the_order_of_the_rows():
    side = Side(outcomes={"test_a[kwargs10]": "failed", "test_a[kwargs9]": "passed", "test_b": "hub"})
    assert side.names() == {
        "test_a[kwargs9]": "test_a[kwargs]",
        "test_a[kwargs10]": "test_a[kwargs] (2)",
        "test_b": "test_b",
    }
    assert side.named().outcomes == {"test_a[kwargs]": "passed", "test_a[kwargs] (2)": "failed", "test_b": "hub"}


def test_the_summary_counts_and_names_what_differs():
    pristine, fork = (
        side(a="passed", b="failed", c="hub", d="skipped"),
        side(a="failed", b="failed", c="hub", e="passed"),
    )
    summary = upstream_tests._summary(pristine, fork, ["f"])
    assert not summary["same"] and summary["messages"] == {"a": "AssertionError"}
    assert summary["sides"]["pristine"] == {
        "ran": 4, "seconds": 0.0, "passed": 1, "failed": 1, "hub": 1, "skipped": 1, "xfailed": 0
    }  # fmt: skip
    assert summary["for_want_of_the_hub"] == ["c"]
    text = describe(summary)
    assert "pass on the pristine side only: 1\n    a\n" in text and "fail on both sides: 1\n    b: Assert" in text
    assert "added by the fork: 1\n    e\n" in text and text.endswith("NOT the same tests pass")


@pytest.mark.parametrize(
    "error",
    [
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder",
        "ConnectionError: Couldn't reach 'ybelkada/english_quotes_copy' on the Hub (LocalEntryNotFoundError)",
    ],
)
def test_failures_for_want_of_the_hub_are_told_from_others(error):
    assert WANTS_THE_HUB.search(error)
    assert not WANTS_THE_HUB.search("AssertionError: tensors differ")


@pytest.fixture
def two_sides(queue, tmp_path, monkeypatch):
    """upstream_tests at work on the made-up fork, whose release has tests for both sides."""
    for package in upstream_tests.REQUIREMENTS.values():
        if package in ("pytest", "xdist"):
            pytest.importorskip(package)
    tests = {
        "tests/testing_utils.py": "",
        "tests/test_mapping.py": (
            "import pytest\nfrom pathlib import Path\nimport peft\n"
            "text = (Path(peft.__file__).parent / 'mapping.py').read_text()\n"
            "def test_both(): assert 'line 1' in text\n"
            "@pytest.mark.parametrize('kwargs', [{}])\ndef test_pristine(kwargs): assert 'registry' not in text\n"
            "def test_hub(): raise OSError(\"We couldn't connect to 'https://huggingface.co'\")\n"
            "@pytest.mark.xfail\ndef test_known(): assert False\n"
            "@pytest.mark.skip\ndef test_skipped(): pass\n"
        ),
        "tests/test_custom_models.py": (
            "import pytest\n"
            "@pytest.mark.parametrize('x', [1, 2, 3], ids=['A-LoraConfig-k', 'B-GloraConfig-k', 'C-IA3Config-k'])\n"
            "def test_method(x): pass\n"
            "def test_common(): pass\n"
        ),
    }
    assert not tests.keys() & FILES.keys()
    queue.pin("9.0.1", queue.keep(write_sdist(tmp_path, "9.0.1", tests)))
    monkeypatch.setattr(upstream_tests, "REQUIREMENTS", {"pytest": "pytest"})
    monkeypatch.setattr(upstream_tests, "HERE", fork_tree.Fork(queue.root))
    # The runs load the plugin from the fork's folder.
    (queue.root / "upstream_tests.py").write_bytes((FORK_FOLDER / "upstream_tests.py").read_bytes())
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    return queue


def test_both_sides_are_run_and_compared(two_sides, tmp_path):
    names = ["--select", "test_mapping", "test_custom_models", "--workers", "0", "--output", str(tmp_path / "out")]
    assert upstream_tests.main(names) == 1
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["tests"]["pass_on_the_pristine_side_only"] == ["tests/test_mapping.py::test_pristine[kwargs]"]
    expected = {"ran": 7, "passed": 4, "failed": 0, "hub": 1, "skipped": 1, "xfailed": 1}
    assert {key: value for key, value in summary["sides"]["pristine"].items() if key != "seconds"} == expected
    assert (tmp_path / "out/summary.txt").read_text().endswith("NOT the same tests pass\n")


def test_the_pristine_result_is_kept_for_the_next_run(two_sides, tmp_path, monkeypatch):
    names = ["--select", "test_custom_models", "--workers", "0", "--output", str(tmp_path / "out")]
    assert upstream_tests.main(names) == 0
    runs = []
    real = upstream_tests.run_tests
    monkeypatch.setattr(upstream_tests, "run_tests", lambda name, *rest: runs.append(name) or real(name, *rest))
    assert upstream_tests.main(names) == 0
    assert runs == ["fork"]


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(upstream_tests, "REQUIREMENTS", {"no-such-package": "nsp"})
    assert upstream_tests.main([]) == 1
    assert "pip install no-such-package" in capsys.readouterr().err


def test_the_needed_packages_can_be_listed():
    done = subprocess.run(
        [sys.executable, FORK_FOLDER / "upstream_tests.py", "--requirements"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert {"diffusers", "parameterized", "scipy"} <= set(done.stdout.split())
