"""PEFT's mixed batch: inference in which every row names its adapter."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn


class FreeLinear(nn.Linear):
    """A base layer that costs nothing, so that a comparison of adapters is one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def mixed_batch(
    adapters: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype
) -> tuple[list[str], peft.PeftModel]:
    """The names of so many adapters on one layer, and the model that carries them."""
    names = [f"adapter{k}" for k in range(adapters)]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    with torch.inference_mode(False):
        base = nn.Sequential(FreeLinear(d_in, d_out, bias=False, dtype=dtype))
        model = peft.PeftModel(base, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        return names, model.to(dtype).eval()
