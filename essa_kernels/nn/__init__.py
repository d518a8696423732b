"""Parametrisations of a Hugging Face model, and the population that runs on it as one batched forward."""

from __future__ import annotations

from .full_weights import FullWeights
from .lora_factors import LoRAFactors
from .low_rank import LowRankNoise
from .model_weights import named_text_weights, of_routed_experts
from .parametrization import POINT, Parametrization, Perturbed
from .population import Population
from .singular_values import SingularValues
from .svd_lora import SVDLoRA

__all__ = [
    "POINT",
    "FullWeights",
    "LoRAFactors",
    "LowRankNoise",
    "Parametrization",
    "Perturbed",
    "Population",
    "SVDLoRA",
    "SingularValues",
    "named_text_weights",
    "of_routed_experts",
]
