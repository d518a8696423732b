"""Gradients through int4 layers, beside dequantised ones."""

from __future__ import annotations

import copy

import pytest
import torch
from essa.demo.warm_start import BASE_MODEL
from essa.differentiable import COLUMNS, make_differentiable, taken_by_trainer
from essa.models import load_base
from essa.quantization import INT4_GROUP
from peft import LoraConfig, get_peft_model
from torch import nn

pytest.importorskip("torchao")
EPS = torch.finfo(torch.bfloat16).eps


def quantised(plain):
    import torchao.quantization as ao
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    model = nn.Sequential(copy.deepcopy(plain)).requires_grad_(False)
    ao.quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP, set_inductor_config=False))
    return model


def dequantised(layer):
    """The weight that the layer's forward pass multiplies by, float64."""
    with torch.no_grad():
        columns = nn.functional.linear(torch.eye(layer.in_features, dtype=torch.bfloat16), layer.weight)
    return columns.T.double()


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 129)], ids=str)
@pytest.mark.parametrize("wide", [64, COLUMNS + 96])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_the_dequantised_layers(rows, wide, bias, seed):
    plain = nn.Linear(wide, 160, bias=bias, dtype=torch.bfloat16)
    model = quantised(plain)
    x = torch.randn(*rows, wide, dtype=torch.bfloat16)
    before = model(x)
    make_differentiable(model)
    assert isinstance(model[0], nn.Linear) and type(model[0]) is not nn.Linear
    weight = dequantised(model[0])
    # That is the weight: within half a step of 15 of the original, and what the layer gives.
    groups = plain.weight.detach().double().unflatten(1, (-1, INT4_GROUP))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (weight.unflatten(1, (-1, INT4_GROUP)) - groups).abs().amax(-1)
    assert (error <= 0.5 * step + 2 * EPS * groups.abs().amax(-1)).all()
    x.requires_grad_()
    y = model(x)
    assert torch.equal(y, before)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    oracle = gradient.double() @ weight
    scale = gradient.double().abs() @ weight.abs()
    assert ((x.grad.double() - oracle).abs() <= 0.5 * EPS * oracle.abs() + 1e-5 * scale).all()


def test_nothing_is_done_where_no_gradient_is_asked_for(seed):
    model = quantised(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    make_differentiable(model)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert not model(x).requires_grad
    with torch.no_grad():
        assert not model(x.requires_grad_()).requires_grad


def test_layers_with_a_backward_pass_stay_as_they_are():
    base, _ = load_base(str(BASE_MODEL), quantization="int8")
    kinds = [type(module) for module in base.modules()]
    make_differentiable(base)
    assert [type(module) for module in base.modules()] == kinds
    with taken_by_trainer(base):
        assert "_hf_peft_config_loaded" not in vars(base)


def test_adapters_get_the_gradients_of_the_dequantised_base(seed):
    base, tokenizer = load_base(str(BASE_MODEL), quantization="int4")
    plain, _ = load_base(str(BASE_MODEL), dtype="bfloat16")
    for name, module in plain.named_modules():
        layer = base.get_submodule(name)
        if type(module) is nn.Linear and type(layer.weight) is not nn.Parameter:
            module.weight.data = dequantised(layer).bfloat16()
    batch = tokenizer(["?12+07=", "?99+01="], return_tensors="pt")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    gradients = {}
    for kind, model in {"int4": base, "bfloat16": plain, "exact": copy.deepcopy(plain).double()}.items():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.03)
        make_differentiable(peft_model)
        peft_model(**batch, labels=batch.input_ids).loss.backward()
        gradients[kind] = {n: p.grad.double() for n, p in peft_model.named_parameters() if p.requires_grad}

    def relative_error(kind, names):
        exact = torch.cat([gradients["exact"][name].flatten() for name in names])
        return (torch.cat([gradients[kind][name].flatten() for name in names]) - exact).norm() / exact.norm()

    names = gradients["exact"].keys()
    assert len(names) > 20 and all(found.keys() == names for found in gradients.values())
    # As close to the exact ones as bfloat16 comes, in which everything but the adapters is computed.
    for kind in ("int4", "bfloat16"):
        assert relative_error(kind, names) < 0.1
        assert all(relative_error(kind, [name]) < 0.2 for name in names), kind
