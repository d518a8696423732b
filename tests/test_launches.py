"""What a call on a GPU comes to: how many kernels of ours it launches, and that nothing in it waits for the GPU.

The GPU is pretended, and Triton's launches are counted instead of made.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import pytest
import torch

from essa_kernels import (
    NoiseKey,
    decode_attention,
    dispatch,
    es_update_,
    gaussian,
    linear_logprob,
    lora_perturbed,
    lora_perturbed_linear,
    lowrank_perturbed,
    lowrank_perturbed_linear,
    lowrank_update_,
    multi_lora,
    perturb_,
    rademacher,
    svd_lora,
    svd_lora_expand_,
    svd_lora_expand_linear,
    svd_lora_linear,
    svd_lora_shrink,
)

from .pretended_gpus import WAITS, pretended

pytest.importorskip("triton")
KEY = NoiseKey(7, generation=3, site=6)
ROWS, D_IN, D_OUT, RANK, MEMBERS = 16, 64, 48, 8, 4


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched on a pretended GPU, which is there while the test runs."""
    from triton.runtime.jit import JITFunction

    from essa_kernels import tl

    names: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **kwargs: names.append(kernel.__name__))
    for file in pkgutil.iter_modules(tl.__path__):
        module = importlib.import_module(f"essa_kernels.tl.{file.name}")
        if hasattr(module, "on_device"):
            monkeypatch.setattr(module, "on_device", lambda tensor: contextlib.nullcontext())

    def triton_of(op, device, backend=None, beyond_decode=False):
        file, function = dispatch.OPS[op]
        return getattr(importlib.import_module(f"essa_kernels.tl.{file}"), function)

    with pretended(monkeypatch):
        monkeypatch.setattr(dispatch, "resolve", triton_of)
        yield names


def on_gpu(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).to("cuda:0")


def calls(dtype):
    """Every op's call, by name."""
    x, y, weight = on_gpu(ROWS, D_IN, dtype=dtype), on_gpu(ROWS, D_OUT, dtype=dtype), on_gpu(D_OUT, D_IN, dtype=dtype)
    a, b = on_gpu(RANK, D_IN, dtype=dtype), on_gpu(D_OUT, RANK, dtype=dtype)
    members, offsets = torch.arange(MEMBERS).to("cuda:0"), (torch.arange(MEMBERS + 1) * 4).to("cuda:0")
    spectra = on_gpu(RANK, RANK), on_gpu(MEMBERS, RANK), on_gpu(MEMBERS, RANK)
    projected, out, h = (a, spectra[0]), on_gpu(4, 9), on_gpu(ROWS, 2 * RANK)[:, RANK:]
    tensors, weights = [on_gpu(5, 7, dtype=dtype), on_gpu(9), on_gpu(3, 2, 2)], on_gpu(7)
    labels, ids = torch.arange(ROWS).to("cuda:0"), (torch.arange(ROWS) % 3 - 1).to("cuda:0")
    noise = (KEY, 0.1, members, offsets)
    query, cache = on_gpu(ROWS, 4, 8, dtype=dtype), on_gpu(ROWS, 2, 30, 8, dtype=dtype)
    seen = torch.ones(ROWS, 30, dtype=torch.bool).to("cuda:0")
    return {
        "gaussian": lambda: gaussian((4, 9), KEY, out=out),
        "rademacher": lambda: rademacher((4, 9), KEY, out=out),
        "perturb_": lambda: perturb_(tensors, KEY, 3, 0.1),
        "es_update_": lambda: es_update_(tensors, KEY, weights),
        "lowrank_update_": lambda: lowrank_update_([weight, b], KEY, weights),
        "svd_lora": lambda: svd_lora(x, *projected, b, *spectra[1:], offsets, y),
        "svd_lora_shrink": lambda: svd_lora_shrink(x, *projected, *spectra[1:], offsets),
        "svd_lora_expand_": lambda: svd_lora_expand_(y, h, b),
        "svd_lora_linear": lambda: svd_lora_linear(x, weight, *projected, b, *spectra[1:], offsets),
        "svd_lora_expand_linear": lambda: svd_lora_expand_linear(x, weight, h, b),
        "lora_perturbed": lambda: lora_perturbed(x, a, b, *noise, y=y),
        "lora_perturbed_linear": lambda: lora_perturbed_linear(x, weight, a, b, *noise),
        "lowrank_perturbed": lambda: lowrank_perturbed(x, D_OUT, *noise, y=y),
        "lowrank_perturbed_linear": lambda: lowrank_perturbed_linear(x, weight, *noise),
        "multi_lora": lambda: multi_lora(x, [a, a], [b, b], ids, y=y),
        "decode_attention": lambda: decode_attention(query, cache, cache, seen),
        "linear_logprob": lambda: linear_logprob(x, weight, labels),
    }


# The tensors of the lists have two dtypes in bfloat16, and one launch is made for each.
LAUNCHES = {
    "gaussian": 1,
    "rademacher": 1,
    "perturb_": {torch.float32: 1, torch.bfloat16: 2},
    "es_update_": {torch.float32: 1, torch.bfloat16: 2},
    "lowrank_update_": 2,
    "svd_lora": 2,
    "svd_lora_shrink": 2,
    "svd_lora_expand_": 1,
    "svd_lora_linear": 1,
    "svd_lora_expand_linear": 1,
    "lora_perturbed": 2,
    "lora_perturbed_linear": 2,
    "lowrank_perturbed": 2,
    "lowrank_perturbed_linear": 2,
    "multi_lora": 2,
    "decode_attention": 1,
    "linear_logprob": 3,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", LAUNCHES)
def test_a_call_launches_few_kernels_and_waits_for_nothing(launched, op, dtype):
    call = calls(dtype)[op]
    with torch.no_grad():
        call()  # what is kept for later calls, such as a list's table of addresses, is sent once
        launched.clear()
        WAITS.clear()
        call()
    assert not WAITS
    expected = LAUNCHES[op]
    assert len(launched) == (expected if isinstance(expected, int) else expected[dtype]), launched


@pytest.mark.parametrize("op", [es_update_, lowrank_update_])
def test_weights_from_the_cpu_are_not_waited_for(launched, op):
    matrix = on_gpu(8, 12)
    op(matrix, KEY, torch.randn(6))
    WAITS.clear()
    op(matrix, KEY, torch.randn(6))
    assert not WAITS and len(launched) == 2


def test_a_tensor_alone_needs_no_table(launched, monkeypatch):
    """A loop over a model's parameters would copy one at every call, when it has more than are kept."""
    matrix, weights = on_gpu(8, 12), on_gpu(6)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    perturb_(matrix, KEY, 3, 0.1)
    es_update_(matrix, KEY, weights)
    assert len(launched) == 2


def test_a_list_met_first_under_capture_is_refused(launched, monkeypatch):
    tensors, x, factors = [on_gpu(3), on_gpu(4)], on_gpu(2, 3), [on_gpu(1, 3), on_gpu(2, 3)]
    transposed, ids = [factor.T.contiguous() for factor in factors], torch.tensor([0, 1]).to("cuda:0")
    for call in (lambda: perturb_(tensors, KEY, 0, 0.1), lambda: multi_lora(x, factors, transposed, ids)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(RuntimeError, match="with them once before the capture"):
                call()
            assert not launched
        call()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            call()
        launched.clear()


def test_every_op_is_here():
    public = {name for name in dispatch.OPS if not name.endswith("_backward")}
    assert public == LAUNCHES.keys()


def test_a_list_over_two_gpus_is_not_captured(launched, monkeypatch):
    tensors = [on_gpu(3), torch.randn(3).to("cuda:1")]
    for update in (lambda: perturb_(tensors, KEY, 0, 0.1), lambda: es_update_(tensors, KEY, [1.0, 0.5])):
        launched.clear()
        update()
        assert len(launched) == 2, "one for each"
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(RuntimeError, match="a CUDA graph is captured on one GPU, the tensors are on several"):
                update()


def test_waiting_is_noticed(launched):
    x = on_gpu(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x[0] > 0),
        lambda: x.cpu(),
        lambda: x.nonzero(),
        lambda: torch.ones(3).to("cuda:0"),
        lambda: x.copy_(torch.ones(3)),
        lambda: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64).to("cuda:0")),
    ):
        WAITS.clear()
        wait()
        assert WAITS
