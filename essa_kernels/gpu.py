"""GPUs by architecture, and what serves each one for few rows."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

FEW_ROWS: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("few_rows.json").read_text())
"""Architecture, or "default" -> choice -> up to how many rows. Of the choices, `cuda_kernels` are the ops' CUDA kernels where
Triton's exist too, and `fused_layers` the kernels that compute a layer together with what a population adds to it."""


@functools.cache
def architecture(device: torch.device) -> str:
    """A device's key in the package's data, such as "sm_90" or "gfx942"; "cpu" under Triton's interpreter."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def few_rows(choice: str, device: torch.device | None = None) -> int:
    """Up to how many rows a choice serves a device, or one of which nothing is known."""
    of_device = FEW_ROWS.get(architecture(device), {}) if device else {}
    return of_device.get(choice, FEW_ROWS["default"][choice])
