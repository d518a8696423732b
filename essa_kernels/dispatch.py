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
from typing import Any

import torch
from torch.torch_version import TorchVersion

from . import gpu

LEAST_TRITON = "3.4"
LEAST_TRITON_TO_INTERPRET = "3.9"  # older interpreters round twice in a fused multiply-add

# op -> (file in every backend's package, function in it)
OPS = {
    "gaussian": ("noise", "gaussian"),
    "rademacher": ("noise", "rademacher"),
    "svd_lora": ("svd_lora", "svd_lora_"),
    "svd_lora_shrink": ("svd_lora", "svd_lora_shrink"),
    "svd_lora_expand_": ("svd_lora", "svd_lora_expand_"),
    "svd_lora_linear": ("svd_lora", "svd_lora_linear"),
    "svd_lora_expand_linear": ("svd_lora", "svd_lora_expand_linear"),
    "perturb_": ("es_update", "perturb_"),
    "es_update_": ("es_update", "es_update_"),
    "lora_perturbed": ("lora_perturbed", "lora_perturbed_"),
    "lora_perturbed_linear": ("lora_perturbed", "lora_perturbed_linear"),
    "lowrank_perturbed": ("lowrank", "lowrank_perturbed_"),
    "lowrank_perturbed_linear": ("lowrank", "lowrank_perturbed_linear"),
    "lowrank_update_": ("lowrank", "lowrank_update_"),
    "multi_lora": ("multi_lora", "multi_lora_"),
    "multi_lora_backward": ("multi_lora", "multi_lora_backward"),
    "decode_attention": ("decode_attention", "decode_attention"),
    "linear_logprob": ("linear_logprob", "linear_logprob"),
    "linear_logprob_backward": ("linear_logprob", "linear_logprob_backward"),
}

# Ops that Triton serves on GPUs, without a CUDA kernel.
WITHOUT_CUDA = frozenset(
    {
        "decode_attention",
        "lora_perturbed_linear",
        "lowrank_perturbed",
        "lowrank_perturbed_linear",
        "lowrank_update_",
        "linear_logprob",
        "linear_logprob_backward",
        "multi_lora",
        "multi_lora_backward",
        "svd_lora_linear",
        "svd_lora_expand_linear",
    }
)

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

# A few rows, as few_rows.json says, are bound by the launch, which the CUDA kernels keep to one; more are a matrix product,
# and Triton's kernels have it done by tensor cores.
PREFERENCE_BEYOND_DECODE = {"cuda": ("triton", "cuda", "reference")}


# What an op's caller can choose by measured numbers, on a CPU: benchmarks/results/perturbed.md.
CHOICES = {
    "lora_perturbed": """\
  noise for few rows of a member (* the fastest), in time of gaussian's at 1 / 8 rows (AVX-512, bf16, r=8, 64 members):
    * rademacher            0.4 / 0.6    distribution="rademacher"; holds nothing either
      gaussian, held        0.5 / 0.7    perturbed factors through multi_lora: 2 r (d_in + d_out) bytes a member in bf16
      gaussian, drawn anew  1   / 1      the default: no bytes, no rounding of the factors""",
    "lowrank_perturbed": """\
  noise for few rows of a member (* the fastest), a model's speed at 1 / 8 rows (AVX-512, bf16, rank 1, 64 members):
    * rademacher            96.9 / 98.0 % of inference without noise    distribution="rademacher"
      gaussian              94.1 / 97.0 %                               the default""",
}


class Explanation(str):
    """Text that shows itself as it prints."""

    __repr__ = str.__str__


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


@functools.cache
def build_info() -> dict[str, Any]:
    """How the compiled module was built and what it chose on this machine. Only where it loads."""
    return importlib.import_module("essa_kernels._C").build_info()


def unavailable(backend: str, device_type: str, op: str | None = None) -> str | None:
    """Why ``backend`` cannot take tensors on ``device_type`` in this process, those of ``op``, or None if it can."""
    reason = None
    if backend == "cuda" and op in WITHOUT_CUDA:
        reason = f"{op} has no CUDA kernel, Triton's serves GPUs"
    elif backend == "triton":
        reason = _triton_unavailable(device_type)
    elif backend != "reference":
        reason = _native_unavailable(backend, device_type)
    if reason is None and device_type == "cuda" and not torch.cuda.is_available():
        reason = "torch sees no GPU"
    return reason


def _native_unavailable(backend: str, device_type: str) -> str | None:
    if device_type != backend:
        return f"it takes {backend} tensors, not {device_type} tensors"
    if error := compiled_module_error():
        return error
    if backend == "cuda":
        build = build_info()
        if not build["cuda"]:
            return "the compiled module was built without CUDA"
        if build["cuda_device"].startswith("unavailable: "):
            return build["cuda_device"].removeprefix("unavailable: ")
    return None


def _triton_unavailable(device_type: str) -> str | None:
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (device_type == "cpu" and interprets):
        return f"it takes cuda tensors, and cpu tensors under TRITON_INTERPRET=1, not {device_type} tensors"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        return f"triton does not load: {error}"
    least = LEAST_TRITON_TO_INTERPRET if interprets else LEAST_TRITON
    if TorchVersion(version) < least:
        return (
            f"triton {version} is installed, {least} or newer is needed{' to interpret kernels' if interprets else ''}"
        )
    return None


@functools.cache
def resolve(
    op: str, device: torch.device, backend: str | None = None, beyond_decode: bool = False
) -> Callable[..., None]:
    """The function that computes ``op`` for tensors on ``device``, which may be beyond the rows of decoding.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: ``backend`` is not available, or the compiled module is there but does not load.
    """
    if backend is None:
        backend = _preferred(op, device.type, beyond_decode)
    elif backend not in MODULES:
        raise ValueError(f"{op}: backend must be one of {', '.join(MODULES)} or None, got {backend!r}")
    elif reason := unavailable(backend, device.type, op):
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {reason}")
    file, function = OPS[op]
    return getattr(importlib.import_module(MODULES[backend].format(file=file)), function)


@functools.cache
def direct(op: str) -> Callable[..., bool | None]:
    """The compiled call of ``op`` that takes its tensors and the number of CPU threads, 0 for a check alone.

    It returns True when it has computed ``op`` on the CPU, False when it could not but the tensors fit the op's contract,
    None when they may not: always None without the compiled module, or from a torch before 2.10.
    """
    file, function = OPS[op]
    if compiled_module_error() is None:
        native = importlib.import_module(MODULES["cpu"].format(file=file))
        if native.READS_TENSORS:
            return native.direct(function)
    return lambda *_: None


def preference(device_type: str, beyond_decode: bool) -> tuple[str, ...]:
    """The backends for a device, best first."""
    backends = PREFERENCE[device_type]
    return PREFERENCE_BEYOND_DECODE.get(device_type, backends) if beyond_decode else backends


def _preferred(op: str, device_type: str, beyond_decode: bool) -> str:
    error = compiled_module_error()
    if error and "does not load" in error:
        raise RuntimeError(f"{op}: {error}")
    reasons = {}
    for backend in preference(device_type, beyond_decode):
        reasons[backend] = unavailable(backend, device_type, op)
        if reasons[backend] is None:
            break
    if backend == "reference":
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        warnings.warn(f"essa_kernels computes {op} with plain torch on {device_type}, slowly. {why}", stacklevel=2)
    return backend


def explain(op: str | None = None) -> Explanation:
    """Say which implementation serves each device here and why the others do not.

    Args:
        op: the name of one op, or None for all.

    Returns:
        A printable string: per op and device, the backends in order of preference, the chosen one marked ``*``, the
        unavailable ones with the reason; and where the choice of noise decides the speed, what each costs.

    Raises:
        ValueError: there is no op of that name.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)} or None, got {op!r}")
    lines = []
    for name in OPS if op is None else (op,):
        lines.append(name)
        for device_type, backends in PREFERENCE.items():
            lines.append(f"  {device_type} tensors:")
            lines += _explain_backends(name, device_type, backends)
            if OPS[name][0] in ("svd_lora", "lora_perturbed") and device_type in PREFERENCE_BEYOND_DECODE:
                device = torch.device("cuda") if torch.cuda.is_initialized() else None
                lines.append(f"  {device_type} tensors of more than {gpu.few_rows('cuda_kernels', device)} rows:")
                lines += _explain_backends(name, device_type, PREFERENCE_BEYOND_DECODE[device_type])
        if name in CHOICES:
            lines.append(CHOICES[name])
    return Explanation("\n".join(lines))


def _explain_backends(op: str, device_type: str, backends: tuple[str, ...]) -> list[str]:
    reasons = {backend: unavailable(backend, device_type, op) for backend in backends}
    chosen = next((backend for backend, reason in reasons.items() if reason is None), None)
    return [
        f"    {'*' if backend == chosen else ' '} {backend:<10} {reason or _available(backend)}"
        for backend, reason in reasons.items()
    ]


def _available(backend: str) -> str:
    if backend != "cpu":
        return "available"
    build = build_info()
    return f"available, compiled for {build['cpu_isa']}; thread pool {build['thread_pool']}"
