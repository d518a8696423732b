"""perturb_ and es_update_ in loops that are not ours: somebody's own over named_parameters, and transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from essa_kernels import NoiseKey, es_update_, gaussian, perturb_

MEMBERS, SIGMA, STEP = 32, 0.05, 0.2


@pytest.fixture
def data(seed) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 8)
    return x, torch.tanh(x @ torch.randn(8, 3))


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return (model(x) - y).square().mean()


def weights_of(losses: list[Tensor]) -> Tensor:
    """How far every member's noise moves the parameters."""
    rewards = -torch.stack(losses)
    return STEP / MEMBERS * (rewards - rewards.mean()) / rewards.std()


def test_a_loop_over_named_parameters(data):
    """Sites are counted by the loop itself; every generation moves the parameters by what the noise tensors say."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    first = loss_of(model, data).item()
    for generation in range(20):
        key = NoiseKey(2026, generation)
        base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        losses = []
        with torch.no_grad():
            for member in range(MEMBERS):
                for i, (name, parameter) in enumerate(model.named_parameters()):
                    parameter.copy_(base[name])
                    perturb_(parameter, key.at(site=2 * i), member, SIGMA)
                losses.append(loss_of(model, data))
            weights = weights_of(losses)
            for i, (name, parameter) in enumerate(model.named_parameters()):
                parameter.copy_(base[name])
                es_update_(parameter, key.at(site=2 * i), weights)
                noise = torch.stack([gaussian(parameter.shape, key.at(site=2 * i), n) for n in range(MEMBERS)])
                moved = base[name] + torch.tensordot(weights, noise, 1)
                torch.testing.assert_close(parameter.detach(), moved, rtol=1e-5, atol=1e-6)
    assert loss_of(model, data) < first / 2


def test_a_callback_of_transformers_trainer(data, tmp_path):
    """The Trainer runs the loop, with a learning rate of 0; the callback makes a generation of every step."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Regression(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": (super().forward(x) - y).square().mean()}

    class Evolve(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **others):
            parameters, key = list(model.parameters()), NoiseKey(args.seed, generation=state.global_step)
            base, losses = [parameter.detach().clone() for parameter in parameters], []
            with torch.no_grad():
                for member in range(MEMBERS):
                    perturb_(parameters, key, member, SIGMA)
                    losses.append(model(*data)["loss"])
                    torch._foreach_copy_(parameters, base)
                es_update_(parameters, key, weights_of(losses))

    model = Regression(8, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    first = model(*data)["loss"].item()
    rows = [{"x": x, "y": y} for x, y in zip(*data, strict=True)]

    def train(callbacks: list) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=20, learning_rate=0.0, use_cpu=True, report_to=[], save_strategy="no"
        )
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()

    train([])
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value), "the Trainer itself has changed something"
    train([Evolve()])
    assert model(*data)["loss"] < first / 2
