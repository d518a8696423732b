"""linear_logprob and its gradients against float64, on every backend this machine has."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from essa_kernels import linear_logprob

from .oracle import DTYPES, assert_no_worse_than_torch, assert_threads_change_nothing, peaks, run_tests

IGNORED = -100

# rows, d, vocabulary
CASES = {
    "one of everything": (1, 1, 1),
    "few rows": (7, 129, 1134),
    "short vocabulary": (130, 64, 7),
    "odd": (37, 65, 257),
    "more rows than a chunk": (261, 48, 253),
}
SETTINGS = {
    "plain": {},
    "bent": {"logit_scale": 1.7, "softcap": 2.5, "temperature": 0.6},
}


class Operands(NamedTuple):
    """What linear_logprob takes, in its order."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None

    def replace(self, **operands: Tensor | None) -> Operands:
        return self._replace(**operands)

    def to(self, dtype: torch.dtype) -> Operands:
        """Fresh leaves of a dtype."""
        hidden, weight, bias = (
            None if tensor is None else tensor.detach().to(dtype, copy=True).requires_grad_()
            for tensor in (self.hidden, self.weight, self.bias)
        )
        return Operands(hidden, weight, self.labels, bias)


def random_operands(
    rows: int, d: int, vocab: int, dtype=torch.float32, device: str = "cpu", *, bias: bool = True
) -> Operands:
    """Operands with logits of about 1; every sixth label is ignored."""
    labels = torch.randint(0, vocab, (rows,))
    labels[5::6] = IGNORED
    return Operands(
        torch.randn(rows, d).to(device, dtype),
        (torch.randn(vocab, d) / d**0.5).to(device, dtype),
        labels.to(device),
        torch.randn(vocab).to(device, dtype) if bias else None,
    )


def with_torch(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logit_scale=1.0, softcap=None, temperature=1.0
) -> Tensor:
    """Logits in the operands' dtype, as models make them; their log-softmax in float32, or in float64 for the truth."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = logits if logits.dtype is torch.float64 else logits.float()
    kept = labels != IGNORED
    chosen = labels.where(kept, 0)[..., None]
    return (wide / temperature).log_softmax(-1).gather(-1, chosen)[..., 0].where(kept, 0)


def gradients(logprob: Tensor, operands: Operands, grad: Tensor) -> list[Tensor]:
    leaves = [tensor for tensor in (operands.hidden, operands.weight, operands.bias) if tensor is not None]
    return list(torch.autograd.grad(logprob, leaves, grad.to(logprob.dtype)))


def results(operands: Operands, grad: Tensor, op=linear_logprob, **settings) -> list[Tensor]:
    """The log-probabilities and the gradients of hidden, weight and bias."""
    logprob = op(*operands, **settings)
    return [logprob.detach(), *gradients(logprob, operands, grad)]


def check(operands: Operands, dtype: torch.dtype, backend: str | None = None, **settings) -> None:
    """Results and gradients by the tolerance rule. A gradient of hidden is rounded twice, as the row's own slope and
    times the row's grad, and the label's word counts against the mean of all words; those of the head are sums over rows
    of either sign. A probability is relatively as far off as its logit absolutely, a few roundings of one."""
    grad = torch.randn(operands.labels.shape, device=operands.labels.device)
    got = results(operands.to(dtype), grad, **settings, backend=backend)
    torchs, truth = (
        results(operands.to(precision), grad, with_torch, **settings) for precision in (dtype, torch.double)
    )
    factor = settings.get("logit_scale", 1.0) / settings.get("temperature", 1.0)
    kept = 4 * (operands.labels != IGNORED).float() * grad.abs() * factor
    of_weight = float((kept @ operands.hidden.float().abs()).max())
    of_hidden = 2 * float(kept.max() * operands.weight.abs().max()) if kept.numel() else 0.0
    allowances = [{}, {"roundings": 2, "terms": of_hidden}, {"terms": of_weight}, {"terms": float(kept.sum())}]
    for ours, rounded, exact, more in zip(got, torchs, truth, allowances, strict=False):
        assert_no_worse_than_torch(ours, rounded, exact, **more)


@pytest.fixture(params=CASES)
def sizes(request: pytest.FixtureRequest):
    return CASES[request.param]


# Values


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logprob_and_gradients(backend, dtype, sizes, settings, seed):
    name, device = backend
    check(random_operands(*sizes, dtype, device), dtype, name, **settings)


@given(
    rows=st.integers(0, 90),
    d=st.integers(1, 150),
    vocab=st.integers(1, 600),
    bias=st.booleans(),
    settings=st.sampled_from(list(SETTINGS.values())),
    dtype=st.sampled_from(DTYPES),
    data_seed=st.integers(0, 2**32 - 1),
)
def test_any_sizes(rows, d, vocab, bias, settings, dtype, data_seed):
    torch.manual_seed(data_seed)
    check(random_operands(rows, d, vocab, dtype, bias=bias), dtype, **settings)


def test_words_that_are_forbidden(backend, seed):
    """A bias of -inf takes words out, whole blocks of them too."""
    name, device = backend
    hidden, weight, labels, bias = random_operands(6, 16, 600, torch.float32, device)
    labels %= 100
    forbidden = bias.index_fill(0, torch.arange(128, 600, device=device), -math.inf)
    few = Operands(hidden, weight[:128], labels, bias[:128]).to(torch.float32)
    all_words = Operands(hidden, weight, labels, forbidden).to(torch.float32)
    expected = linear_logprob(*few, backend="reference")
    got = linear_logprob(*all_words, backend=name)
    assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert_close(all_words.hidden.grad, few.hidden.grad)
    assert_close(all_words.weight.grad[:128], few.weight.grad)
    assert all_words.weight.grad[128:].abs().max() < 1e-30


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_alone(backend, wanted, seed):
    name, device = backend
    operands = random_operands(37, 65, 257, device=device)
    grad = torch.randn(37, device=device)
    expected = results(operands.to(torch.float32), grad, backend=name)[1:][["hidden", "weight", "bias"].index(wanted)]
    leaf = getattr(operands, wanted).requires_grad_()
    (got,) = torch.autograd.grad(linear_logprob(*operands, backend=name), leaf, grad)
    assert_close(got, expected)


def test_a_gradient_is_the_slope_of_the_result(seed):
    operands = random_operands(5, 9, 23)
    leaves = [tensor.double().requires_grad_() for tensor in (operands.hidden, operands.weight, operands.bias)]

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprob(hidden.float(), weight.float(), operands.labels, bias.float(), softcap=3.0).double()

    assert torch.autograd.gradcheck(op, leaves, eps=1e-2, atol=2e-3, rtol=1e-2)


def test_ignored_rows_are_zero_and_unread(backend, dtype, seed):
    name, device = backend
    operands = random_operands(40, 65, 257, dtype, device)
    kept = operands.labels != IGNORED
    grad = torch.randn(40, device=device)
    alone = operands.replace(hidden=operands.hidden[kept], labels=operands.labels[kept])
    expected = results(alone.to(dtype), grad[kept], backend=name)
    operands.hidden[~kept] = torch.nan
    logprob, d_hidden, *of_head = results(operands.to(dtype), grad.where(kept, torch.nan), backend=name)
    assert logprob[~kept].eq(0).all()
    assert d_hidden[~kept].eq(0).all()
    for got, exact in zip([logprob[kept], d_hidden[kept], *of_head], expected, strict=True):
        assert_close(got, exact)


def test_another_index_is_ignored(backend, seed):
    name, device = backend
    operands = random_operands(12, 9, 23, device=device)
    renamed = operands.replace(labels=operands.labels.where(operands.labels != IGNORED, 3))
    got = linear_logprob(*renamed, ignore_index=3, backend=name)
    assert_close(got, linear_logprob(*operands, backend=name).where(renamed.labels != 3, 0))


def test_all_rows_ignored(backend, dtype):
    name, device = backend
    operands = random_operands(9, 5, 7, dtype, device).replace(labels=torch.full((9,), IGNORED, device=device))
    for got in results(operands.to(dtype), torch.ones(9, device=device), backend=name):
        assert got.eq(0).all()


def test_a_confident_row_keeps_its_small_loss(seed, native):
    """1 - p is summed without the label's own term, so log p is right even where p rounds to 1."""
    weight = torch.eye(300)
    hidden = torch.zeros(8, 300)
    labels = torch.arange(8) * 37
    hidden[torch.arange(8), labels] = torch.arange(10.0, 90.0, 10.0)
    operands = Operands(hidden, weight, labels, None)
    got, d_hidden, _ = results(operands.to(torch.float32), torch.ones(8), backend="cpu")
    exact, exact_d_hidden, _ = results(operands.to(torch.float64), torch.ones(8), with_torch)
    # float64 keeps log p down to 2^-53; beyond, it is minus the sum of the others.
    exact = exact.where(exact < -1e-10, -299 * (-hidden.double().amax(1)).exp())
    assert_close(got.double(), exact, rtol=1e-5, atol=1e-37)
    assert_close(d_hidden.double(), exact_d_hidden, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("size", [1e3, 1e18])
def test_logits_beyond_the_range_of_exp(backend, size, seed):
    name, device = backend
    operands = random_operands(20, 33, 257, device=device, bias=False)
    operands = operands.replace(hidden=operands.hidden * size)
    logprob, d_hidden, d_weight = results(operands.to(torch.float32), torch.ones(20, device=device), backend=name)
    exact = with_torch(*operands.to(torch.float64)).detach()
    assert_close(logprob.double(), exact, rtol=1e-5, atol=1e-5 * size)
    assert d_hidden.isfinite().all()
    assert d_weight.isfinite().all()


def test_a_row_depends_on_itself_only(dtype, seed, native):
    operands = random_operands(77, 65, 300, dtype)
    for settings in SETTINGS.values():
        together = results(operands.to(dtype), torch.ones(77), **settings, backend="cpu")
        for i in (0, 40, 76):
            alone = operands.replace(hidden=operands.hidden[i : i + 1], labels=operands.labels[i : i + 1])
            logprob, d_hidden, *_ = results(alone.to(dtype), torch.ones(1), **settings, backend="cpu")
            assert torch.equal(logprob[0], together[0][i])
            assert torch.equal(d_hidden[0], together[1][i])


# Layouts


def test_leading_dimensions_are_rows(backend, dtype, seed):
    name, device = backend
    operands = random_operands(24, 33, 65, dtype, device)
    grad = torch.randn(24, device=device)
    flat = results(operands.to(dtype), grad, backend=name)
    folded = operands.replace(hidden=operands.hidden.view(2, 3, 4, 33), labels=operands.labels.view(2, 3, 4))
    got = results(folded.to(dtype), grad.view(2, 3, 4), backend=name)
    for ours, expected in zip(got, flat, strict=True):
        assert_close(ours, expected.view(ours.shape))
    (one,) = linear_logprob(operands.hidden[:1], operands.weight, operands.labels[:1], operands.bias, backend=name)
    without = linear_logprob(operands.hidden[0], operands.weight, operands.labels[0], operands.bias, backend=name)
    assert without.shape == ()
    assert_close(without, one)


VIEWS = {
    "rows of a frame": lambda x: F.pad(x, (3, 5), value=torch.nan)[:, 3:-5],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns first": lambda x: x.T.contiguous().T,
    "every second element": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(backend, view, seed):
    name, device = backend
    operands = random_operands(35, 66, 65, device=device)
    grad = torch.randn(1, device=device).expand(35)
    expected = results(operands.to(torch.float32), grad, backend=name)
    leaves = operands.to(torch.float32)
    labels = leaves.labels.repeat_interleave(2)[::2]
    logprob = linear_logprob(view(leaves.hidden), leaves.weight, labels, leaves.bias, backend=name)
    for ours, exact in zip([logprob.detach(), *gradients(logprob, leaves, grad)], expected, strict=True):
        assert_close(ours, exact)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_no_rows(backend, dtype, shape):
    name, device = backend
    operands = random_operands(1, 5, 7, dtype, device)
    operands = operands.replace(hidden=operands.hidden.new_empty(*shape, 5), labels=operands.labels.new_empty(shape))
    logprob, d_hidden, d_weight, d_bias = results(operands.to(dtype), torch.empty(shape, device=device), backend=name)
    assert logprob.shape == shape
    assert d_hidden.shape == (*shape, 5)
    assert d_weight.eq(0).all()
    assert d_bias.eq(0).all()


def test_threads_change_nothing(dtype, seed, native):
    operands, grad = random_operands(150, 70, 300, dtype), torch.randn(150)
    assert_threads_change_nothing(
        lambda: torch.cat([result.flatten().float() for result in results(operands.to(dtype), grad, backend="cpu")])
    )


def test_every_instruction_set(isa_environment):
    run_tests("any_sizes or confident or (cpu-cpu and (logprob_and or range_of_exp))", isa_environment, __file__)


RUN = """
import torch
from essa_kernels import linear_logprob

def run(rows, vocab, d=32):
    hidden, weight = (torch.randn(n, d).to(torch.bfloat16).requires_grad_() for n in (rows, vocab))
    linear_logprob(hidden, weight, torch.randint(0, vocab, (rows,)), backend="cpu").sum().backward()

run(8, 50)
"""


def test_logits_are_never_whole(native):
    """1024 x 50000 logits would be 98 MiB in bfloat16; weight and its gradient are 6, and torch.randn makes 6 more."""
    (kilobytes,) = peaks(RUN, "run(1024, 50_000)")
    assert kilobytes / 1024 < 40


# Registration


def test_opcheck(seed):
    settings = (1.5, 3.0, 0.7, IGNORED)
    operands = random_operands(5, 9, 7).to(torch.float32)
    torch.library.opcheck(torch.ops.essa.linear_logprob.default, (*operands, *settings, True))
    without_bias = operands.replace(bias=None, hidden=operands.hidden.detach())
    torch.library.opcheck(torch.ops.essa.linear_logprob.default, (*without_bias, 1.0, None, 1.0, IGNORED, False))
    with torch.no_grad():
        logprob, logsumexp, slope = torch.ops.essa.linear_logprob(*operands, *settings, True)
        saved = (torch.randn(5), slope, logprob, logsumexp, *operands, *settings, [True, True, True])
        saved = tuple(value.detach() if isinstance(value, Tensor) else value for value in saved)
    torch.library.opcheck(torch.ops.essa.linear_logprob_backward.default, saved)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, seed):
    def loss(operands: Operands) -> Tensor:
        hidden, weight, labels, bias = operands
        return linear_logprob(torch.tanh(hidden), weight, labels, bias, softcap=3.0).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 12):
        operands = random_operands(rows, 9, 23)
        eager, traced = (operands.to(torch.float32) for _ in range(2))
        expected, got = loss(eager), compiled(traced)
        assert_close(got, expected)
        one = torch.ones(())
        for ours, exact in zip(gradients(got, traced, one), gradients(expected, eager, one), strict=True):
            assert_close(ours, exact)


def test_meta_tensors_have_the_shape():
    operands = random_operands(6, 9, 7, torch.bfloat16, "meta")
    logprob = linear_logprob(operands.hidden.view(2, 3, 9), operands.weight, operands.labels.view(2, 3), operands.bias)
    assert logprob.shape == (2, 3)
    assert logprob.dtype is torch.float32


def test_autocast_casts(seed):
    operands = random_operands(12, 33, 65)
    grad = torch.randn(12)
    expected = results(operands.to(torch.bfloat16), grad)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(operands.to(torch.float32), grad)
        with torch.autocast("cpu", enabled=False):
            exact = linear_logprob(*operands)
    assert torch.equal(exact, linear_logprob(*operands))
    for ours, rounded in zip(got, expected, strict=True):
        assert ours.dtype is torch.float32
        assert torch.equal(ours, rounded.float())


def test_without_grad_mode_nothing_is_differentiable(seed):
    operands = random_operands(12, 33, 65).to(torch.float32)
    with torch.no_grad():
        assert not linear_logprob(*operands).requires_grad


def test_a_second_derivative_is_refused(seed):
    operands = random_operands(4, 5, 7).to(torch.float32)
    (d_hidden,) = torch.autograd.grad(linear_logprob(*operands).sum(), operands.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob has no second derivative"):
        d_hidden.sum().backward()


# Bad input: 4 rows, d 5, vocabulary 7


def _labels(*values: int) -> Tensor:
    return torch.tensor(values)


BAD_OPERANDS = [
    ("hidden", torch.zeros(4, 5).double(), "hidden must have dtype float32, bfloat16 or float16, got torch.float64"),
    ("hidden", torch.zeros(()), "hidden must have at least one dimension, got none"),
    ("hidden", torch.zeros(4, 6), r"hidden must have shape \[..., d\] = \[4, 5\], got \[4, 6\]"),
    ("hidden", torch.zeros(4, 5).half(), "weight must have dtype torch.float16, got torch.float32"),
    ("weight", torch.zeros(5), r"weight must have shape \[V, d\] with V >= 1 and d >= 1, got \[5\]"),
    ("weight", torch.zeros(0, 5), r"weight must have shape \[V, d\] with V >= 1 and d >= 1, got \[0, 5\]"),
    ("weight", torch.zeros(5, 7).T, r"weight must be contiguous, got strides \[1, 7\]"),
    ("weight", torch.zeros(7, 5, device="meta"), "weight must be on cpu, got meta"),
    ("labels", _labels(0, 1, 2), r"labels must have shape \[...\] = \[4\], got \[3\]"),
    ("labels", _labels(0, 1, 2, 3).int(), "labels must have dtype torch.int64, got torch.int32"),
    ("labels", _labels(0, 1, 7, 3), "labels must be in 0 .. 6 or -100, got 7 in row 2"),
    ("labels", _labels(0, -1, 2, 3), "labels must be in 0 .. 6 or -100, got -1 in row 1"),
    ("bias", torch.zeros(6), r"bias must have shape \[V\] = \[7\], got \[6\]"),
    ("bias", torch.zeros(7).half(), "bias must have dtype torch.float32, got torch.float16"),
    ("bias", torch.zeros(14)[::2], r"bias must be contiguous, got strides \[2\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_OPERANDS)
def test_bad_operands_are_refused(name, value, message, seed):
    operands = random_operands(4, 5, 7).replace(**{name: value})
    with pytest.raises(ValueError, match=f"^linear_logprob: {message}"):
        linear_logprob(*operands)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"softcap": 0.0}, ValueError, "softcap must be > 0, got 0.0"),
        ({"softcap": math.nan}, ValueError, "softcap must be finite in float32, got nan"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0, got -1.0"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite in float32, got inf"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got 0.5"),
    ],
)
def test_bad_settings_are_refused(settings, error, message, seed):
    with pytest.raises(error, match=f"^linear_logprob: {message}"):
        linear_logprob(*random_operands(4, 5, 7), **settings)


def test_no_tensor_is_refused(seed):
    operands = random_operands(4, 5, 7)
    with pytest.raises(TypeError, match="linear_logprob: labels must be a tensor, got list"):
        linear_logprob(*operands.replace(labels=[1, 2, 3, 4]))
    with pytest.raises(TypeError, match="linear_logprob: hidden must be a tensor, got NoneType"):
        linear_logprob(None, *operands[1:])
    with pytest.raises(TypeError, match="linear_logprob: bias must be a tensor, got list"):
        linear_logprob(*operands.replace(bias=[0.0] * 7))


def test_bad_backends_are_refused(seed):
    operands = random_operands(4, 5, 7)
    with pytest.raises(ValueError, match="backend must be one of cpu, cuda, triton, reference or None, got 'x'"):
        linear_logprob(*operands, backend="x")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: linear_logprob has no CUDA kernel"):
        linear_logprob(*operands, backend="cuda")
