"""On a GPU, a layer and what a population adds to it are one kernel's for the few rows of decoding. The GPU is pretended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from essa_kernels import NoiseKey, dispatch, gpu
from essa_kernels.nn import LoRAFactors, LowRankNoise, Perturbed, SVDLoRA, fused

from .nn.conftest import SEVEN, build, build_base, perturbed
from .pretended_gpus import pretended

MEMBERS = 4
LAYERS = 2 * len(SEVEN)
KEY = NoiseKey(7)
METHODS = {
    "svd": ("svd_lora_linear", ("svd_lora", "svd_lora_expand_")),
    "lora": ("lora_perturbed_linear", ("lora_perturbed",)),
    "lowrank": ("lowrank_perturbed_linear", ("lowrank_perturbed",)),
}


def attached(method: str, model: Any) -> Any:
    if method == "svd":
        space = SVDLoRA.from_peft(model)
        torch.manual_seed(3)
        return space.attach(perturbed(space, MEMBERS))
    space = LoRAFactors(model) if method == "lora" else LowRankNoise(model)
    return space.attach(Perturbed(KEY, 0.05, range(MEMBERS)))


def logits(method: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of as many sequences of each member."""
    offsets = torch.arange(MEMBERS + 1) * (len(ids) // MEMBERS)
    context = attached(method, model)
    with torch.inference_mode(), context as population:
        population.assign(offsets)
        return model(input_ids=ids).logits.cpu()


@pytest.fixture
def called(monkeypatch):
    """How often each op has been called from the layers."""
    from essa_kernels.nn import lora_factors, low_rank, population

    counts: dict[str, int] = {}

    def count(module, name):
        op = getattr(module, name)

        def counted(*arguments, **options):
            counts[name] = counts.get(name, 0) + 1
            return op(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    for module, method in ((population, "svd"), (lora_factors, "lora"), (low_rank, "lowrank")):
        one, others = METHODS[method]
        for name in (one, *others):
            count(module, name)
    return counts


@pytest.mark.parametrize("method", METHODS)
def test_decoding_is_fused_and_nothing_else(monkeypatch, called, method):
    model = (build_base if method == "lowrank" else build)("llama", torch.bfloat16).requires_grad_(False)
    model.config._attn_implementation = "eager"  # the others are not the same arithmetic on a pretended GPU
    few, many = torch.arange(8).view(8, 1) + 3, torch.arange(80).view(8, 10) % 40 + 3
    expected = [logits(method, model, ids) for ids in (few, many)]
    one, others = METHODS[method]
    assert one not in called, "on the CPU"
    with pretended(monkeypatch):
        model.to("cuda:0")
        for ids, truth in zip((few, many), expected, strict=True):
            called.clear()
            # The CPU's implementation behind a fused op is the base layer and the op that it is fused with.
            assert torch.equal(logits(method, model, ids.to("cuda:0")), truth)
            fused_calls, other_calls = called.get(one, 0), sum(called.get(other, 0) for other in others)
            assert (fused_calls, other_calls) == ((LAYERS, 0) if ids is few else (0, LAYERS))
        monkeypatch.setitem(gpu.FEW_ROWS, "sm_90", {"fused_layers": 7})
        called.clear()
        logits(method, model, few.to("cuda:0"))
        assert one not in called, "beyond what few_rows.json says"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_fused(monkeypatch):
    with pretended(monkeypatch):
        layer = nn.Linear(8, 8).bfloat16().to("cuda:0")
        assert fused.fused_rows(layer) == 32
        assert not fused.fused_rows(nn.Linear(8, 8).to("cuda:0")), "float32 has no fast product in Triton"
        assert not fused.fused_rows(Doubled(8, 8).bfloat16().to("cuda:0"))
        monkeypatch.setattr(gpu, "architecture", lambda device: "sm_89")
        assert not fused.fused_rows(layer), "an architecture of which nothing is known"
        monkeypatch.setattr(gpu, "architecture", lambda device: "sm_90")
        monkeypatch.setattr(dispatch, "unavailable", lambda backend, _: backend == "triton")
        assert not fused.fused_rows(layer), "without Triton"


def test_a_layer_that_does_more_than_its_product_is_called():
    layer = nn.Linear(8, 8)
    assert not fused.is_hooked(layer)
    hook = layer.register_forward_hook(lambda *_: None)
    assert fused.is_hooked(layer)
    hook.remove()
    assert not fused.is_hooked(layer)
    layer.forward = layer.forward
    assert fused.is_hooked(layer)


def test_what_is_left_to_the_layer(monkeypatch):
    layer, x = nn.Linear(8, 8).bfloat16(), torch.zeros(2, 8).bfloat16()
    assert fused.is_fused(layer, x, 64)
    assert not fused.is_fused(layer, x.float(), 64)
    assert not fused.is_fused(layer, x[:0], 64)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    assert not fused.is_fused(layer, x, 64)
