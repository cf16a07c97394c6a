"""Which device each expert lies on, by accelerate's own measures.

The largest expert is placed first, on the device with the most free memory; one that fits on no single device is split
over all that are left. The CPU takes what no other device has room for.
"""

import logging
from collections.abc import Sequence

import torch
from accelerate import dispatch_model
from accelerate.utils import compute_module_sizes, get_balanced_memory, get_max_memory, infer_auto_device_map
from torch import nn

logger = logging.getLogger(__name__)

Device = int | str
DeviceMap = dict[str, Device]
CPU = "cpu"
GIB = 2**30


def plan_placement(models: Sequence[nn.Module], max_memory: dict[Device, int]) -> list[DeviceMap]:
    """A device map for each model; {"": device} where it lies on one.

    Args:
        models: may be on the meta device.
        max_memory: bytes that are free on each device, the CPU among them where it may be used.

    Raises:
        ValueError: they do not fit.
    """
    free = dict(max_memory)
    sizes = [compute_module_sizes(model)[""] for model in models]
    maps: list[DeviceMap] = [{} for _ in models]
    for number in sorted(range(len(models)), key=lambda place: -sizes[place]):
        model, size = models[number], sizes[number]
        accelerators = {device: room for device, room in free.items() if device != CPU}
        freest = max(accelerators, key=accelerators.get, default=CPU)
        if size <= free.get(freest, 0):
            maps[number] = {"": freest}
        elif size <= sum(accelerators.values()) and len(accelerators) > 1:
            maps[number] = _split(model, accelerators)
        if not maps[number] and size <= free.get(CPU, 0):
            maps[number] = {"": CPU}
        if not maps[number] and size <= sum(free.values()):
            maps[number] = _split(model, free)
        if not maps[number]:
            rooms = ", ".join(f"{device} {room / GIB:.2f}" for device, room in free.items())
            raise ValueError(
                f"Expert {number + 1} needs {size / GIB:.2f} GiB, but of the devices there are free, in GiB: {rooms}. "
                "Use fewer or smaller experts."
            )
        for device, taken in _taken(model, maps[number]).items():
            free[device] -= taken
    return maps


def place_experts(models: Sequence[nn.Module]) -> None:
    """Put loaded models onto the devices at hand, in place; without a GPU they stay where they are.

    What bitsandbytes or another quantiser has put on a device already is left there.
    """
    if not torch.cuda.is_available():
        return
    movable = [model for model in models if getattr(model, "quantization_method", None) is None]
    for model, device_map in zip(movable, plan_placement(movable, get_max_memory()), strict=True):
        if set(device_map) == {""}:
            model.to(device_map[""])
        else:
            dispatch_model(model, device_map)
        logger.info("%s lies on %s", type(model).__name__, sorted({str(device) for device in device_map.values()}))


def _split(model: nn.Module, room: dict[Device, int]) -> DeviceMap:
    """A map over several devices, or an empty one where the blocks do not come out even."""
    whole = list(getattr(model, "_no_split_modules", None) or [])
    balanced = get_balanced_memory(model, max_memory=dict(room), no_split_module_classes=whole)
    for memory in (balanced, room):
        device_map = dict(infer_auto_device_map(model, max_memory=dict(memory), no_split_module_classes=whole))
        if "disk" not in device_map.values():
            return device_map
    return {}


def _taken(model: nn.Module, device_map: DeviceMap) -> dict[Device, int]:
    sizes = compute_module_sizes(model)
    taken: dict[Device, int] = {}
    for name, device in device_map.items():
        taken[device] = taken.get(device, 0) + sizes[name]
    return taken
