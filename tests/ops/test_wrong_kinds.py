"""Every op's arguments of the wrong kind are named, whatever torch would have said of them."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import essa_kernels
from essa_kernels import NoiseKey, dispatch

ROWS, D_IN, D_OUT, RANK = 4, 8, 6, 2
OPS = [op for op in dispatch.OPS if not op.endswith("_backward")]


def arguments(op: str) -> dict[str, object]:
    """Of a call that is right."""
    x, y, weight = torch.zeros(ROWS, D_IN), torch.zeros(ROWS, D_OUT), torch.zeros(D_OUT, D_IN)
    a, b, h = torch.zeros(RANK, D_IN), torch.zeros(D_OUT, RANK), torch.zeros(ROWS, RANK)
    key, members, offsets = NoiseKey(1), torch.arange(2), torch.tensor([0, 2, 4])
    noise = {"key": key, "sigma": 0.1, "members": members, "offsets": offsets}
    spectra = {"core": torch.zeros(RANK, RANK), "s_a": torch.ones(2, RANK), "s_b": torch.ones(2, RANK)}
    svd = {"v_a": a, **spectra, "offsets": offsets}
    cache = torch.zeros(ROWS, 2, 5, 8)
    of = {
        "gaussian": {"shape": (2, 3), "key": key, "out": torch.zeros(2, 3)},
        "rademacher": {"shape": (2, 3), "key": key, "out": torch.zeros(2, 3)},
        "perturb_": {"t": weight, "key": key, "member": 0, "sigma": 0.1},
        "es_update_": {"t": weight, "key": key, "weights": torch.ones(2)},
        "lowrank_update_": {"w": weight, "key": key, "weights": torch.ones(2)},
        "svd_lora": {"x": x, **svd, "u_b": b, "y": y},
        "svd_lora_shrink": {"x": x, **svd},
        "svd_lora_expand_": {"y": y, "h": h, "u_b": b},
        "svd_lora_linear": {"x": x, "weight": weight, **svd, "u_b": b, "bias": torch.zeros(D_OUT)},
        "svd_lora_expand_linear": {"x": x, "weight": weight, "h": h, "u_b": b, "bias": torch.zeros(D_OUT)},
        "lora_perturbed": {"x": x, "a": a, "b": b, **noise, "y": y},
        "lora_perturbed_linear": {"x": x, "weight": weight, "a": a, "b": b, **noise, "bias": torch.zeros(D_OUT)},
        "lowrank_perturbed": {"x": x, "d_out": D_OUT, **noise, "y": y},
        "lowrank_perturbed_linear": {"x": x, "weight": weight, **noise, "bias": torch.zeros(D_OUT)},
        "multi_lora": {"x": x, "a": a[None], "b": b[None], "adapter_ids": torch.zeros(ROWS, dtype=torch.int64), "y": y},
        "decode_attention": {"query": torch.zeros(ROWS, 4, 8), "key": cache, "value": cache},
        "linear_logprob": {"hidden": x, "weight": weight, "labels": torch.zeros(ROWS, dtype=torch.int64)},
    }
    return of[op]


TENSORS = [(op, name) for op in OPS for name, value in arguments(op).items() if isinstance(value, Tensor)]


@pytest.mark.parametrize("op", OPS)
def test_the_calls_are_right(op):
    getattr(essa_kernels, op)(**arguments(op))


@pytest.mark.parametrize("wrong", [None, "text", 3], ids=["None", "text", "number"])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_no_tensor(op, name, wrong):
    function = getattr(essa_kernels, op)
    if wrong is None and inspect.signature(function).parameters[name].default is None:
        return
    with pytest.raises(TypeError, match=rf"^{op}: {name}(\[0\])? must be a.* tensor"):
        function(**arguments(op) | {name: wrong})


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_sparse_tensor(op, name):
    given = arguments(op)
    with pytest.raises(ValueError, match=rf"^{op}: {name} must be a dense tensor, torch.strided, got torch.sparse_coo"):
        getattr(essa_kernels, op)(**given | {name: given[name].to_sparse()})


@pytest.mark.parametrize("op", OPS)
def test_a_backend_that_is_no_name(op):
    with pytest.raises(TypeError, match=rf"^{op}: backend must be a string, got \['cpu'\]"):
        getattr(essa_kernels, op)(**arguments(op), backend=["cpu"])


@pytest.mark.parametrize(
    "op", [op for op in OPS if "distribution" in inspect.signature(getattr(essa_kernels, op)).parameters]
)
def test_a_distribution_that_is_no_name(op):
    with pytest.raises(ValueError, match=rf"^{op}: distribution must be gaussian or rademacher, got \['gaussian'\]"):
        getattr(essa_kernels, op)(**arguments(op), distribution=["gaussian"])
