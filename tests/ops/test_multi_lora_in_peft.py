"""multi_lora in place of PEFT's own layers: one batch for adapters of mixed rank, forward and backward."""

from __future__ import annotations

from functools import partial

import peft
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from essa_kernels import multi_lora

from .oracle import assert_no_worse_than_torch

NAMES = ["tall", "small", "other"]


def adapted_model() -> peft.PeftModel:
    """Two linear layers with three adapters of mixed rank and scaling."""
    base = nn.Sequential(nn.Linear(65, 129), nn.Tanh(), nn.Linear(129, 33))
    model = None
    for name, rank in zip(NAMES, (16, 3, 8), strict=True):
        config = peft.LoraConfig(r=rank, lora_alpha=7, target_modules=["0", "2"], init_lora_weights=False)
        if model is None:
            model = peft.PeftModel(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


def forward(layer: peft.tuners.lora.Linear, ids: Tensor, x: Tensor, *_, **__) -> Tensor:
    """What a PEFT layer computes of rows that belong to different adapters."""
    a, b = ([factors[name].weight for name in NAMES] for factors in (layer.lora_A, layer.lora_B))
    scaling = [layer.scaling[name] for name in NAMES]
    return multi_lora(x, a, b, ids, scaling=scaling, y=layer.base_layer(x))


def share_batch(model: peft.PeftModel, ids: Tensor) -> None:
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.forward = partial(forward, layer, ids)


def test_peft_mixed_batch(seed):
    model = adapted_model().eval()
    ids = torch.tensor([2, 0, -1, 1, 0, 2, 2, -1])
    x = torch.randn(8, 65)
    with torch.inference_mode():
        theirs = model(x, adapter_names=[NAMES[k] if k >= 0 else "__base__" for k in ids])
        truth = model.double()(x.double(), adapter_names=[NAMES[k] if k >= 0 else "__base__" for k in ids])
        share_batch(model.float(), ids)
        assert_no_worse_than_torch(model(x), theirs, truth)


def test_peft_gradients(seed):
    model = adapted_model().train()
    ids, x, d_y = torch.tensor([2, 0, 1, 0, 2, 2]), torch.randn(6, 65), torch.randn(6, 33)
    factors = {name: p for name, p in model.named_parameters() if "lora" in name}
    for k, name in enumerate(NAMES):  # PEFT trains one adapter at a time
        model.set_adapter(name)
        model(x[ids == k]).backward(d_y[ids == k])
    expected = {name: p.grad.clone() for name, p in factors.items()}
    share_batch(model, ids)
    for p in factors.values():
        p.requires_grad_(), p.grad.zero_()
    model(x).backward(d_y)
    assert len(factors) == 12
    for name, p in factors.items():
        assert_close(p.grad, expected[name])
