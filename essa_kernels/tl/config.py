"""Block shapes and launch parameters, as data: `configs.json` holds a default and what differs per architecture.

Nothing is tuned at run time, so a result never depends on what was measured when. "cpu" is Triton's interpreter, where
few large programs are fastest.
"""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import torch
from torch import Tensor

CONFIGS: dict[str, dict[str, dict[str, int]]] = json.loads(Path(__file__).with_name("configs.json").read_text())


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of a device in `configs.json`, such as "sm_90" or "gfx942"; "cpu" under Triton's interpreter."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def config_of(arch: str, kernel: str) -> dict[str, int]:
    """The parameters of a kernel on an architecture, the default where the file says nothing of it."""
    return CONFIGS["default"][kernel] | CONFIGS.get(arch, {}).get(kernel, {})


def config(tensor: Tensor, kernel: str) -> dict[str, int]:
    """The parameters of a kernel on the tensor's device."""
    return config_of(architecture(tensor.device), kernel)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device current, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
