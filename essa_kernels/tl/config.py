"""Block shapes and launch parameters, as data: `configs.json` holds a default and what differs per architecture.

Nothing is tuned unless asked for (`tune.py`), so a result never depends on what was measured when. "cpu" is Triton's
interpreter, where few large programs are fastest.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from torch import Tensor

from .. import gpu

Configs = dict[str, dict[str, dict[str, int]]]
"""architecture -> kernel -> parameter -> value"""

CONFIGS: Configs = json.loads(Path(__file__).with_name("configs.json").read_text())

IN_USE: dict[tuple[str, str], dict[str, int]] = {}
"""Architecture and kernel -> parameters, of what has been asked for since they last changed."""

_captured: dict[int, Tensor] = {}


def config_of(arch: str, kernel: str) -> dict[str, int]:
    """The parameters of a kernel on an architecture, the default where the file says nothing of it."""
    parameters = IN_USE.get((arch, kernel))
    if parameters is None:
        parameters = IN_USE[arch, kernel] = CONFIGS["default"][kernel] | CONFIGS.get(arch, {}).get(kernel, {})
    return parameters


def use(configs: Configs) -> None:
    """Put parameters in the place of those of `configs.json`, for the rest of the process.

    Args:
        configs: in the form of `configs.json`, such as ``{"sm_90": {"project": {"num_warps": 8}}}``; what it does not name
            stays as it is.

    Raises:
        ValueError: there is no such kernel or parameter, or the value is not an integer >= 1. Nothing has changed then.
    """
    for kernels in configs.values():
        for kernel, parameters in kernels.items():
            if kernel not in CONFIGS["default"]:
                raise ValueError(f"configs: kernel must be one of {', '.join(CONFIGS['default'])}, got {kernel!r}")
            known = set(CONFIGS["default"][kernel]).union(*(arch.get(kernel, {}) for arch in CONFIGS.values()))
            for name, value in parameters.items():
                if name not in known:
                    raise ValueError(f"configs: {kernel} has the parameters {', '.join(sorted(known))}, got {name!r}")
                if type(value) is not int or value < 1:
                    raise ValueError(f"configs: {kernel}'s {name} must be an integer >= 1, got {value!r}")
    for arch, kernels in configs.items():
        of_arch = CONFIGS.setdefault(arch, {})
        for kernel, parameters in kernels.items():
            of_arch[kernel] = of_arch.get(kernel, {}) | parameters
    IN_USE.clear()


def config(tensor: Tensor, kernel: str) -> dict[str, int]:
    """The parameters of a kernel on the tensor's device."""
    return config_of(gpu.architecture(tensor.device), kernel)


def outlives_graphs(tensor: Tensor) -> Tensor:
    """Keep a cached tensor that a CUDA graph, if one is being captured, will read at its address whenever it is replayed."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[id(tensor)] = tensor
    return tensor


def sent_before_capture(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, to be kept. Waited for, so that every stream may read it, which no graph being captured
    can hold."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and tensors at these addresses are met for the first time: make the same call "
            "with them once before the capture"
        )
    return tensor.to(device)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device current, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
