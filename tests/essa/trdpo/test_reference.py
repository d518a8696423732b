"""The reference: exact mixing, exchange with the policy, saving, and the kinds of model it refuses."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import torch
from essa.config import InputError
from essa.trdpo.reference import STATE_FILE, WEIGHTS_FILE, MovingReference, mix_
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from .conftest import make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.6, 1.0])
def test_mixing_is_float64s_rounded_once(alpha, dtype, seed):
    reference, policy = torch.randn(129, 7), torch.randn(7, 129).T.to(dtype)
    oracle = alpha * policy.double().numpy() + (1 - alpha) * reference.double().numpy()
    mix_(reference, policy, alpha)
    half = 0.5 * np.spacing(np.abs(oracle).astype(np.float32)).astype(np.float64)
    assert (np.abs(reference.numpy() - oracle) <= half * (1 + 1e-6)).all()


def test_a_small_alpha_is_lost_in_bfloat16_and_kept_here(seed):
    model = make_model().bfloat16()
    reference = MovingReference(model)
    in_dtype = {name: p.detach().clone() for name, p in model.named_parameters()}
    oracle = {name: p.detach().double() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    for step in range(1, 21):
        reference.update(0.01, step)
        for name, parameter in model.named_parameters():
            in_dtype[name].mul_(1 - 0.01).add_(parameter.detach(), alpha=0.01)
            oracle[name].mul_(1 - 0.01).add_(parameter.detach().double(), alpha=0.01)
    for name, exact in oracle.items():
        way = (exact - model.get_parameter(name).detach().double() / 1.1).norm()
        assert (reference.weights()[name].double() - exact).norm() < 1e-5 * way
        assert (in_dtype[name].double() - exact).norm() > 0.5 * way


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
def test_the_model_is_the_reference_inside_and_itself_outside(whole, peft_model, seed):
    model = make_model() if whole else peft_model
    reference, ids = MovingReference(model), torch.randint(3, 97, (2, 9))
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        changed = model(ids).logits
        with reference.applied():
            torch.testing.assert_close(model(ids).logits, frozen(ids).logits, rtol=0, atol=0)
        assert torch.equal(model(ids).logits, changed)
        reference.update(1.0, 5)
        with reference.applied():
            assert torch.equal(model(ids).logits, changed)
        with reference.at_start():
            assert torch.equal(model(ids).logits, frozen(ids).logits)
        with pytest.raises(ZeroDivisionError), reference.applied():
            _ = 1 / 0
        assert torch.equal(model(ids).logits, changed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    start = [p for p in frozen.parameters() if p.requires_grad]
    moved = sum((a - b).double().square().sum() for a, b in zip(trainable, start, strict=True)).sqrt()
    assert reference.distance() == pytest.approx(moved.item(), rel=1e-6)
    assert (reference.updates, reference.last_update, reference.moved) == (1, 5, True)


def test_a_new_adapters_reference_is_the_base_model(lora, seed):
    model, ids = get_peft_model(make_model(), lora), torch.randint(3, 97, (2, 9))
    reference = MovingReference(model)
    with torch.no_grad(), model.disable_adapter():
        expected = model(ids).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    calls = []
    layer = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), reference.applied():
        assert torch.equal(model(ids).logits, expected) and not calls
    reference.update(0.5, 1)
    with torch.no_grad(), reference.applied():
        assert not torch.allclose(model(ids).logits, expected) and calls
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_it_costs_one_adapter(peft_model):
    adapter = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    reference = MovingReference(peft_model)
    assert sum(tensor.numel() for tensor in reference.weights().values()) == adapter
    assert all(tensor.dtype == torch.float32 for tensor in reference.weights().values())


def test_it_may_start_elsewhere(seed):
    model, other = make_model(), make_model()
    reference = MovingReference(model, other)
    assert all(torch.equal(reference.weights()[name], p) for name, p in other.named_parameters())
    with pytest.raises(InputError, match=r"ref_model must be of the policy's shape: .* is \(24, 32\), not \(48, 32\)"):
        MovingReference(model, make_model(intermediate_size=24))


def test_saved_and_loaded(peft_model, tmp_path, seed):
    reference = MovingReference(peft_model)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    reference.update(0.25, 8)
    reference.save(tmp_path, note="kept")
    fresh = copy.deepcopy(peft_model)
    other = MovingReference(fresh)
    state = other.load(tmp_path)
    assert state["note"] == "kept" and not state["same_start"]
    assert (other.updates, other.last_update, other.moved) == (1, 8, True)
    assert all(torch.equal(other.weights()[name], tensor) for name, tensor in reference.weights().items())
    assert load_file(tmp_path / WEIGHTS_FILE).keys() == reference.weights().keys()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / STATE_FILE).unlink(), "has no reference.json"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"x"), "is damaged"),
        (lambda folder: (folder / STATE_FILE).write_text("{"), "is damaged"),
        (lambda folder: (folder / STATE_FILE).write_text('{"format": 1, "last_update": 3}'), "lacks moved, start"),
        (lambda folder: save_file({"a": torch.ones(2)}, folder / WEIGHTS_FILE), "of another model"),
    ],
)
def test_a_damaged_reference_is_named(break_it, message, peft_model, tmp_path):
    reference = MovingReference(peft_model)
    reference.save(tmp_path)
    assert json.loads((tmp_path / STATE_FILE).read_text())["last_update"] == 0
    before = {name: tensor.clone() for name, tensor in reference.weights().items()}
    break_it(tmp_path)
    with pytest.raises(InputError, match=message):
        reference.load(tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.weights().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]), "must be a LoRA, got IA3"),
        (peft.LoraConfig(target_modules=["lm_head"]), "LM head must stay as it is"),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "LM head must stay as it is"),
        (peft.LoraConfig(target_modules=["q_proj"], inference_mode=True), "no trainable weights"),
    ],
)
def test_unsupported_adapters(config, message):
    config.task_type = "CAUSAL_LM"
    with pytest.raises(InputError, match=message):
        MovingReference(get_peft_model(make_model(), config))
