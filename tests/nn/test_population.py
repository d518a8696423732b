"""Attaching: shared projections, dtypes, what is given back on leaving, and what is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from essa_kernels.nn import SVDLoRA
from essa_kernels.nn import population as population_module

from .conftest import build, perturbed, randomise

IDS = torch.tensor([[7, 3, 40, 12], [30, 11, 4, 25]])


class Attention(nn.Module):
    """Siblings named as if they shared their input, which `inputs` decides."""

    def __init__(self, inputs):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 8), nn.Linear(6, 5), nn.Linear(6, 5)
        self.inputs = inputs

    def forward(self, x):
        outputs = [getattr(self, name)(seen) for name, seen in self.inputs(x)]
        return torch.cat(outputs, -1)


def same(x):
    yield from (("q_proj", x), ("k_proj", x), ("v_proj", x))


def another_order_twice(x):
    yield from (("v_proj", x), ("q_proj", x), ("q_proj", x), ("v_proj", x), ("k_proj", x))


def one_sees_another(x):
    yield from (("q_proj", x), ("k_proj", 2 * x), ("v_proj", x))


def equal_but_not_identical(x):
    yield from (("q_proj", x.clone()), ("k_proj", x.clone()), ("v_proj", x.clone()))


def cross_attention(x):
    memory = x * 5
    yield from (("q_proj", x), ("k_proj", memory), ("v_proj", memory))


def changed_in_place(x):
    x = x.clone()
    yield "q_proj", x
    yield "k_proj", x.mul_(3)
    yield "v_proj", x


def only_one(x):
    yield "k_proj", x


@pytest.mark.parametrize(
    ("inputs", "shrinks"),
    [
        (same, 1),
        (another_order_twice, 2),
        (one_sees_another, 3),
        (equal_but_not_identical, 3),
        (cross_attention, 2),
        (changed_in_place, 2),
        (only_one, 1),
    ],
)
def test_sharing_is_never_assumed(seed, monkeypatch, inputs, shrinks):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return shrink(*arguments)

    shrink = population_module.svd_lora_shrink
    monkeypatch.setattr(population_module, "svd_lora_shrink", counted)
    model = get_peft_model(Attention(inputs), LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"]))
    randomise(model)
    space = SVDLoRA.from_peft(model)
    values = perturbed(space, 2)
    x = torch.randn(4, 7, 6)
    with torch.no_grad(), space.attach(values) as population:
        population.assign(torch.tensor([0, 3, 4]))
        y = model(x)
    assert len(calls) == shrinks
    for member, rows in enumerate((slice(0, 3), slice(3, 4))):
        space.load_(values[member])
        with torch.no_grad():
            expected = model(x)[rows]
        torch.testing.assert_close(y[rows], expected, rtol=1e-5, atol=1e-5)


def test_a_shared_input_is_let_go():
    model = get_peft_model(Attention(same), LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"]))
    randomise(model)
    space = SVDLoRA.from_peft(model)
    with torch.no_grad(), space.attach(space.spectrum[None]) as population:
        population.assign(torch.tensor([0, 2]))
        x = torch.randn(2, 6)
        model(x)
        seen = weakref.ref(x)
        del x
        gc.collect()
        assert seen() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_leaving_restores_the_model(mode):
    def anatomy():
        return {
            name: (dict(vars(module)), [list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")])
            for name, module in model.named_modules()
        }

    model = build("qwen2")
    space = SVDLoRA.from_peft(model)
    before, state = anatomy(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(IDS).logits
    with mode(), space.attach(perturbed(space, 2)) as population:
        population.assign(torch.tensor([0, 1, 2]))
        assert not torch.equal(model(IDS).logits, expected)
    with pytest.raises(KeyboardInterrupt), space.attach(perturbed(space, 2)):
        raise KeyboardInterrupt

    assert anatomy() == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    with space.attach(space.spectrum[None]):
        pass


def test_a_second_population_is_refused():
    model = build("qwen2")
    space, other = SVDLoRA.from_peft(model), SVDLoRA.from_peft(model)
    with space.attach(space.spectrum[None]) as population:
        population.assign(torch.tensor([0, 2]))
        with pytest.raises(RuntimeError, match="attached already"), space.attach(space.spectrum[None]):
            pass
        with pytest.raises(RuntimeError, match="has been replaced already"), other.attach(space.spectrum[None]):
            pass
        with torch.no_grad():
            attached = model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, attached, rtol=1e-5, atol=1e-5)


def test_members_may_own_any_number_of_rows():
    model = build("llama")
    space = SVDLoRA.from_peft(model)
    values = perturbed(space, 4)
    ids = torch.randint(2, 48, (5, 6))
    with torch.no_grad(), space.attach(values) as population:
        population.assign(torch.tensor([0, 2, 2, 5, 5]))
        grouped = model(ids).logits
        population.assign(torch.tensor([0, 0, 0, 3, 3]))
        shrunk = model(ids[2:]).logits
        population.assign(torch.zeros(5, dtype=torch.int64))
        assert model.get_base_model().model.layers[0].mlp(torch.empty(0, 6, 32)).shape == (0, 6, 32)
    torch.testing.assert_close(shrunk, grouped[2:], rtol=1e-5, atol=1e-5)
    for member, rows in ((0, slice(0, 2)), (2, slice(2, 5))):
        space.load_(values[member])
        with torch.no_grad():
            torch.testing.assert_close(grouped[rows], model(ids[rows]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_peft(dtype):
    exact_model, model = build("llama", torch.float64), build("llama", dtype)
    exact_model.load_state_dict(model.state_dict())
    space, exact_space = SVDLoRA.from_peft(model), SVDLoRA.from_peft(exact_model)
    values = perturbed(space, 3)
    ids = torch.randint(2, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), space.attach(values) as population:
        population.assign(torch.arange(4) * 2)
        batched = model(ids.repeat(3, 1)).logits.unflatten(0, (3, 2))
    assert batched.dtype == dtype
    for member in range(3):
        space.load_(values[member])
        exact_space.load_(values[member])
        with torch.no_grad():
            truth = exact_model(ids).logits
            peft_error = (model(ids).logits - truth).square().mean().sqrt()
        error = (batched[member] - truth).square().mean().sqrt()
        assert error <= 1.5 * peft_error


class Widening(nn.Linear):
    """A base layer that, like some quantised ones, answers in another dtype."""

    def forward(self, x):
        return super().forward(x).float()


def test_a_base_layer_of_another_output_dtype():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down = (Widening(8, 6, dtype=torch.bfloat16) for _ in range(3))

        def forward(self, x):
            return torch.cat([self.gate_proj(x), self.up_proj(x), self.down(x)], -1)

    model = get_peft_model(Net(), LoraConfig(r=3, target_modules=["gate_proj", "up_proj", "down"]))
    randomise(model)
    space = SVDLoRA.from_peft(model)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.no_grad(), space.attach(space.spectrum[None]) as population:
        population.assign(torch.tensor([0, 4]))
        y = model(x)
        assert y.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 1, 2], r"got \[0, 1, 2\]"),
        (torch.tensor([0, 2]), r"shape \[members \+ 1\] = \[3\], got \[2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), "torch.int64"),
        (torch.tensor([1, 1, 2]), r"start with 0 and never descend, got \[1, 1, 2\]"),
        (torch.tensor([0, 2, 1]), "never descend"),
    ],
)
def test_offsets_are_checked(offsets, message):
    space = SVDLoRA.from_peft(build("llama"))
    with space.attach(perturbed(space, 2)) as population, pytest.raises(ValueError, match=message):
        population.assign(offsets)


def test_a_batch_that_nobody_owns_is_refused():
    model = build("llama")
    space = SVDLoRA.from_peft(model)
    with torch.no_grad(), space.attach(perturbed(space, 2)) as population:
        with pytest.raises(RuntimeError, match="assign"):
            model(IDS)
        population.assign(torch.tensor([0, 1, 3]))
        with pytest.raises(ValueError, match="end with 3 sequences, the batch has 2 sequences"):
            model(IDS)
        population.assign(torch.tensor([0, 1, 1]))  # divides the batch's tokens, and is still not its rows
        with pytest.raises(ValueError, match="end with 1 sequences, the batch has 2 sequences"):
            model(IDS)


def test_projections_of_one_tensor_follow_a_new_assignment():
    model = build("llama")
    space = SVDLoRA.from_peft(model)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(2, 3, attention.q_proj.in_features)
    with torch.no_grad(), space.attach(perturbed(space, 2)) as population:
        population.assign(torch.tensor([0, 0, 2]))
        expected = attention.k_proj(x)
        attention.q_proj(x)  # leaves what k_proj would take, for an assignment that then changes
        population.assign(torch.tensor([0, 2, 2]))
        other = attention.k_proj(x)
        population.assign(torch.tensor([0, 0, 2]))
        assert not torch.equal(other, expected)
        assert torch.equal(attention.k_proj(x), expected)


def test_there_is_no_backward():
    model = build("llama")
    model.enable_input_require_grads()
    space = SVDLoRA.from_peft(model)
    with space.attach(space.spectrum[None]) as population:
        population.assign(torch.tensor([0, 2]))
        with pytest.raises(RuntimeError, match="no backward"):
            model(IDS)
