"""The shapes of the models that benchmarks stand for."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2Model

# Qwen2.5-0.5B's seven projections: (d_in, d_out)
PROJECTIONS = ((896, 896), (896, 128), (896, 128), (896, 896), (896, 4864), (896, 4864), (4864, 896))


def qwen_shaped(dtype: torch.dtype, vocabulary: int = 1024) -> Qwen2Model:
    """Qwen2.5-0.5B's body with random weights; its head would only dilute what adapters and noise cost."""
    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=vocabulary,
    )
    return Qwen2Model(config).to(dtype).eval()


def qwen_parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of the shapes of Qwen2.5-0.5B's parameters, 494 million in all."""
    with torch.device("meta"):
        model = qwen_shaped(dtype, vocabulary=151936)
    return [torch.randn(parameter.shape, dtype=dtype).mul_(0.02) for parameter in model.parameters()]
