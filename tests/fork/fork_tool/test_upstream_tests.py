"""peft/fork_tool/upstream_tests.py: what counts as the same tests passing, and running it on a made-up upstream."""

import pytest
from fake_upstream import FILES, write_sdist
from fork_tool import upstream_tests
from fork_tool.upstream_tests import WANTS_THE_HUB, Side, describe, differences


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
    text = describe(pristine, fork, {"f"})
    counts = "1 passed, 1 failed, 1 could not run for want of the hub, 1 skipped, 0 failed as expected"
    assert text.startswith(f"  pristine  4 tests in 0 s: {counts}\n")
    assert "pass on the pristine side only: 1\n    a: AssertionError\n" in text
    assert "fail on both sides: 1\n    b: AssertionError\n" in text
    assert "added by the fork: 1\n    e: " in text and "passed at the second try: 1\n    f\n" in text
    assert text.endswith("\nNOT the same tests pass") and describe(fork, fork, set()).endswith("\nthe same tests pass")


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
    """Runs `test` of the made-up fork, whose release has tests for both sides, on some of the files."""
    pytest.importorskip("xdist")
    tests = {
        "tests/testing_utils.py": "",
        "tests/test_mapping.py": (
            "import pytest\nfrom pathlib import Path\nimport peft\n"
            "text = (Path(peft.__file__).parent / 'mapping.py').read_text()\n"
            "def test_both(): assert 'line 1' in text\n"
            "class TestClass:\n    @pytest.mark.parametrize('kwargs', [{}])\n"
            "    def test_pristine(self, kwargs): assert 'registry' not in text\n"
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
    monkeypatch.setattr(upstream_tests, "REQUIREMENTS", ("pytest",))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")

    def run(*names):
        code, out, _ = queue.run("test", "--select", *names, "--workers", "0", "--output", str(tmp_path / "out"))
        return code, out

    return run


def test_both_sides_are_run_and_compared(two_sides, tmp_path):
    code, out = two_sides("test_mapping", "test_custom_models")
    assert code == 1
    summary = (tmp_path / "out/summary.txt").read_text()
    assert out.startswith(summary)
    assert (
        "pass on the pristine side only: 1\n    tests/test_mapping.py::TestClass::test_pristine[kwargs]: Ass"
        in summary
    )
    assert ": 4 passed, 0 failed, 1 could not run for want of the hub, 1 skipped, 1 failed as expected\n" in summary
    assert "  pristine  7 tests in " in summary and summary.endswith("NOT the same tests pass\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.txt", "pristine.xml", "fork.xml"}


def test_the_pristine_result_is_kept_for_the_next_run(two_sides, monkeypatch):
    assert two_sides("test_custom_models")[0] == 0
    runs = []
    real = upstream_tests.run_tests
    monkeypatch.setattr(upstream_tests, "run_tests", lambda name, *rest: runs.append(name) or real(name, *rest))
    assert two_sides("test_custom_models")[0] == 0
    assert runs == ["fork"]


def test_a_missing_package_is_named(queue, monkeypatch):
    monkeypatch.setattr(upstream_tests, "REQUIREMENTS", ("no-such-package",))
    assert "pip install no-such-package" in queue.refused("test")


def test_the_needed_packages_can_be_listed(home):
    assert {"diffusers", "parameterized", "scipy"} <= set(home.command("test", "--requirements").split())
