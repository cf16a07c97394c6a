"""Two processes on the CPU, started as docs/scaling.md says, against one process that reads the same rows."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

import train
from dylo_moe.training import comparison

ROOT = Path(__file__).parents[1]

# accelerate shards on accelerators only. Told that CPU processes are such, it goes the same way with gloo.
FSDP_ON_CPU = """
import sys
import accelerate.state as state
from torch.distributed.fsdp import FSDPModule

made = state.PartialState.__init__

def as_if_on_accelerators(self, *args, **kwargs):
    made(self, *args, **kwargs)
    if self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU

state.PartialState.__init__ = as_if_on_accelerators
import train
from dylo_moe.training.trainer import RoutedTrainer

saved = RoutedTrainer.save_model

def says_what_is_sharded(self, *args, **kwargs):
    sharded = [type(module).__name__ for module in self.model_wrapped.modules() if isinstance(module, FSDPModule)]
    print("sharded", *sharded, file=sys.stderr)
    return saved(self, *args, **kwargs)

RoutedTrainer.save_model = says_what_is_sharded
sys.exit(train.main())
"""


def launch(config: str, script: Path, argv: list[str]) -> str:
    """Run a script in two processes; returns what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / config)]
    command += ["--num_processes", "2", "--main_process_port", str(port), str(script), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=script.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def losses(run: Path) -> list[float]:
    history = json.loads((run / "mixture" / "finished.json").read_text())["history"]
    return [line["loss"] for line in history if "loss" in line]


@pytest.fixture(scope="module")
def one_process(tiny_options, tmp_path_factory):
    """A function that makes options for runs of the same rows in a step; and the run of one process."""
    folder = tmp_path_factory.mktemp("scaling")

    def argv(name: str, **changed) -> list[str]:
        chosen = {"num_steps": 6, "save_steps": 3, "logging_steps": 1, "compare": False, "balance_coefficient": 0}
        return tiny_options(folder / name, **{**chosen, **changed})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_speeds", lambda *args: {"base": 1.0, "routed": 1.0, "separate": 1.0})
        assert train.main(argv("one", train_batch_size=4)) == 0
    return folder, argv


def assert_same_training(run: Path, reference: Path) -> None:
    # float32: gradients are added in another order
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    found, expected = (load_file(folder / "mixture" / "adapter_model.safetensors") for folder in (run, reference))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    both = [json.loads((folder / "results.json").read_text())["perplexity"]["mixture"] for folder in (run, reference)]
    assert list(both[0].values()) == pytest.approx(list(both[1].values()), rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU")
def test_two_processes_have_the_losses_of_one(one_process):
    folder, argv = one_process
    launch("ddp.yaml", ROOT / "train.py", argv("two", train_batch_size=2))
    assert_same_training(folder / "two", folder / "one")
    assert len(list((folder / "two" / "mixture" / "checkpoints" / "checkpoint-6").glob("rng_state_*.pth"))) == 2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU")
def test_fsdp2_has_the_losses_of_one_process(one_process):
    folder, argv = one_process
    script = folder / "fsdp_on_cpu.py"
    script.write_text(FSDP_ON_CPU)
    said = launch("fsdp2.yaml", script, argv("sharded", train_batch_size=2))
    assert re.search(r"sharded (\w+ )*FSDPLlamaDecoderLayer FSDPLlamaDecoderLayer", said)
    assert_same_training(folder / "sharded", folder / "one")
    assert (folder / "sharded" / "mixture" / "checkpoints" / "checkpoint-6" / "complete.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on one GPU")
def test_a_sharded_run_that_was_stopped_goes_on(one_process):
    folder, argv = one_process
    script = folder / "fsdp_on_cpu.py"
    script.write_text(FSDP_ON_CPU)
    launch("fsdp2.yaml", script, argv("stopped", train_batch_size=2))
    (folder / "stopped" / "mixture" / "finished.json").unlink()
    newest = folder / "stopped" / "mixture" / "checkpoints" / "checkpoint-6"
    (newest / "complete.json").unlink()
    said = launch("fsdp2.yaml", script, [*argv("stopped", train_batch_size=2), "--resume_from_checkpoint"])
    assert "continuing from" in said and "checkpoint-3" in said
    assert_same_training(folder / "stopped", folder / "one")


def test_the_launcher_reads_the_commands_of_the_page():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"accelerate launch (.*?train\.py .*?)(?:'?)$", page, flags=re.M)
    assert len(commands) == 4
    parser = launch_command_parser()
    for command in commands:
        command = re.sub(r"\$\(\(.*?\)\)|\$\([^()]*\)|\$\w+", "4", command)
        read = parser.parse_args(shlex.split(command))
        assert (ROOT / read.config_file).is_file()
        assert Path(read.training_script).name == "train.py"


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml"])
def test_every_key_of_a_launchers_file_is_known_to_it(name):
    written = yaml.safe_load((ROOT / "configs" / name).read_text())
    ClusterConfig.from_yaml_file(ROOT / "configs" / name)  # refuses unknown keys
    flags = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    assert [key for key in written.get("fsdp_config", {}) if f"--{key}" not in flags] == []


def test_the_options_in_configs_are_options_of_train_py(tmp_path):
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if path.name not in ("ddp.yaml", "fsdp2.yaml"):
            with pytest.raises(SystemExit) as stopped:
                train.main(["--config", str(path), "--help"])
            assert stopped.value.code == 0
