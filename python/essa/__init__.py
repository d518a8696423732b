"""Align language models without gradients: evolution of a LoRA adapter's singular values, on population kernels.

`import essa` is cheap; a name below brings in what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ESSAConfig": "essa.config",
    "ESSATrainer": "essa.trainer",
    "InputError": "essa.config",
    "MovingReferenceCallback": "essa.trdpo.callback",
    "RewardError": "essa.rewards",
    "TRDPOConfig": "essa.trdpo.config",
    "TRDPOTrainer": "essa.trdpo.trainer",
    "generate": "essa.rollout",
    "make_strategy": "essa.strategies",
}

__all__ = [
    "ESSAConfig",
    "ESSATrainer",
    "InputError",
    "MovingReferenceCallback",
    "RewardError",
    "TRDPOConfig",
    "TRDPOTrainer",
    "generate",
    "make_strategy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'essa' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
