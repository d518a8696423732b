"""Parametrisations of a Hugging Face model, and the population that runs on it as one batched forward."""

from __future__ import annotations

from .population import Population
from .svd_lora import SVDLoRA

__all__ = ["Population", "SVDLoRA"]
