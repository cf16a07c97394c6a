"""Where backbone, router and heads run."""

import os

import torch

from moe_ext.multi_token.model.mixture import MultiTokenMoE


def place(model: MultiTokenMoE) -> MultiTokenMoE:
    """Put a model onto the devices at hand, in place.

    Two GPUs: the backbone on the first, router and heads on the second. One GPU, or a process of a distributed run:
    all on its own. None: all on the CPU. A quantised backbone stays where it was loaded.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return model.to("cpu")
    own = int(os.environ.get("LOCAL_RANK", 0))
    alone = "LOCAL_RANK" not in os.environ
    if getattr(model.backbone, "quantization_method", None) is None:
        model.backbone.to(f"cuda:{own}")
    model.to("cuda:1" if alone and num_gpus > 1 else model.backbone_device)
    if model.device != model.backbone_device:
        # By this the Trainer knows that one process uses both, and does not make a copy for each.
        model.hf_device_map = {"backbone": str(model.backbone_device), "heads": str(model.device)}
    return model
