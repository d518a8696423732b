"""The losses and their gradients against the papers' equations, written out in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from essa.trdpo import losses

BETAS = (0.01, 0.3, 5.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numeric_gradient(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        high, low = at.copy(), at.copy()
        high[i] += step
        low[i] -= step
        gradient[i] = (function(high).sum() - function(low).sum()) / (2 * step)
    return gradient


def assert_matches(ours, oracle, at, tolerance=1e-6):
    """`ours` in float32 and float64, with its gradient, beside the oracle."""
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, tolerance)):
        x = torch.tensor(at, dtype=dtype, requires_grad=True)
        value = ours(x)
        np.testing.assert_allclose(value.detach().numpy(), oracle(at), rtol=rtol, atol=rtol)
        value.sum().backward()
        np.testing.assert_allclose(x.grad.numpy(), numeric_gradient(oracle, at), rtol=1e-4, atol=1e-6)


@pytest.fixture
def ratios(seed):
    return np.random.default_rng(seed).normal(size=(7, 2)) * 3


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(beta, smoothing, ratios):
    def oracle(r):
        h = r[:, 0] - r[:, 1]
        return -(1 - smoothing) * np.log(sigmoid(beta * h)) - smoothing * np.log(sigmoid(-beta * h))

    assert_matches(lambda r: losses.dpo(r[:, 0], r[:, 1], beta, smoothing), oracle, ratios)


@pytest.mark.parametrize("beta", BETAS)
def test_ipo(beta, ratios):
    lengths = torch.arange(1, 15).view(7, 2)

    def oracle(r):
        h = r / lengths.numpy()
        return (h[:, 0] - h[:, 1] - 1 / (2 * beta)) ** 2

    assert_matches(lambda r: losses.ipo(r[:, 0], r[:, 1], beta, lengths), oracle, ratios, 1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_kto(beta, ratios):
    desirable, kl = np.array([True, False, True, True, False, False, True]), 0.7

    def oracle(r):
        z = np.where(desirable, r[:, 0] - kl, kl - r[:, 0])
        return np.where(desirable, 1.3, 0.6) * (1 - sigmoid(beta * z))

    reference_point, labels = torch.tensor(kl, dtype=torch.float64), torch.tensor(desirable)
    assert_matches(lambda r: losses.kto(r[:, 0], reference_point.to(r.dtype), labels, beta, 1.3, 0.6), oracle, ratios)


def test_far_from_the_reference_nothing_overflows():
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = losses.dpo(far, -far, 1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(far.grad).all()
    assert loss.tolist() == [2e4, 0.0]
