"""Where a model lies: on the CPU, on a GPU, or spread over several, and the memory that is free there."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from essa.config import InputError

logger = logging.getLogger(__name__)


def pick_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`; for `balanced` that of the model's inputs."""
    if device == "balanced":
        if not torch.cuda.device_count():
            raise InputError("device 'balanced' spreads a model over GPUs, torch sees none")
        return torch.device("cuda", 0)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda, cuda:N or balanced, got {device!r}") from error
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return picked


def check_spread(model: Any, name: str) -> None:
    """Raise `InputError` if a model that was spread over all GPUs needs more than those; say it if fewer hold it."""
    used, there = set(map(str, getattr(model, "hf_device_map", {}).values())), torch.cuda.device_count()
    if {"cpu", "disk"} & used:
        raise InputError(
            f"model_name_or_path {name!r} does not fit into the memory of the GPUs, of which torch sees {there}"
        )
    if len(used) < there:
        logger.warning(
            "%s is spread over %d of %d GPUs: its layers are too few or too large for more", name, len(used), there
        )


def cross_between_blocks(model: Any) -> None:
    """Let accelerate look at the inputs of a decoder block, which is never split, and not at those of the modules inside,
    for which decoding would pay."""
    uses = collections.Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for block in blocks_of(model):
        for module in block.modules():
            if module is not block and uses[id(module)] == 1 and "_hf_hook" in vars(module):
                remove_hook_from_module(module)
                if getattr(module.forward, "__func__", None) is type(module).forward:
                    del module.forward


def blocks_of(model: Any) -> list[nn.Module]:
    """The decoder blocks of a transformers model."""
    kinds = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in kinds]


def free_memory_for(model: Any) -> float:
    """Bytes that are free for a transformers model's activations and cache, which lie where its blocks do, until one of
    its devices is full."""
    places = collections.Counter(next(block.parameters()).device for block in blocks_of(model))
    if len(places) < 2:
        return free_memory_of(next(model.parameters()).device)
    return min(free_memory_of(device) * places.total() / blocks for device, blocks in places.items())


def free_memory_of(device: torch.device) -> int:
    """Bytes that are free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
