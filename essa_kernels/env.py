"""What this machine and this installation offer, for bug reports and for `essa info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import dispatch
from .noise import NOISE_VERSION

PACKAGES = ("essa-kernels", "torch", "triton", "transformers", "peft")


def env_report() -> dict[str, Any]:
    """Versions, processor, GPU and backends of this process, as plain data that json.dumps accepts.

    Returns:
        A dict with ``noise_version``, ``python``, ``platform``, ``packages`` (version or None if not installed),
        ``cpu``, ``cuda``, ``compiled_module`` (its build information, or ``{"error": why it cannot be used}``) and
        ``backends`` (per device and backend, "available" or the reason why not).
    """
    return {
        "noise_version": NOISE_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "isa_override": os.environ.get("ESSA_CPU_ISA"),
        },
        "cuda": _cuda(),
        "compiled_module": _compiled_module(),
        "backends": {
            device_type: {name: dispatch.unavailable(name, device_type) or "available" for name in backends}
            for device_type, backends in dispatch.PREFERENCE.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    report: dict[str, Any] = {"torch_build": torch.version.cuda, "devices": []}
    if torch.version.cuda is None and torch.version.hip is None:
        return report | {"reason": "this torch is a CPU build"}
    if not torch.cuda.is_available():
        return report | {"reason": "torch sees no GPU (no device, or no driver)"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        report["devices"].append(
            {"name": device.name, "capability": f"{device.major}.{device.minor}", "memory": device.total_memory}
        )
    return report


def _compiled_module() -> dict[str, Any]:
    if error := dispatch.compiled_module_error():
        return {"error": error}
    return dict(dispatch.build_info())
