"""Kernels that run a population of perturbed language models as one batched forward pass.

A member's noise is a pure function of a key and is drawn where it is used, never stored. Every op has one contract and
several implementations; `explain` says which of them serves you here.
"""

from __future__ import annotations

import importlib.metadata as _metadata

from .dispatch import explain
from .env import env_report
from .noise import NOISE_VERSION, NoiseKey
from .ops.decode_attention import decode_attention
from .ops.es_update import es_update_, perturb_
from .ops.linear_logprob import linear_logprob
from .ops.lora_perturbed import lora_perturbed, lora_perturbed_linear
from .ops.lowrank import lowrank_perturbed, lowrank_perturbed_linear, lowrank_update_
from .ops.multi_lora import multi_lora
from .ops.noise import gaussian, rademacher
from .ops.svd_lora import svd_lora, svd_lora_expand_, svd_lora_expand_linear, svd_lora_linear, svd_lora_shrink

try:
    __version__ = _metadata.version("essa-kernels")
except _metadata.PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "NOISE_VERSION",
    "NoiseKey",
    "decode_attention",
    "env_report",
    "es_update_",
    "explain",
    "gaussian",
    "linear_logprob",
    "lora_perturbed",
    "lora_perturbed_linear",
    "lowrank_perturbed",
    "lowrank_perturbed_linear",
    "lowrank_update_",
    "multi_lora",
    "perturb_",
    "rademacher",
    "svd_lora",
    "svd_lora_expand_",
    "svd_lora_expand_linear",
    "svd_lora_linear",
    "svd_lora_shrink",
]
