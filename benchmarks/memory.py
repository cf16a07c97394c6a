"""Peak memory of a call, and the bytes it keeps for backward.

On CUDA the allocator's own peak counter. On a CPU torch has no such counter, but its allocator reports every block it
gives and takes back to `torch.profiler` (`profile_memory=True`), with the size and the time: summed in that order the
events are the level of memory, and their highest sum is the peak. Both count what *tensors* hold, whatever the C
library makes of it, so the figure is the same in every run, which resident memory is not (an allocator that keeps
freed memory makes that useless). Neither counts what libraries take for themselves: packed weights and scratch of
oneDNN and MKL, workspaces of cuBLAS outside torch's allocator.

The peak is counted above the level at the start, so parameters and inputs are not in it; gradients are, as a training
step makes them anew. Blocks that were there at the start and are freed in the call are not seen on a CPU (the profiler
does not know them): drop gradients before, not in, the call.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENT = "[memory]"


def peak_bytes(action: Callable[[], object], device: str) -> int:
    """Largest number of bytes that tensors hold at once during a call, above those held when it begins."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = action()  # held to the end: what is returned was not freed
    del result
    # The events behind `profiled.events()`, which adds up those inside an operator and so loses their order.
    events = profiled.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == MEMORY_EVENT]
    return highest_sum(change for _, change in sorted(changes, key=lambda change: change[0]))


def highest_sum(changes: Iterable[int]) -> int:
    """The largest of the running sums, and 0 for none."""
    level = peak = 0
    for change in changes:
        level += change
        peak = max(peak, level)
    return peak


def saved_bytes(action: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes of the tensors that a call keeps for its backward pass, each storage counted once.

    Args:
        action: a forward, or a whole step.
        parameters: whose storages are left out, as they are held anyway.
    """
    held = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # The tensors themselves are kept until the end, so that no address is given to a second storage.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in held)
