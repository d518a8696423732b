"""The Triton kernels in Triton's interpreter: run by test_interpreter.py in a process with TRITON_INTERPRET=1.

The interpreter multiplies and adds what the compiled kernels do, with a correctly rounded fma.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from triton.runtime.errors import OutOfResources

from essa_kernels.reference import decode_attention as reference_attention
from essa_kernels.reference import es_update as reference_update
from essa_kernels.reference import linear_logprob as reference_logprob
from essa_kernels.reference import lora_perturbed as reference_lora
from essa_kernels.reference import lowrank as reference_lowrank
from essa_kernels.reference import multi_lora as reference_multi_lora
from essa_kernels.reference import noise as reference
from essa_kernels.tl import (
    config,
    decode_attention,
    es_update,
    linear_logprob,
    lora_perturbed,
    lowrank,
    multi_lora,
    noise,
    svd_lora,
)
from essa_kernels.tl.tune import tune

from .problems import DTYPES, FLOAT32_ERROR, H_ERROR, SHAPES, assert_h, assert_y, problem

NEVER, ALWAYS = 10**9, 0
PATHS = {
    "fused": {"fused": {"min_rows": ALWAYS}},
    "two launches": {"fused": {"min_rows": NEVER}, "mix_expand": {"max_rows": NEVER}},
    "three launches": {"fused": {"min_rows": NEVER}, "mix_expand": {"max_rows": ALWAYS}},
}


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch):
    """Overrides entries of configs.json for the interpreter."""

    def override(entries: dict[str, dict[str, int]]) -> None:
        base = config.CONFIGS["cpu"]
        merged = base | {kernel: base.get(kernel, {}) | entry for kernel, entry in entries.items()}
        monkeypatch.setitem(config.CONFIGS, "cpu", merged)
        config.IN_USE.clear()

    yield override
    monkeypatch.undo()
    config.IN_USE.clear()


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ((1, 1), (0, 0, 0, 0)),
        ((3, 1000), (2**64 - 1, 2**32 - 1, 2**30 - 1, 2**33 - 1)),
        ((37, 129), (2**63 + 5, 7, 1, 2)),
        ((5, 2050), (11, 2**31, 3, 1)),
        ((16, 65536), (2026, 1, 2, 3)),
    ],
)
def test_fills_have_the_bits_of_the_contract(configure, distribution, shape, key):
    if shape[1] == 65536:
        configure({"gaussian": {"tiles": 4096}, "rademacher": {"tiles": 128}})
    got, expected = torch.full((shape[0] + 1, shape[1]), float("nan")), torch.empty(shape)
    getattr(reference, distribution)(expected, *key)
    getattr(noise, distribution)(got[:-1], *key)
    assert torch.equal(got[:-1].view(torch.int32), expected.view(torch.int32))
    assert got[-1].isnan().all(), "wrote past the end"


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("tiles", [1, 16])
def test_updates_have_the_bits_of_the_contract(configure, seed, distribution, tiles):
    configure({f"{op}_{distribution}": {"tiles": tiles} for op in ("perturb", "es_update")})
    shapes = [(0, 5), (7, 129), (3, 2050), (1, 1), (130, 1), (2, 4096)]  # the float32 one is the fourth, and alone
    flat = [torch.randn(rows * cols + 1).to(DTYPES[i % 3]) for i, (rows, cols) in enumerate(shapes)]
    got = [f[:-1].view(shape) for f, shape in zip(flat, shapes, strict=True)]
    expected, ends = [tensor.clone() for tensor in got], [float(f[-1]) for f in flat]
    weights = torch.randn(4)
    weights[1] = 0.0
    for implementation, tensors in ((es_update, got), (reference_update, expected)):
        implementation.perturb_(tensors, 2**64 - 1, 7, 4, 5, 0.03, distribution)
        implementation.es_update_(tensors, 2**63 + 5, 2**32 - 1, 4, weights, distribution)
        for tensor in tensors:
            implementation.perturb_([tensor], 3, 7, 2**30 - 2, 4, 0.03, distribution)
            implementation.es_update_([tensor], 3, 7, 2**30 - 2, weights, distribution)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))
    assert ends == [float(f[-1]) for f in flat], "wrote past the end"


class Hills:
    """As a measure: seconds that depend on the parameters in use, with the least at these; refused above some."""

    def __init__(self, summits: dict[str, int], refused: dict[str, int]) -> None:
        self.summits, self.refused, self.tried = summits, refused, []

    def __call__(self, call) -> float:
        call()
        ((_, parameters),) = config.IN_USE.items()
        self.tried.append(parameters)
        if any(parameters[name] >= least for name, least in self.refused.items()):
            raise OutOfResources(2, 1, "shared memory")
        return 1.0 + sum(abs(math.log2(parameters[name] / at)) for name, at in self.summits.items())


@pytest.fixture
def restored(monkeypatch):
    """`configs.json` as it is, whatever the test does."""
    monkeypatch.setattr(config, "CONFIGS", copy.deepcopy(config.CONFIGS))
    yield
    config.IN_USE.clear()


def test_tuning_finds_the_fastest_and_changes_no_bits(restored):
    expected, got = torch.empty(3, 5000), torch.empty(3, 5000)
    reference.gaussian(expected, 7, 1, 2, 3)
    hills = Hills({"tiles": 4096}, refused={"tiles": 8192})
    assert tune(lambda: noise.gaussian(got, 7, 1, 2, 3), measure=hills) == {"cpu": {"gaussian": {"tiles": 4096}}}
    assert {"tiles": 8192, "num_warps": 4} in hills.tried and {"tiles": 4096, "num_warps": 8} in hills.tried
    assert config.config(got, "gaussian") == {"tiles": 4096, "num_warps": 4}
    assert torch.equal(got, expected)


def test_tuning_keeps_what_is_fastest_already_and_what_a_small_gain_would_change(restored):
    out, before = torch.empty(1, 64), config.config(torch.empty(1), "gaussian")
    hills = Hills({"tiles": before["tiles"]}, refused={})
    assert tune(lambda: noise.gaussian(out, 7, 1, 2, 3), measure=hills) == {}
    hills = Hills({"tiles": 2 * before["tiles"]}, refused={})
    assert tune(lambda: noise.gaussian(out, 7, 1, 2, 3), measure=hills, least_gain=0.6) == {}
    assert config.config(out, "gaussian") == before


def test_interrupted_tuning_leaves_all_as_it_was(restored):
    out, before = torch.empty(1, 64), config.config(torch.empty(1), "gaussian")
    seconds = iter([3.0, 2.0, 1.0])
    with pytest.raises(StopIteration):
        tune(lambda: noise.gaussian(out, 7, 1, 2, 3), measure=lambda call: call() or next(seconds))
    assert config.config(out, "gaussian") == before


def test_tuning_refuses_what_it_cannot_tune(restored):
    with pytest.raises(ValueError, match=r"least_gain must be in \[0, 1\), got 1"):
        tune(lambda: None, least_gain=1)
    with pytest.raises(ValueError, match="call must launch one of this package's Triton kernels, it launched none"):
        tune(lambda: None)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"sm_90": {"shrink": {}}}, "kernel must be one of gaussian, .*, got 'shrink'"),
        ({"sm_90": {"mix": {"warps": 4}}}, "mix has the parameters block_rows, num_warps, ranks_bytes, got 'warps'"),
        ({"sm_90": {"mix": {"num_warps": 8}}, "sm_80": {"mix": {"num_warps": 0}}}, "num_warps must be .* >= 1, got 0"),
        ({"sm_90": {"mix": {"num_warps": 2.0}}}, r"num_warps must be an integer >= 1, got 2\.0"),
    ],
)
def test_configs_that_do_not_fit_are_refused_whole(restored, configs, message):
    before = copy.deepcopy(config.CONFIGS)
    with pytest.raises(ValueError, match=message):
        config.use(configs)
    assert before == config.CONFIGS


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora(configure, seed, path, shape, dtype):
    configure(PATHS[path])
    p = problem(shape, dtype, transposed=path == "two launches")
    y = p.y.clone()
    padding = p.y.as_strided((p.y.shape[0], 8), p.y.stride(), p.y.shape[1])
    padding.fill_(7)
    svd_lora.svd_lora_(*p)
    assert padding.eq(7).all(), "wrote beside y"
    assert_y(p.y, p._replace(y=y), h_error=H_ERROR[dtype])


@pytest.mark.parametrize("max_rows", [NEVER, ALWAYS], ids=["few rows", "many rows"])
@pytest.mark.parametrize("shape", ["ragged", "odd", "wide ranks", "one row each"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora_linear(configure, seed, max_rows, shape, dtype):
    configure({"linear_decode": {"max_rows": max_rows}})
    p = problem(shape, dtype, transposed=shape == "odd")
    weight = (torch.randn(p.y.shape[1], p.x.shape[1]) / p.x.shape[1] ** 0.5).to(dtype)
    bias = None if shape == "odd" else torch.randn(p.y.shape[1]).to(dtype)
    y = torch.full((len(p.x) + 1, p.y.shape[1]), float("nan"), dtype=dtype)
    svd_lora.svd_lora_linear(y[:-1], p.x, weight, bias, *p[2:])
    assert y[-1].isnan().all(), "wrote past the end"
    base = p.x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_y(y[:-1], p._replace(y=base), h_error=H_ERROR[dtype])


@pytest.mark.parametrize("shape", ["ragged", "odd", "wide ranks", "one row each"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_lora_expand_linear(seed, shape, dtype):
    p = problem(shape, dtype, transposed=shape == "odd")
    weight = (torch.randn(p.y.shape[1], p.x.shape[1]) / p.x.shape[1] ** 0.5).to(dtype)
    h = torch.full((p.x.shape[0], p.core.shape[0] + 3), float("nan"))[:, 2:-1]
    svd_lora.svd_lora_shrink(h, *p.of_shrink)
    y = torch.full((len(p.x) + 1, p.y.shape[1]), float("nan"), dtype=dtype)
    svd_lora.svd_lora_expand_linear(y[:-1], p.x, weight, None, h, p.u_b)
    assert y[-1].isnan().all(), "wrote past the end"
    assert_y(y[:-1], p._replace(y=p.x.double() @ weight.double().T), h_error=H_ERROR[dtype])


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shrink_sums_its_splits(configure, seed, splits, dtype):
    configure({"project": {"programs": splits}})
    p = problem("odd", dtype)
    h = torch.full((p.x.shape[0], p.core.shape[0] + 3), float("nan"))[:, 2:-1]
    svd_lora.svd_lora_shrink(h, *p.of_shrink)
    assert_h(h, p)


def test_owners_are_found_in_more_than_one_step(seed):
    members = 5000
    offsets = torch.randint(0, 41, (members - 1,)).sort().values
    p = problem("one of everything", torch.float32)
    p = p._replace(
        x=torch.randn(40, 1),
        s_a=torch.rand(members, 1),
        s_b=torch.rand(members, 1),
        offsets=torch.cat([torch.tensor([0]), offsets, torch.tensor([40])]),
    )
    h = torch.full((40, 1), float("nan"))
    svd_lora.svd_lora_shrink(h, *p.of_shrink)
    assert_h(h, p)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(
    ("shape", "d_in"), [({"block_rows": 4, "lanes": 16}, 129), ({"lanes": 256, "programs": 32}, 2100)]
)
def test_perturbed_forward(configure, seed, distribution, shape, d_in):
    """A pair apart, an odd member alone, an empty group; d_in in several splits, rows in several blocks."""
    configure({"perturbed": shape})
    members, offsets = torch.tensor([4, 9, 2, 5]), torch.tensor([0, 3, 5, 5, 12])
    where, key = (members, offsets), (2**64 - 1, 7, 4)
    for dtype, d_out, rank in ((torch.float32, 70, 2), (torch.bfloat16, 129, 1)):
        x, a = (torch.randn(rows, d_in).div(d_in**0.5).to(dtype) for rows in (12, rank))
        frame = torch.randn(12, d_out + 8).to(dtype)
        y, beside = frame[:, :d_out], frame[:, d_out:].clone()
        b, expected = torch.randn(rank, d_out).to(dtype).T, y.clone()
        reference_lora.lora_perturbed_(expected, x, a, b, *key, 0.3, *where, 2.0, distribution)
        lora_perturbed.lora_perturbed_(y, x, a, b, *key, 0.3, *where, 2.0, distribution)
        torch.testing.assert_close(y, expected)
        expected = y.clone()
        reference_lowrank.lowrank_perturbed_(expected, x, *key, 0.3, *where, rank, distribution)
        lowrank.lowrank_perturbed_(y, x, *key, 0.3, *where, rank, distribution)
        torch.testing.assert_close(y, expected)
        assert torch.equal(frame[:, d_out:], beside), "wrote beside y"


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize(
    ("shape", "counts", "d_in", "d_out"),
    [
        ({}, [3, 2, 0, 7], 129, 70),
        ({"block_rows": 16, "block_columns_bytes": 256, "elements": 256}, [11, 1, 1, 9], 2100, 129),
        ({"max_rows": ALWAYS, "elements": 1024}, [1] * 40, 65, 2050),
    ],
    ids=["few rows", "several blocks", "many rows"],
)
def test_perturbed_linear(configure, seed, distribution, shape, counts, d_in, d_out):
    """A pair apart, an odd member alone, an empty group; more pairs or ranks than are drawn at once."""
    configure({"perturbed_linear_decode": shape, "perturbed_linear": shape})
    members, offsets = torch.tensor([4, 9, 2, 5, *range(10, 6 + len(counts))]), torch.tensor([0, *counts]).cumsum(0)
    where, key, rows = (members, offsets), (2**64 - 1, 7, 4), sum(counts)
    for dtype, rank in ((torch.float32, 3), (torch.bfloat16, 1), (torch.float16, 5)):
        x, weight, a = (torch.randn(n, d_in).div(d_in**0.5).to(dtype) for n in (rows, d_out, rank))
        bias, b = torch.randn(d_out).to(dtype), torch.randn(rank, d_out).to(dtype).T
        of_lora = (x, weight, bias, a, b, *key, 0.3, *where, 2.0, distribution)
        of_lowrank = (x, weight, None, *key, 0.3, *where, rank, distribution)
        for op, reference_op, operands in (
            (lora_perturbed.lora_perturbed_linear, reference_lora.lora_perturbed_linear, of_lora),
            (lowrank.lowrank_perturbed_linear, reference_lowrank.lowrank_perturbed_linear, of_lowrank),
        ):
            got, expected = torch.full((rows + 1, d_out), float("nan"), dtype=dtype), torch.empty(rows, d_out).to(dtype)
            op(got[:-1], *operands)
            reference_op(expected, *operands)
            torch.testing.assert_close(got[:-1], expected)
            assert got[-1].isnan().all(), "wrote past the end"


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("side", [64, 128])
def test_lowrank_updates_have_the_bits_of_the_contract(configure, seed, distribution, side):
    configure({"lowrank_update": {"side": side}})
    shapes = [(1, 1), (70, 65), (1, 2100 * side // 128)]
    flat = [torch.randn(rows * cols + 1).to(DTYPES[i % 3]) for i, (rows, cols) in enumerate(shapes)]
    got = [f[:-1].view(shape) for f, shape in zip(flat, shapes, strict=True)]
    expected, ends = [tensor.clone() for tensor in got], [float(f[-1]) for f in flat]
    for implementation, tensors in ((lowrank, got), (reference_lowrank, expected)):
        implementation.lowrank_update_(
            tensors, 2**63 + 5, 2**32 - 1, 4, torch.tensor([0.5, 0.0, -1.3]), 2, distribution
        )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))
    assert ends == [float(f[-1]) for f in flat], "wrote past the end"


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [64, 10**6], ids=["many chunks", "one chunk"])
def test_linear_logprob(configure, seed, words, dtype, softcap):
    """Rows and words that fill no block, several chunks of the vocabulary, rows left out; beside the reference."""
    configure({"logprob_chunk": {"elements": 1, "least_words": words}, "logprob_blocks": {"block_rows": 16}})
    rows, d, vocab = 19, 70, 700
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, d + 8), (vocab, d), (vocab,)))
    labels, grad = torch.randint(0, vocab, (rows,)), torch.randn(rows)
    labels[::5] = -1
    hidden[0] = float("nan")
    operands = (hidden[:, :d], weight, labels, bias, 0.3, softcap, 0.7, -1)
    results = []
    for implementation in (linear_logprob, reference_logprob):
        logprob, logsumexp = torch.zeros(2, rows)
        slope = torch.full((rows, d), float("nan"), dtype=torch.float32 if dtype is torch.float16 else dtype)
        implementation.linear_logprob(logprob, logsumexp, slope, *operands)
        again = torch.zeros_like(logprob)
        implementation.linear_logprob(again, torch.zeros(rows), None, *operands)
        torch.testing.assert_close(again, logprob)
        d_hidden, d_weight, d_bias = (torch.full_like(tensor, float("nan")) for tensor in (operands[0], weight, bias))
        implementation.linear_logprob_backward(d_hidden, d_weight, d_bias, grad, slope, logprob, logsumexp, *operands)
        results.append((logprob, logsumexp, d_hidden, d_weight, d_bias))
    for got, expected in zip(*results, strict=True):
        error = (got.float() - expected.float()).abs().max()
        assert error <= {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype] * expected.abs().max()


# rows, heads, kv_heads, length, d, d_v
ATTENDED = [(3, 14, 2, 300, 64, 64), (2, 3, 3, 33, 40, 129), (1, 20, 1, 257, 8, 8)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", ATTENDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention(seed, dtype, sizes, masked):
    rows, heads, kv_heads, length, d, d_v = sizes
    query = torch.randn(rows, heads, d).to(dtype)
    cache = torch.randn(rows, kv_heads, length + 5, d + d_v).to(dtype)[:, :, :length]
    key, value = cache.split([d, d_v], -1)
    mask = torch.rand(rows, length + 1)[:, 1:] < 0.7 if masked else None
    got, exact = torch.full((rows, heads, d_v), float("nan")).to(dtype), torch.empty(rows, heads, d_v)
    decode_attention.decode_attention(got, query, key, value, mask, 0.3)
    reference_attention.decode_attention(exact, query, key, value, mask, 0.3)
    assert (got.float() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps + FLOAT32_ERROR * 10


# ids, ranks, d_in, d_out
STORED = {
    "mixed": ([2, 0, -1, 2, 5, 0, 0, 2, -1, 5] * 7, [4, 1, 16, 7, 2, 33], 129, 257),
    "stacked": ([3, 0, 1, 1, 3, 3, 2, 0] * 9, [8] * 4, 256, 128),
    "none": ([-1] * 5, [8], 40, 66),
}


def results(backend, y, d_y, x, a, b, *rest):
    """What multi_lora adds to y, then the gradients: y, d_x, *d_a, *d_b."""
    y, d_x = y.clone(), torch.zeros(x.shape, dtype=x.dtype)
    d_a, d_b = ([torch.full_like(t, torch.nan) for t in ts] for ts in (a, b))
    backend.multi_lora_(y, x, a, b, *rest)
    backend.multi_lora_backward(d_x, d_a, d_b, d_y, x, a, b, *rest)
    return [y, d_x, *d_a, *d_b]


@pytest.mark.parametrize("factors", ["same", "float32"])
@pytest.mark.parametrize("case", STORED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_lora(seed, dtype, case, factors):
    ids, ranks, d_in, d_out = STORED[case]
    of_factors = dtype if factors == "same" else torch.float32
    x, d_y = torch.randn(len(ids), d_in + 8).to(dtype)[:, :d_in], torch.randn(len(ids), d_out).to(dtype)
    a = [(torch.randn(r, d_in) / d_in**0.5).to(of_factors) for r in ranks]
    b = [(torch.randn(d_out, r) / r**0.5).to(of_factors) for r in ranks]
    if case == "stacked":
        a, b = [torch.stack(a)], [torch.stack(b)]
    operands = torch.randn(len(ids), d_out).to(dtype), d_y, x, a, b
    rest = torch.tensor(ids), torch.rand(len(ranks)) + 0.5, 1.0
    truth, size = (
        results(
            reference_multi_lora,
            *([change(t) for t in o] if isinstance(o, list) else change(o) for o in operands),
            *rest,
        )
        for change in (torch.Tensor.float, lambda t: t.float().abs())
    )
    error = FLOAT32_ERROR + H_ERROR[dtype]
    for got, true, terms in zip(results(multi_lora, *operands, *rest), truth, size, strict=True):
        rounding = torch.finfo(got.dtype).eps * true.abs() + torch.finfo(got.dtype).smallest_normal
        assert (got.float() - true).abs().le(error * terms + rounding).all()
