"""perturb_ and es_update_: the same bits on every backend this machine has, lists of tensors, and nothing beside them."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from essa_kernels import NoiseKey, es_update_, gaussian, perturb_, rademacher

from . import make_known_answers
from .oracle import DTYPES, assert_no_worse_than_torch, assert_threads_change_nothing, peaks, run_tests

KEY = NoiseKey(2**63 + 2026, generation=2**31 + 3, site=4)
MEMBER = 2**33 - 1
SIGMA = 0.03
SHAPES = [(3, 1000), (1,), (37, 129), (5, 2050), (0, 5), (), (2, 3, 64), (2, 4097), (130, 1), (4, 0)]


@pytest.fixture(params=["gaussian", "rademacher"])
def distribution(request: pytest.FixtureRequest) -> str:
    return request.param


def draw(t: Tensor, distribution: str, member: int, key: NoiseKey = KEY) -> Tensor:
    return {"gaussian": gaussian, "rademacher": rademacher}[distribution](t.shape, key, member, device=t.device)


def tensors(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def random_weights(members: int) -> Tensor:
    """Of every third pair or so, the members weigh the same."""
    weights = torch.randn(members)
    for pair in range(members // 2):
        if torch.rand(()) < 0.3:
            weights[2 * pair : 2 * pair + 2] = 0.75
    return weights


def assert_bits(got: Tensor, expected: Tensor) -> None:
    integers = torch.int32 if got.dtype is torch.float32 else torch.int16
    assert got.dtype is expected.dtype
    assert torch.equal(got.cpu().view(integers), expected.cpu().view(integers))


def both(t: Tensor | list[Tensor], weights: Tensor, **options) -> None:
    """A perturbation and an update of the same tensors."""
    perturb_(t, KEY, MEMBER, SIGMA, **options)
    es_update_(t, KEY, weights, **options)


# Values


def test_known_answers(backend):
    answers = json.loads(make_known_answers.PATH.read_text())["updates"]
    for answer, got in zip(answers, make_known_answers.updates(*backend), strict=True):
        assert got == answer


def test_every_instruction_set(isa_environment):
    run_tests("(known_answers and cpu-cpu) or any_sizes", isa_environment, __file__)


def test_bits_of_the_reference(backend, dtype, distribution, seed):
    name, device = backend
    if name == "reference":
        pytest.skip("it is what the others are held to")
    expected, weights = tensors(dtype), random_weights(13)
    got = [t.to(device, copy=True) for t in expected]
    both(got, weights.to(device), distribution=distribution, backend=name)
    both(expected, weights, distribution=distribution, backend="reference")
    for one, other in zip(got, expected, strict=True):
        assert_bits(one, other)


@given(
    members=st.integers(1, 20),
    rows=st.integers(0, 40),
    cols=st.integers(0, 5000),
    dtype=st.sampled_from(DTYPES),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
    data_seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(members, rows, cols, dtype, distribution, data_seed):
    torch.manual_seed(data_seed)
    t, weights = torch.randn(rows if cols < 300 else rows % 4, cols).to(dtype), random_weights(members)
    expected = t.clone()
    both(t, weights, distribution=distribution)
    both(expected, weights, distribution=distribution, backend="reference")
    assert_bits(t, expected)


def test_sums_of_the_members_noise(backend, dtype, distribution, seed):
    """In float64, member by member, with the noise that the fills draw."""
    name, device = backend
    options = {"distribution": distribution, "backend": name}
    t, weights = torch.randn(65, 258).to(device, dtype), torch.randn(31)
    perturbed = perturb_(t.clone(), KEY, 5, SIGMA, **options)
    truth = t.double() + SIGMA * draw(t, distribution, 5).double()
    assert_no_worse_than_torch(perturbed, truth.float().to(dtype), truth)
    updated = es_update_(t.clone(), KEY, weights, **options)
    truth = t.double() + sum(float(w) * draw(t, distribution, m).double() for m, w in enumerate(weights))
    assert_no_worse_than_torch(updated, truth.float().to(dtype), truth)


def test_an_update_with_one_draw_is_one_fma(backend, distribution, seed):
    """Where the sum has one term, its bits are known without the reference."""
    name, device = backend
    t = torch.zeros(9, 300, device=device)
    es_update_(t, KEY, [0.0, 0.0, 0.5, -0.25], distribution=distribution, backend=name)
    assert_bits(t, 0.75 * draw(t, distribution, 2))


def test_threads_change_nothing(dtype, distribution, seed, native):
    start, weights = tensors(dtype), random_weights(10)

    def work() -> Tensor:
        updated = [t.clone() for t in start]
        both(updated, weights, distribution=distribution, backend="cpu")
        return torch.cat([t.flatten() for t in updated])

    assert_threads_change_nothing(work)


def test_pairs(backend, distribution, seed):
    """Members of a pair are antithetic; those that weigh the same cancel; a missing one weighs 0."""
    name, device = backend
    options = {"distribution": distribution, "backend": name}
    t = torch.randn(9, 70, device=device)
    plus, minus = (perturb_(torch.zeros_like(t), KEY, member, SIGMA, **options) for member in (10, 11))
    assert torch.equal(plus, -minus)
    assert torch.equal(es_update_(t.clone(), KEY, [1.5, 1.5, 0.3, 0.3], **options), t)
    with_partner = es_update_(t.clone(), KEY, [0.1, 0.2, 0.3, 0.0], **options)
    assert torch.equal(es_update_(t.clone(), KEY, [0.1, 0.2, 0.3], **options), with_partner)


def test_a_list_draws_from_successive_sites(backend, distribution, seed):
    name, device = backend
    options = {"distribution": distribution, "backend": name}
    many = [torch.randn(shape).to(device, DTYPES[i % 3]) for i, shape in enumerate(SHAPES)]
    alone, weights = [t.clone() for t in many], random_weights(6).to(device)
    assert perturb_(many, KEY, 3, SIGMA, **options) is many
    assert es_update_(many, KEY, weights, **options) is many
    for i, (t, expected) in enumerate(zip(many, alone, strict=True)):
        key = KEY.at(site=KEY.site + 2 * i)
        assert perturb_(expected, key, 3, SIGMA, **options) is expected
        assert es_update_(expected, key, weights, **options) is expected
        assert_bits(t, expected)


def test_a_list_longer_than_a_launch(backend, seed):
    """More tensors than the CUDA kernels' arguments hold and than Triton's search takes in one step."""
    name, device = backend
    if name == "reference":
        pytest.skip("it takes one after the other")
    many = [torch.randn(1 + i % 5, device=device) for i in range(300)]
    expected, weights = [t.clone() for t in many], random_weights(4)
    both(many, weights, backend=name)
    both(expected, weights, backend="reference")
    assert_bits(torch.cat(many), torch.cat(expected))


def test_nothing_beside_a_view_is_touched(backend, dtype, distribution, seed):
    name, device = backend
    frame = torch.full((40, 129), torch.nan, dtype=dtype, device=device)
    t = frame[3:20]
    t.zero_()
    both(t, torch.ones(3), distribution=distribution, backend=name)
    assert t.isfinite().all()
    assert frame[:3].isnan().all()
    assert frame[20:].isnan().all()


# Perturbing a model and getting it back


def test_the_opposite_perturbation_is_no_way_back(backend, seed):
    """In low precision it leaves differences, which grow from member to member; the stored base does not drift."""
    name, device = backend
    base = torch.randn(300, 200).to(device, torch.bfloat16)
    t, drifts = base.clone(), []
    for member in range(8):
        perturb_(t, KEY, member, SIGMA, backend=name)
        perturb_(t, KEY, member, -SIGMA, backend=name)
        drifts.append(float((t.float() - base.float()).abs().mean()))
    assert 0 < drifts[0] < drifts[-1]

    alone = perturb_(base.clone(), KEY, 7, SIGMA, backend=name)
    for member in range(8):
        t.copy_(base)
        perturb_(t, KEY, member, SIGMA, backend=name)
    assert torch.equal(t, alone), "the last member's parameters depend on those before it"
    assert torch.equal(t.copy_(base), base)


UPDATE = """
import torch
from essa_kernels import NoiseKey, es_update_

t, weights = torch.zeros(2**22), {members: torch.randn(members) for members in (8, 512)}
es_update_(t, NoiseKey(0), torch.ones(2), backend="cpu")
"""


def test_memory_does_not_grow_with_the_members(native):
    """Beside 16 MiB of parameters: less than one more of them, and the same for 8 members as for 512."""
    call = 'es_update_(t, NoiseKey(0), weights[{}], distribution="rademacher", backend="cpu")'
    few, many = peaks(UPDATE, call.format(8), call.format(512))
    assert few < 512
    assert many < 512


# Registration


def test_opcheck(distribution, seed):
    many = [torch.randn(3, 70), torch.randn(5).bfloat16()]
    torch.library.opcheck(torch.ops.essa.perturb_.default, (many, -1, 2, 4, 3, SIGMA, distribution, None))
    torch.library.opcheck(torch.ops.essa.es_update_.default, (many, -1, 2, 4, torch.randn(5), distribution, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, seed):
    def step(many: list[Tensor], x: Tensor, member: int, weights: Tensor) -> Tensor:
        perturb_(many, KEY, member, SIGMA)
        y = x @ many[0]
        es_update_(many, KEY, weights)
        es_update_(many[0], KEY, [0.5, 0.25], distribution="rademacher")
        return y + x @ many[0] + many[1].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for members in (3, 4):
        many, x, weights = [torch.randn(9, 7), torch.randn(5)], torch.randn(4, 9), torch.randn(members)
        expected = [t.clone() for t in many]
        with torch.no_grad():
            assert torch.equal(compiled(many, x, members, weights), step(expected, x, members, weights))
        for t, other in zip(many, expected, strict=True):
            assert torch.equal(t, other)


def test_gradients_are_refused(seed):
    parameter = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(RuntimeError, match="perturb_: t requires grad, but perturb_ has no backward"):
        perturb_(parameter, KEY, 0, SIGMA)
    with pytest.raises(RuntimeError, match=r"es_update_: t\[1\] requires grad"):
        es_update_([torch.ones(3), parameter], KEY, [1.0])
    with pytest.raises(RuntimeError, match="es_update_: weights requires grad"):
        es_update_(torch.ones(3), KEY, torch.ones(2, requires_grad=True))
    with torch.no_grad():
        both(parameter, torch.ones(1))
    assert parameter.requires_grad
    assert (parameter != 1).all()


@pytest.mark.parametrize("change", [lambda t: perturb_([t], KEY, 0, SIGMA), lambda t: es_update_(t, KEY, [1.0])])
def test_autograd_notices_that_a_tensor_has_changed(change):
    factor, t = torch.ones(5, requires_grad=True), torch.ones(5)
    loss = (factor * t).sum()
    change(t)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Bad input


HUGE = torch.empty(2**28 + 1, 1, dtype=torch.bfloat16, device="meta")
SHARED = torch.zeros(8)
BAD_TENSORS = [
    ({"t": []}, ValueError, "t must be a tensor or a sequence of at least one, got none"),
    ({"t": 3}, TypeError, "t must be a tensor or a sequence of tensors, got int"),
    ({"t": [torch.zeros(2), None]}, TypeError, "t must be a tensor or a sequence of tensors, got NoneType"),
    ({"t": torch.zeros(2).double()}, ValueError, "t must have dtype float32, bfloat16 or float16, got torch.float64"),
    ({"t": [torch.zeros(2), torch.zeros(2).int()]}, ValueError, r"t\[1\] must have dtype float32, .*, got torch.int32"),
    ({"t": torch.zeros(3, 2).T}, ValueError, r"t must be contiguous, got strides \[1, 2\]"),
    ({"t": torch.zeros(3).expand(2, 3)}, ValueError, r"t must be contiguous, got strides \[0, 1\]"),
    ({"t": [torch.zeros(2), torch.zeros(2, device="meta")]}, ValueError, r"t\[1\] must be on cpu, got meta"),
    ({"t": [SHARED[:5], torch.zeros(9), SHARED[4:]]}, ValueError, r"t must not share memory, got t\[0\] and t\[2\]"),
    ({"t": [SHARED, SHARED]}, ValueError, r"t must not share memory, got t\[0\] and t\[1\]"),
    ({"t": HUGE}, ValueError, r"t must fit the counter, rows \* ceil.* <= 2\*\*32, got \[268435457, 1\]"),
    ({"key": 3}, TypeError, "key must be a NoiseKey, got 3"),
    (
        {"t": [torch.zeros(2)] * 2, "key": NoiseKey(0, site=2**30 - 2)},
        ValueError,
        r"key.site must leave a site below 2\*\*30 for every tensor, site \+ 2 \* i for t\[i\], got 1073741822 for 2",
    ),
    ({"distribution": "normal"}, ValueError, "distribution must be gaussian or rademacher, got 'normal'"),
    ({"backend": "cuda"}, RuntimeError, "backend 'cuda' is not available: it takes cuda tensors, not cpu tensors"),
    ({"backend": "numpy"}, ValueError, "backend must be one of cpu, cuda, triton, reference or None, got 'numpy'"),
]
BAD_PERTURBATIONS = [
    ({"member": -1}, ValueError, r"member must be in 0 .. 2\*\*33 - 1, got -1"),
    ({"member": 2**33}, ValueError, r"member must be in 0 .. 2\*\*33 - 1, got 8589934592"),
    ({"member": 0.5}, TypeError, "member must be an integer, got 0.5"),
    ({"sigma": float("nan")}, ValueError, "sigma must be finite in float32, got nan"),
    ({"sigma": 1e39}, ValueError, r"sigma must be finite in float32, got 1e\+39"),
    ({"sigma": np.float16("inf")}, ValueError, "sigma must be finite in float32, got .*inf"),
    ({"sigma": 10**400}, ValueError, "sigma must be finite in float32, got 1000"),
    ({"sigma": "small"}, TypeError, "sigma must be a number, got 'small'"),
]
BAD_WEIGHTS = [
    ({"weights": []}, ValueError, r"weights must have shape \[members\] with members >= 1, got \[0\]"),
    ({"weights": torch.ones(2, 2)}, ValueError, r"weights must have shape \[members\] with members >= 1, got \[2, 2\]"),
    ({"weights": torch.ones(2).double()}, ValueError, "weights must have dtype torch.float32, got torch.float64"),
    ({"weights": ["one"]}, TypeError, r"weights must be a float32 tensor or a sequence of numbers, got \['one'\]"),
    ({"weights": "12"}, TypeError, "weights must be a float32 tensor or a sequence of numbers, got '12'"),
    ({"weights": [1.0, float("nan")]}, ValueError, "weights must be finite, got nan for member 1"),
    ({"weights": [1e39]}, ValueError, "weights must be finite, got inf for member 0"),
    ({"weights": [10**400]}, TypeError, r"weights must be a float32 tensor or a sequence of numbers, got \[1000"),
    (
        {"weights": [0.0, 0.0, 3e38, -3e38]},
        ValueError,
        r"weights must have differences in their pairs that are finite in float32, got 3\S+e\+38 - -3\S+ for members 2 and 3",
    ),
    ({"weights": torch.ones(2, device="meta")}, ValueError, "weights must be on cpu, got meta"),
]


@pytest.mark.parametrize("number", [float, np.float32, np.float64, Fraction])
def test_any_real_number_is_a_sigma(number):
    t, expected = torch.zeros(2, 4, 6)
    perturb_(t, KEY, 3, number(0.5))
    perturb_(expected, KEY, 3, 0.5)
    assert torch.equal(t, expected)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_TENSORS + BAD_PERTURBATIONS)
def test_bad_perturbations_are_refused(arguments, error, message):
    good = {"t": torch.zeros(4, 6), "key": KEY, "member": 3, "sigma": SIGMA}
    with pytest.raises(error, match=f"^perturb_: {message}"):
        perturb_(**good | arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_TENSORS + BAD_WEIGHTS)
def test_bad_updates_are_refused(arguments, error, message):
    with pytest.raises(error, match=f"^es_update_: {message}"):
        es_update_(**{"t": torch.zeros(4, 6), "key": KEY, "weights": [1.0]} | arguments)


def test_infinite_elements_stay(backend):
    name, device = backend
    t = torch.tensor([[math.inf, -math.inf, 1.0]], device=device)
    perturb_(t, KEY, 2, SIGMA, backend=name)
    es_update_(t, KEY, [1.0, 0.5, -2.0], backend=name)
    assert t[0, 0] == math.inf and t[0, 1] == -math.inf and t[0, 2].isfinite()


def test_what_is_refused_has_changed_nothing():
    good, bad = torch.zeros(4), torch.zeros(6)[::2]
    for change in (lambda t: perturb_(t, KEY, 0, SIGMA), lambda t: es_update_(t, KEY, [1.0])):
        with pytest.raises(ValueError, match=r"t\[1\] must be contiguous"):
            change([good, bad])
    assert not good.any()


def test_the_last_site_is_allowed():
    t = [torch.zeros(2), torch.zeros(2)]
    es_update_(t, NoiseKey(0, site=2**30 - 3), [1.0])
    assert torch.equal(t[1], gaussian(2, NoiseKey(0, site=2**30 - 1)))
