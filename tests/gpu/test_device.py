"""The public ops on a real GPU: what only a device can show. Skipped without one; the ops' own tests run there too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from essa.strategies import make_strategy

from essa_kernels import (
    NoiseKey,
    decode_attention,
    dispatch,
    es_update_,
    gaussian,
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
    svd_lora_linear,
    svd_lora_shrink,
)
from essa_kernels.nn import LowRankNoise

from .problems import DTYPES, H_ERROR, SHAPES, assert_h, assert_y, problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

BACKENDS = [name for name in ("cuda", "triton") if dispatch.unavailable(name, "cuda") is None]
KEY = NoiseKey(2**63 + 2026, generation=2**31 + 3, site=5)
EVEN_KEY = KEY.at(site=6)


@pytest.fixture(params=BACKENDS)
def on_gpu(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("draw", [gaussian, rademacher])
@pytest.mark.parametrize("shape", [(1, 1), (37, 129), (1000, 1134), (64, 2**18), (3, 2**20 + 1)])
def test_noise_has_the_bits_of_the_cpu(on_gpu, draw, shape):
    for member in (6, 7):
        got = draw(shape, KEY, member, device="cuda", backend=on_gpu).cpu()
        assert torch.equal(got.view(torch.int32), draw(shape, KEY, member).view(torch.int32))


def test_noise_beyond_32_bit_indices(on_gpu):
    cols = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 10 * cols:
        pytest.skip("too little memory")
    got = rademacher(cols, KEY, device="cuda", backend=on_gpu)[-4096:].cpu()
    tile = (cols - 4096) // 2048
    # Row `tile` of a matrix one tile wide draws what tile `tile` of a single row draws.
    rows = torch.empty(2, 2048)
    for i in range(2):
        rows[i] = rademacher((tile + i + 1, 2048), KEY, device="cuda", backend=on_gpu)[-1].cpu()
    assert torch.equal(got, rows.flatten())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_perturbed_at_model_size_repeats_in_a_graph(on_gpu, seed, distribution, rows):
    """Both forward ops and the update, captured, compute what the CPU does, and the same bits every time."""
    on_gpu = {} if on_gpu == "cuda" else {"backend": on_gpu}  # not all of them have a CUDA kernel
    options, d_in, d_out = {"distribution": distribution}, 3584, 4096
    members, offsets = torch.randperm(16), torch.arange(17) * rows
    x, a, b = torch.randn(16 * rows, d_in) / d_in**0.5, torch.randn(8, d_in), torch.randn(d_out, 8)
    operands = [tensor.to(torch.bfloat16) for tensor in (x, a, b, torch.randn(16 * rows, d_out))]
    w, weights = torch.randn(300, 1134).to(torch.bfloat16), torch.randn(31)

    def step(x, a, b, y, w, members, offsets, weights, **options) -> None:
        lora_perturbed(x, a, b, EVEN_KEY, 0.1, members, offsets, scaling=2.0, y=y, **options)
        lowrank_perturbed(x, d_out, EVEN_KEY, 0.1, members, offsets, rank=2, y=y, **options)
        lowrank_update_(w, EVEN_KEY, weights, rank=2, **options)

    given = (*operands, w, members, offsets, weights)
    device = [tensor.cuda() for tensor in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*device, **options, **on_gpu)
    stream.synchronize()
    first = device[3].clone()
    for tensor, value in zip(device, given, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*device, **options, **on_gpu)
    graph.replay()
    assert torch.equal(device[3], first)
    step(*given, **options)
    assert torch.equal(device[4].cpu().view(torch.int16), w.view(torch.int16))
    torch.testing.assert_close(device[3].cpu().float(), operands[3].float(), rtol=2**-6, atol=2**-6)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_perturbed_linear_at_model_size_repeats_in_a_graph(seed, distribution, rows):
    """Both ops, captured, compute what the reference does, and the same bits every time."""
    d_in, d_out = 3584, 4096
    members, offsets = torch.randperm(16).cuda(), torch.arange(17).cuda() * rows
    shapes = ((16 * rows, d_in), (d_out, d_in), (8, d_in), (d_out, 8))
    x, weight, a, b = (torch.randn(shape, device="cuda").div(shape[1] ** 0.5).bfloat16() for shape in shapes)
    options = {"distribution": distribution, "bias": weight.view(-1)[:d_out]}

    def step(backend: str) -> list[torch.Tensor]:
        rest = (EVEN_KEY, 0.1, members, offsets)
        return [
            lora_perturbed_linear(x, weight, a, b, *rest, scaling=2.0, backend=backend, **options),
            lowrank_perturbed_linear(x, weight, *rest, rank=2, backend=backend, **options),
        ]

    first = step("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step("triton")
    graph.replay()
    for got, again, expected in zip(first, replayed, step("reference"), strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got.float(), expected.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_updates_of_many_tensors_in_a_graph(on_gpu, seed, distribution):
    """More tensors than one launch takes, of all dtypes; the graph replays what the CPU computes."""
    shapes = [(1000, 1134), *((1, 1 + i) for i in range(250)), (64, 2**14)]
    start = [torch.randn(shape).to(DTYPES[i % 3]) for i, shape in enumerate(shapes)]
    weights = torch.randn(31)
    tensors, on_device = [tensor.cuda() for tensor in start], weights.cuda()

    def step() -> None:
        perturb_(tensors, KEY, 7, 0.02, distribution=distribution, backend=on_gpu)
        es_update_(tensors, KEY, on_device, distribution=distribution, backend=on_gpu)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for tensor, value in zip(tensors, start, strict=True):
        tensor.copy_(value)
    graph.replay()
    perturb_(start, KEY, 7, 0.02, distribution=distribution)
    es_update_(start, KEY, weights, distribution=distribution)
    for got, want in zip(tensors, start, strict=True):
        assert torch.equal(got.cpu().float().view(torch.int32), want.float().view(torch.int32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora(on_gpu, seed, dtype, shape, transposed):
    p = problem(shape, dtype, transposed=transposed, device="cuda")
    y = p.y.clone()
    svd_lora(p.x, *p[2:], p.y, backend=on_gpu)
    h_error = H_ERROR[dtype]
    assert_y(p.y, p._replace(y=y), h_error=h_error)
    h = svd_lora_shrink(*p.of_shrink, backend=on_gpu)
    assert_h(h, p)
    again = y.clone()
    svd_lora_expand_(again, h, p.u_b, backend=on_gpu)
    assert_y(again, p._replace(y=y), h, h_error=h_error)


@pytest.mark.parametrize("rows", [1, 64, 512, 5000])
def test_svd_lora_at_model_size_repeats_exactly(on_gpu, seed, rows):
    p = problem(([rows // 2, 0, rows - rows // 2], 3584, 4096, 16, 16), torch.bfloat16, device="cuda")
    first, second = p.y.clone(), p.y.clone()
    svd_lora(p.x, *p[2:], first, backend=on_gpu)
    svd_lora(p.x, *p[2:], second, backend=on_gpu)
    assert torch.equal(first, second)
    assert_y(first, p, h_error=H_ERROR[torch.bfloat16])


def test_ops_run_in_the_current_stream_and_in_a_graph(on_gpu, seed):
    p = problem("aligned", torch.bfloat16, device="cuda")
    before, noise = p.y.clone(), torch.empty(64, 128, device="cuda")

    def step() -> None:
        gaussian(noise.shape, KEY, out=noise, backend=on_gpu)
        svd_lora(p.x, *p[2:], p.y, backend=on_gpu)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    assert_y(p.y, p._replace(y=before), h_error=H_ERROR[torch.bfloat16])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    p.y.copy_(before)
    noise.zero_()
    graph.replay()
    assert_y(p.y, p._replace(y=before), h_error=H_ERROR[torch.bfloat16])
    assert torch.equal(noise.cpu(), gaussian(noise.shape, KEY))


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprob_repeats_exactly_in_a_graph(seed, dtype):
    """At a size of several chunks of the vocabulary, with rows left out."""
    hidden, weight = (torch.randn(n, 512, device="cuda").to(dtype) for n in (700, 40_000))
    labels = torch.randint(40_000, (700,), device="cuda")
    labels[::3] = -100
    operands = (hidden, weight / 512**0.5, labels, None, 1.0, 30.0, 0.7, -100)
    grad = torch.randn(700, device="cuda")

    def step(backend: str | None = "triton") -> list[torch.Tensor]:
        logprob, logsumexp, slope = torch.ops.essa.linear_logprob(*operands, True, backend)
        saved = (grad, slope, logprob, logsumexp, *operands)
        return [logprob, *torch.ops.essa.linear_logprob_backward(*saved, [True, True, False], backend)[:2]]

    first = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    for got, again, expected in zip(first, replayed, step("reference"), strict=True):
        assert torch.equal(got, again)
        assert (got.float() - expected.float()).norm() <= 2 * torch.finfo(dtype).eps * expected.float().norm() + 1e-5


def test_stored_adapters_and_fused_layers_run_in_a_graph(seed):
    p = problem("aligned", torch.bfloat16, device="cuda")
    weight = torch.randn(128, 256, device="cuda").bfloat16() / 16
    a, b = torch.randn(3, 8, 256, device="cuda").bfloat16() / 16, torch.randn(3, 128, 8, device="cuda").bfloat16()
    ids = torch.randint(-1, 3, (32,), device="cuda")

    def step() -> torch.Tensor:
        y = svd_lora_linear(p.x, weight, *p[2:], backend="triton")
        return multi_lora(p.x, a, b, ids, y=y, backend="triton")

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    assert torch.equal(y, expected)
    ids.fill_(-1)
    graph.replay()
    base = p.x.double() @ weight.double().T
    assert_y(y, p._replace(y=base), h_error=H_ERROR[torch.bfloat16])


def test_decoding_attends_in_a_graph(seed):
    query, cache = torch.randn(5, 6, 64, device="cuda").bfloat16(), torch.randn(5, 2, 300, 64, device="cuda").bfloat16()
    mask = torch.rand(5, 300, device="cuda") < 0.7
    expected = decode_attention(query, cache, cache, mask, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(query, cache, cache, mask, backend="triton")
    graph.replay()
    assert torch.equal(out, expected)
    mask.fill_(True)
    graph.replay()
    torch.testing.assert_close(out, decode_attention(query, cache, cache, backend="reference"), rtol=2e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_current_device_does_not_matter(on_gpu, seed):
    p = problem("ragged", torch.float32, device="cuda:1")
    y = p.y.clone()
    with torch.cuda.device(0):
        svd_lora(p.x, *p[2:], p.y, backend=on_gpu)
        noise = gaussian((3, 100), KEY, device="cuda:1", backend=on_gpu)
    assert_y(p.y, p._replace(y=y))
    assert torch.equal(noise.cpu(), gaussian((3, 100), KEY))


@pytest.mark.parametrize("settings", [{"optimizer": "momentum"}, {"optimizer": "adam", "weight_decay": 0.1}], ids=str)
def test_optimisers_step_as_on_the_cpu(settings):
    """To the bit, so that a driver on the CPU and its workers on GPUs agree on where the search is."""
    points = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1134, 257), torch.nn.Linear(257, 64)).to(device)
        space = LowRankNoise(model)
        strategy = make_strategy(
            "es", space=space, dim=1, population_size=16, prompts_per_generation=4, seed=3, **settings
        )
        for generation in range(4):
            strategy.tell(generation, np.random.default_rng(generation).random((16, 4)), None)
        points[device] = [parameter.cpu() for parameter in space.parameters]
    for one, other in zip(*points.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_list_may_span_gpus(seed):
    start = [torch.randn(100, 1134), torch.randn(77), torch.randn(64, 130)]
    weights = torch.randn(31)
    tensors = [tensor.to(f"cuda:{i % 2}") for i, tensor in enumerate(start)]
    for given in (start, tensors):
        perturb_(given, KEY, 7, 0.02)
        es_update_(given, KEY, weights)
    for got, expected in zip(tensors, start, strict=True):
        assert torch.equal(got.cpu(), expected)
