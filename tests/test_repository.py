"""What holds for the repository as a whole: its size, what its files must not name, versions that agree, the fork."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LARGEST_FILE = 12 * 1000**2  # bytes: what the committed base model may weigh

# Folders of one person's or one machine's own. Paths that begin elsewhere (a/root/b) are none of them.
MACHINE_PATH = re.compile(r"(?<![\w.~{}$*-])/(?:root|work|home/\w+|Users/\w+|opt|tmp/\w+|mnt|workspace)/[\w.-]*")
REGISTRY_HOST = re.compile(
    r"\b(?:(?:\w+\.)?pypi\.org|\w+\.pythonhosted\.org|registry\.npmjs\.org|download\.pytorch\.org)\b"
)


def repository_files() -> list[Path]:
    """The files that git tracks, and those that it would take in."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).is_file()]


def lines_that_match(pattern: re.Pattern, files: list[Path]) -> list[str]:
    """`path:line: match` of every match in a text file."""
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{line}: {match[0]}")
    return found


def read_toml(name: str) -> dict:
    return tomllib.loads((ROOT / name).read_text(encoding="utf-8"))


def constraints() -> dict[str, Version]:
    """Canonical name -> tested version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert len({canonicalize_name(name) for name in pinned}) == len(pinned), "a package is named twice"
    return {canonicalize_name(name): Version(version) for name, version in pinned.items()}


def requirements() -> list[Requirement]:
    """All that pyproject.toml asks for: to build, to run, and for each extra."""
    project = read_toml("pyproject.toml")
    extras = [line for lines in project["project"]["optional-dependencies"].values() for line in lines]
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras]
    return [Requirement(line) for line in asked]


def fork_version() -> str:
    pin = read_toml("peft/upstream.toml")
    return f"{pin['version']}+{pin['suffix']}"


def test_no_file_is_larger_than_the_base_model_may_be():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in repository_files()}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}


def test_no_file_names_a_folder_of_one_machine():
    assert lines_that_match(MACHINE_PATH, repository_files()) == []


def test_no_file_names_the_host_of_a_registry():
    assert lines_that_match(REGISTRY_HOST, repository_files()) == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATH, "cache = '/{}/.cache'".format("root")),
        (MACHINE_PATH, "see /{}/ada/notes".format("home")),
        (MACHINE_PATH, "(/{}/dev/venv)".format("tmp")),
        (REGISTRY_HOST, "https://{}.org/simple".format("pypi")),
        (REGISTRY_HOST, "https://files.{}.org/packages".format("pythonhosted")),
        (REGISTRY_HOST, "--index-url https://download.{}.org/whl/cpu".format("pytorch")),
    ],
)
def test_a_forbidden_name_is_found_with_its_line(tmp_path, pattern, text):
    (tmp_path / "a.txt").write_text(f"fine: src/root/a, ~/work/b, tmp_path / 'c'\n{text}\n")
    found = lines_that_match(pattern, [tmp_path / "a.txt"])
    assert len(found) == 1
    assert found[0].startswith("a.txt:2: ")


def test_every_dependency_has_a_tested_version_that_it_allows():
    tested = constraints()
    for requirement in requirements():
        if requirement.name == "peft":
            continue
        name = canonicalize_name(requirement.name)
        assert name in tested, f"constraints.txt lacks {name}"
        assert requirement.specifier.contains(tested[name]), f"{requirement} does not allow {tested[name]}"


def test_every_dependency_has_a_lower_bound():
    without = [
        str(asked) for asked in requirements() if not {"==", ">="} & {part.operator for part in asked.specifier}
    ]
    assert without == []


def test_the_tested_versions_are_those_of_any_registry():
    assert {name: str(version) for name, version in constraints().items() if version.local} == {}


def test_the_project_asks_for_the_fork_that_is_pinned():
    asked = [str(requirement) for requirement in requirements() if requirement.name == "peft"]
    assert asked == [f"peft=={fork_version()}"]
    assert "peft" not in constraints()


def test_the_citation_and_the_changelog_are_of_this_version():
    project = read_toml("pyproject.toml")["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format asks for
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert f"\n## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_public_workflow_runs_make_test_on_the_oldest_python_and_may_only_read():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make test"]
    (python,) = (step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python@"))
    assert read_toml("pyproject.toml")["project"]["requires-python"] == f">={python['python-version']}"
    assert (ROOT / python["cache-dependency-path"]).is_file()


def test_the_quickstart_names_each_script():
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w-]+)` \|", page, flags=re.M)
    assert named == list(read_toml("pyproject.toml")["project"]["scripts"])


def test_the_project_and_the_fork_need_the_same_python():
    assert read_toml("peft/pyproject.toml")["project"]["requires-python"] == ">=3.11"
    assert read_toml("pyproject.toml")["project"]["requires-python"] == ">=3.11"


def test_the_extra_for_upstreams_tests_is_what_they_say_they_need():
    command = [sys.executable, "peft/fork.py", "test", "--requirements"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    extra = read_toml("pyproject.toml")["project"]["optional-dependencies"]["upstream"]
    assert sorted(said) == sorted(Requirement(line).name for line in extra)


def test_import_peft_in_the_top_folder_gives_the_fork_and_not_the_folder():
    program = "import peft; print(peft.__file__, hasattr(peft, 'MoELoraConfig'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, has_the_config = done.stdout.split()
    assert Path(file).name == "__init__.py"
    assert has_the_config == "True"


def test_the_committed_base_is_part_of_the_package():
    held = {path.name for path in (ROOT / "moe_common" / "models" / "base").iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= held
    assert read_toml("pyproject.toml")["tool"]["setuptools"]["package-data"]["moe_common"] == ["models/base/*"]
