"""The pull request of this fork: its commits on the pinned release, and the example and settings that it brings."""

import importlib.util
import io
import json
import re
import sys
import tarfile
import tomllib
from pathlib import Path

import fork
import pytest
from fake_upstream import FORK_FOLDER, FakeFork
from fork_tool import pull_request as fork_pull_request
from fork_tool import release as fork_release
from fork_tool import tree as fork_tree
from peft import LoraConfig, MoELoraConfig, PeftConfig, get_peft_model
from tiny_models import tiny_folder

REAL = fork_tree.Fork(FORK_FOLDER)
EXAMPLE = FORK_FOLDER / "examples/moe_lora_finetuning/moe_lora_finetuning.py"
EXPERIMENTS = FORK_FOLDER / "method_comparison/MetaMathQA/experiments"


@pytest.fixture(scope="module")
def sdist() -> Path:
    try:
        return fork_release.find_sdist(REAL.pin.name, REAL.pin.version, REAL.pin.sha256)[0]
    except fork_release.ForkError as refused:
        pytest.skip(f"the pinned release is neither in the cache nor to be fetched: {refused}")


@pytest.fixture(scope="module")
def branch(sdist, tmp_path_factory) -> Path:
    """The pinned release as a git repository, on the branch that `fork.py pr` writes.

    The source distribution has no documentation, so the table of contents holds only the pages that ours follow.
    """
    scratch = tmp_path_factory.mktemp("upstream")
    folder = scratch / "peft"
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    (scratch / f"peft-{REAL.pin.version}").rename(folder)
    pages = tomllib.loads((FORK_FOLDER / "series.toml").read_text())["last"]["pages"]
    contents = "".join(f"- local: {page['after']}\n  title: one\n" for page in pages)
    for name, text in {"docs/source/_toctree.yml": contents, "tests/__init__.py": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    # ruff in the version that they pin comes from the registry; the test of style puts it back.
    project = folder / "pyproject.toml"
    project.write_text(re.sub(r"(?m)^required-version = .*\n", "", project.read_text()))
    FakeFork.git(folder, "init", "--quiet", "--initial-branch", "main")
    for key, value in {"user.name": "Ada", "user.email": "ada@example.org"}.items():
        FakeFork.git(folder, "config", key, value)
    FakeFork.git(folder, "add", "--all")
    FakeFork.git(folder, "commit", "--quiet", "--message", f"Release {REAL.pin.version}")
    assert fork.main(["pr", str(folder)]) == 0
    return folder


def test_the_branch_ends_as_the_built_tree_and_each_commit_says_why(branch):
    own_version = f'__version__ += "+{REAL.pin.suffix}"\n'.encode()  # all that stays here
    for path in REAL.root.glob("src/peft/**/*.py"):
        assert (branch / path.relative_to(REAL.root)).read_bytes() == path.read_bytes().replace(own_version, b""), path
    subjects = FakeFork.git(branch, "log", "--reverse", "--format=%s", "main..").splitlines()
    assert subjects == [*(patch.subject for patch in REAL.patches if not patch.stays_here), "Document routed LoRA"]
    for commit in FakeFork.git(branch, "rev-list", "main..").split():
        message = FakeFork.git(branch, "log", "-1", "--format=%B", commit)
        assert len(message.splitlines()) >= 3 and "Upstream:" not in message


def test_a_commit_imports_no_module_of_a_later_one(branch):
    """Read from the import statements, at each commit; `fork.py verify` runs the imports."""
    held = set()
    for commit in FakeFork.git(branch, "rev-list", "--reverse", "main..").split():
        changed = FakeFork.git(branch, "show", "--format=", "--name-only", commit).split()
        held |= {Path(path).stem for path in changed if "moe" in path} | {
            Path(path).parent.name for path in changed if path.endswith("__init__.py")
        }
        for path in (path for path in changed if path.endswith(".py")):
            text = FakeFork.git(branch, "show", f"{commit}:{path}")
            for name in re.findall(r"(?m)^from (?:peft\.tuners\.lora)?\.?(moe_\w+) import", text):
                assert name in held, f"{path} needs {name} at {commit}"


@pytest.mark.slow
@pytest.mark.registry
def test_every_commit_passes_the_ruff_that_upstream_pins_and_can_be_imported(branch, sdist, capsys):
    with tarfile.open(sdist) as archive:
        pinned = io.TextIOWrapper(archive.extractfile(f"peft-{REAL.pin.version}/pyproject.toml")).read()
    FakeFork.git(branch, "switch", "--quiet", "main")
    (branch / "pyproject.toml").write_text(pinned)
    FakeFork.git(branch, "commit", "--quiet", "--all", "--message", "The version of ruff")
    FakeFork.git(branch, "branch", "--quiet", "-D", "moe-lora")
    assert fork.main(["pr", str(branch)]) == 0
    assert fork.main(["verify", str(branch), "--tests", "none"]) == 0, capsys.readouterr().out


def test_every_file_of_ours_comes_with_one_commit_of_the_plan(sdist):
    plan = fork_pull_request.read_plan(REAL, fork_release.read_sdist(sdist).files)
    brought = [path for step in plan for path in step.files]
    assert len(set(brought)) == len(brought)
    tracked = {path for path in brought if path.startswith(("src/", "tests/"))}
    assert {path.relative_to(REAL.root).as_posix() for path in REAL.root.glob("tests/*.py")} <= tracked
    assert plan[-1].patch is None and {path.split("/")[0] for path in plan[-1].files} == set(fork_pull_request.LAST)


@pytest.mark.parametrize("folder", sorted((EXPERIMENTS / "moe_lora").iterdir()), ids=lambda folder: folder.name)
def test_a_setting_of_the_method_comparison_is_read_as_what_it_says(folder):
    config = PeftConfig.from_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config, MoELoraConfig)
    assert {key: value for key, value in config.to_dict().items() if key in written} == written
    if (folder / "training_params.json").exists():
        assert set(json.loads((folder / "training_params.json").read_text())) <= {"optimizer_kwargs", "max_steps"}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[EXAMPLE.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny random model and some text."""
    folder = tiny_folder(tmp_path_factory.mktemp("base"), hidden_size=16, num_hidden_layers=1)
    (folder / "quotes.txt").write_text("a mixture of experts\nweighs them for each token\n" * 8)
    return folder


def options(base, output):
    common = {"base_model": base, "dataset_name": base / "quotes.txt", "output_dir": output, "max_steps": 2}
    return [text for name, value in common.items() for text in (f"--{name}", str(value))]


def test_the_example_trains_a_mixture_that_can_be_loaded(example, base, tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM

    example.main([*options(base, tmp_path), "--num_experts", "3", "--r", "2"])
    assert "'expert_2': " in capsys.readouterr().out
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert model.base_model.moe_router.expert_names == ["expert_0", "expert_1", "expert_2"]


def test_the_example_composes_adapters_and_trains_the_router_alone(example, base, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    experts = {}
    for name in ("math", "code"):
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
        experts[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    given = [f"{name}={tmp_path / name}" for name in experts]
    example.main([*options(base, tmp_path / "out"), "--top_k", "1", "--experts", *given])
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any("moe_router" in key for key in saved)
    for name, weights in experts.items():
        for key, weight in weights.items():
            mixed = key.replace(".weight", f".{name}.weight")
            assert saved[mixed].equal(weight), key


def test_the_example_says_how_experts_are_given(example, base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main([*options(base, tmp_path), "--experts", "math"])
    assert "--experts takes NAME=ADAPTER" in capsys.readouterr().err
