"""Preference alignment with a reference that moves (TR-DPO, TR-IPO, TR-KTO; arXiv 2404.09656), on transformers' Trainer.

`import essa.trdpo` is cheap; a name below brings in what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "MovingReferenceCallback": "essa.trdpo.callback",
    "TRDPOConfig": "essa.trdpo.config",
    "TRDPOTrainer": "essa.trdpo.trainer",
}

__all__ = ["MovingReferenceCallback", "TRDPOConfig", "TRDPOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'essa.trdpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
