# Copyright 2026-present the routed LoRA authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Two processes give the gradients of one: DDP and FSDP2, on gloo and the CPU.

The coefficient of the balance loss is zero here: it is the product of two means over a batch, so each process balances its
own half, as everywhere else where such a loss is used. The z-loss and the entropy are means over tokens; over two halves
of equal size they average to that of the whole batch, and are left on.
"""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from moe_testing import SCOPES, tiny_mixture, tokens, trainable_gradients
from torch.distributed.fsdp import fully_shard


pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD_SIZE = 2
LOSSES = {"router_balance_coef": 0.0, "router_z_coef": 0.3, "router_entropy_coef": 0.2}
IDS = tokens(4, 8)
CHECKPOINTING = {"none": None, "reentrant": True, "not_reentrant": False}


def mixture(scope, checkpointing="none"):
    model = tiny_mixture("llama", scope, top_k=2, **LOSSES).train()
    if CHECKPOINTING[checkpointing] is not None:
        use_reentrant = CHECKPOINTING[checkpointing]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    return model


def step(model, ids):
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.loss.detach()


def half(rank):
    return IDS.chunk(WORLD_SIZE)[rank]


def averaged(loss):
    dist.all_reduce(loss)
    return loss / WORLD_SIZE


def run_ddp(rank, scope, checkpointing):
    model = mixture(scope, checkpointing)
    loss = step(torch.nn.parallel.DistributedDataParallel(model), half(rank))
    return averaged(loss), trainable_gradients(model)


def run_ddp_unused(rank, scope, checkpointing):
    """As transformers' Trainer runs adapters: looking for unused parameters, for which DDP builds the output anew."""
    model = mixture(scope, checkpointing)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    output = wrapped(input_ids=half(rank), labels=half(rank))
    output.loss.backward()
    assert output.router_z_loss is output["router_z_loss"] and output.router_z_loss.isfinite()
    return averaged(output.loss.detach()), trainable_gradients(model)


def sharded(model):
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def run_fsdp(rank, scope, checkpointing):
    model = sharded(mixture(scope, checkpointing))
    loss = step(model, half(rank))
    gradients = {name: gradient.full_tensor() for name, gradient in trainable_gradients(model).items()}
    return averaged(loss), gradients


def run_fsdp_forward(rank, scope, checkpointing):
    """Logits after: a forward in eval, which fills what layers keep of their experts, a training step, and another."""
    model = sharded(mixture(scope))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with torch.no_grad():
        model.eval()(input_ids=half(rank))
    step(model.train(), half(rank))
    optimizer.step()
    with torch.no_grad():
        logits = model.eval()(input_ids=half(rank)).logits
    gathered = [torch.empty_like(logits) for _ in range(WORLD_SIZE)]
    dist.all_gather(gathered, logits.contiguous())
    return torch.cat(gathered), {}


CASES = {
    **{("ddp", scope, "none"): run_ddp for scope in SCOPES},
    **{("ddp", "block", how): run_ddp for how in ("reentrant", "not_reentrant")},
    **{("ddp_unused", scope, "none"): run_ddp_unused for scope in SCOPES},
    **{("fsdp", scope, "none"): run_fsdp for scope in SCOPES},
    ("fsdp", "block", "not_reentrant"): run_fsdp,
    **{("fsdp_forward", scope, "none"): run_fsdp_forward for scope in SCOPES},
}


def run_all(rank, port, folder):
    """What each process does: every case in turn, the first process writes down what came out."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    try:
        results = {}
        for case, run in CASES.items():
            try:
                results["-".join(case)] = run(rank, *case[1:])
            except Exception as error:  # told to the test of this case; both processes fail alike
                results["-".join(case)] = f"{type(error).__name__}: {error}"
        if rank == 0:
            torch.save(results, os.path.join(folder, "results.pt"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # By path, not by module name, which depends on how pytest imports its tests.
    commands = [[sys.executable, __file__, str(rank), str(port), str(folder)] for rank in range(WORLD_SIZE)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return torch.load(folder / "results.pt", weights_only=True)


def result_of(results, *case):
    result = results["-".join(case)]
    if isinstance(result, str):
        pytest.fail(result)
    return result


def check_against_one_process(scope, checkpointing, loss, gradients):
    model = mixture(scope, checkpointing)
    torch.testing.assert_close(loss, step(model, IDS), rtol=0, atol=1e-5)
    # float32 sums in another order
    torch.testing.assert_close(gradients, trainable_gradients(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope, checkpointing", [case[1:] for case in CASES if case[0] == "ddp"])
def test_ddp_gives_the_gradients_of_one_process(scope, checkpointing, results):
    check_against_one_process(scope, checkpointing, *result_of(results, "ddp", scope, checkpointing))


@pytest.mark.parametrize("scope", SCOPES)
def test_ddp_that_looks_for_unused_parameters_gives_them_too(scope, results):
    check_against_one_process(scope, "none", *result_of(results, "ddp_unused", scope, "none"))


@pytest.mark.parametrize("scope, checkpointing", [case[1:] for case in CASES if case[0] == "fsdp"])
def test_fsdp2_gives_the_gradients_of_one_process(scope, checkpointing, results):
    check_against_one_process(scope, checkpointing, *result_of(results, "fsdp", scope, checkpointing))


@pytest.mark.parametrize("scope", SCOPES)
def test_fsdp2_gives_the_logits_of_one_process_after_a_step(scope, results):
    logits, _ = result_of(results, "fsdp_forward", scope, "none")
    model = mixture(scope)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    step(model, IDS)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=0, atol=1e-5)


if __name__ == "__main__":
    run_all(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
