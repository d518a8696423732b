"""Which implementation serves an op on a device: a table, in order of preference.

A backend named by the caller is used or refused, never replaced. Left to choose, an op takes the first backend of its
device that is available; `explain` says which that is and why the others are not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

# op -> (file in every backend's package, function in it)
OPS = {
    "gaussian": ("noise", "gaussian"),
    "rademacher": ("noise", "rademacher"),
    "svd_lora": ("svd_lora", "svd_lora_"),
    "svd_lora_shrink": ("svd_lora", "svd_lora_shrink"),
    "svd_lora_expand_": ("svd_lora", "svd_lora_expand_"),
}

# backend -> where its functions live
MODULES = {
    "cpu": "essa_kernels.native",
    "cuda": "essa_kernels.native",
    "triton": "essa_kernels.tl.{file}",
    "reference": "essa_kernels.reference.{file}",
}

# device type -> backends, best first
PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}


class Explanation(str):
    """Text that shows itself as it prints."""

    __repr__ = str.__str__


def triton_interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def compiled_module_error() -> str | None:
    """Why `essa_kernels._C` cannot be used, or None. A module that is there but does not load is not "not built"."""
    if importlib.util.find_spec("essa_kernels._C") is None:
        return "the compiled module essa_kernels._C was not built"
    try:
        importlib.import_module("essa_kernels._C")
    except ImportError as error:
        return f"the compiled module essa_kernels._C does not load: {error}"
    return None


def unavailable(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot take tensors on ``device_type`` in this process, or None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if device_type != "cuda" and not (device_type == "cpu" and triton_interprets()):
            return (
                f"Triton takes cuda tensors, and cpu tensors only under TRITON_INTERPRET=1, not {device_type} tensors"
            )
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cuda" and not torch.cuda.is_available():
            return "torch sees no GPU"
        return None
    if device_type != backend:
        return f"it takes {backend} tensors, not {device_type} tensors"
    if compiled_module_error():
        return compiled_module_error()
    if backend == "cuda":
        if not importlib.import_module("essa_kernels._C").build_info()["cuda"]:
            return "the compiled module was built without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
    return None


@functools.cache
def resolve(op: str, device: torch.device, backend: str | None = None) -> Callable[..., None]:
    """The function that computes ``op`` for tensors on ``device``.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: ``backend`` is not available, or the compiled module is there but does not load.
    """
    if backend is None:
        backend = _preferred(op, device.type)
    elif backend not in MODULES:
        raise ValueError(f"{op}: backend must be one of {', '.join(MODULES)} or None, got {backend!r}")
    elif reason := unavailable(backend, device.type):
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {reason}")
    file, function = OPS[op]
    return getattr(importlib.import_module(MODULES[backend].format(file=file)), function)


def _preferred(op: str, device_type: str) -> str:
    reasons = {}
    for backend in PREFERENCE.get(device_type, ("reference",)):
        reasons[backend] = unavailable(backend, device_type)
        if reasons[backend] is None:
            break
    compiled = reasons.get(device_type)
    if compiled and "does not load" in compiled:
        raise RuntimeError(f"{op}: {compiled}")
    if backend == "reference" and device_type == "cpu":
        warnings.warn(f"essa_kernels computes on the CPU with plain torch, slowly: {compiled}", stacklevel=2)
    return backend


def explain(op: str | None = None) -> Explanation:
    """Say which implementation serves each device here and why the others do not.

    Args:
        op: the name of one op, or None for all.

    Returns:
        A printable string: per op and device, the backends in order of preference, the chosen one marked ``*``, the
        unavailable ones with the reason.

    Raises:
        ValueError: there is no op of that name.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)} or None, got {op!r}")
    lines = []
    for name in OPS if op is None else (op,):
        lines.append(name)
        for device_type, backends in PREFERENCE.items():
            lines += _explain_device(device_type, backends)
    return Explanation("\n".join(lines))


def _explain_device(device_type: str, backends: tuple[str, ...]) -> list[str]:
    if device_type == "cuda" and not torch.cuda.is_available():
        return ["  on cuda: torch sees no GPU"]
    lines = [f"  on {device_type}:"]
    chosen = None
    for backend in backends:
        reason = unavailable(backend, device_type)
        if reason is None and chosen is None:
            chosen = backend
        lines.append(f"    {'*' if backend == chosen else ' '} {backend:<10} {reason or 'available'}")
    return lines
