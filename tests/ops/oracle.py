"""What every op's tests hold its results to, and how they run the kernels in other ways than this process does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from essa_kernels import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_no_worse_than_torch(
    got: Tensor, torchs: Tensor, truth: Tensor, *, roundings: int = 1, terms: float = 0.0
) -> None:
    """The tolerance rule: the largest error may exceed that of torch's own computation in the same dtype by one part
    in 2**20 of the largest true value, plus half a unit in the last place of it for each rounding of the result, plus
    one part in 2**24 of ``terms``: a bound on the sum of what was summed, without signs, where they may cancel."""
    assert got.dtype == torchs.dtype
    assert got.shape == truth.shape
    if not truth.numel():
        return
    largest, rounding = truth.abs().max(), roundings * torch.finfo(got.dtype).eps / 2
    allowed = (torchs.double() - truth).abs().max() + largest * (2**-20 + rounding) + terms * 2**-24
    worst = (got.double() - truth).abs().max()
    assert worst <= allowed, f"error {worst:.3e}, allowed {allowed:.3e}"


def assert_linear_no_worse_than_torch(
    backend: tuple[str, str],
    op: str,
    call: Callable[..., Tensor],
    add_to: Callable[[Tensor, torch.dtype], Tensor],
    x: Tensor,
    d_out: int,
    *,
    biased: bool,
    precision: torch.dtype | None = None,
) -> None:
    """``call(weight, bias)`` is a base layer of x plus what ``add_to(base, dtype)`` adds to it, computed in the dtype.

    ``precision``: what torch computes in, by default x's dtype.
    """
    name, device = backend
    skip_unavailable(name, device, op)
    weight = (torch.randn(d_out, x.shape[1]) / x.shape[1] ** 0.5).to(device, x.dtype)
    bias = torch.randn(d_out).to(device, x.dtype) if biased else None

    def whole(computed_in: torch.dtype) -> Tensor:
        # On the CPU the base layer is torch's, rounded before the rest is added.
        of_base = x.dtype if name == "cpu" else computed_in
        base = F.linear(x.to(of_base), weight.to(of_base), None if bias is None else bias.to(of_base))
        return add_to(base, computed_in)

    torchs = whole(precision or x.dtype).to(x.dtype)
    assert_no_worse_than_torch(call(weight, bias), torchs, whole(torch.float64))


def assert_linear_takes_any_layout(
    backend: tuple[str, str], op: str, call: Callable[..., Tensor], x: Tensor, d_out: int
) -> None:
    """``call(x, weight)`` is the same for the 12 rows of x however they lie."""
    name, device = backend
    skip_unavailable(name, device, op)
    d_in = x.shape[1]
    weight = torch.randn(d_out, d_in).to(device, x.dtype)
    expected = call(x, weight)
    frame = torch.full((12, d_in + 35), torch.nan, device=device, dtype=x.dtype)
    frame[:, 3 : 3 + d_in] = x
    assert_close(call(frame[:, 3 : 3 + d_in], weight), expected)
    assert_close(call(x.repeat_interleave(2, 1)[:, ::2], weight), expected)
    assert_close(call(x.view(3, 4, d_in), weight), expected.view(3, 4, d_out))


def assert_linear_is_antithetic(backend: tuple[str, str], op: str, call: Callable[[float, Tensor], Tensor]) -> None:
    """``call(sigma, members)``: member 2k + 1 at sigma is member 2k at -sigma, bit for bit."""
    name, device = backend
    skip_unavailable(name, device, op)
    members = torch.tensor([10, 11], device=device)
    assert torch.equal(call(0.37, members), call(-0.37, members.flip(0)))
    assert not torch.equal(call(0.37, members), call(0.37, members.flip(0)))


def assert_rows_of_linear_are_apart(
    backend: tuple[str, str], op: str, call: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """What ``call(x)`` makes of 30 rows depends on no row of the groups of 30 before and after."""
    name, device = backend
    skip_unavailable(name, device, op)
    alone = torch.full_like(x, torch.nan)
    alone[30:60] = x[30:60]
    got = call(alone)
    assert_close(got[30:60], call(x)[30:60], rtol=0, atol=0)
    assert got[:30].isnan().all()
    assert got[60:].isnan().all()


def skip_unavailable(name: str, device: str, op: str) -> None:
    """Skip the test where the backend has no such op."""
    if reason := dispatch.unavailable(name, device, op):
        pytest.skip(reason)


def assert_threads_change_nothing(work: Callable[[], Tensor]) -> None:
    """The bits of a result are those of one thread, whatever the number of threads."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = work()
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(work(), expected)
    finally:
        torch.set_num_threads(threads)


def run_tests(which: str, environment: dict[str, str], *files: str) -> None:
    """Some tests of files in a process with another environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, *files]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


def bad_base_layers(d_out: int, d_in: int) -> list[tuple[str, Tensor, str]]:
    """(argument, value, message) for weights and biases that are not a float32 layer d_in -> d_out on the CPU."""
    shape = rf"\[d_out, d_in\] = \[{d_out}, {d_in}\]"
    return [
        ("weight", torch.zeros(d_out, d_in - 1), rf"weight must have shape {shape}, got \[{d_out}, {d_in - 1}\]"),
        ("weight", torch.zeros(d_out, d_in).half(), "weight must have dtype torch.float32, got torch.float16"),
        ("weight", torch.zeros(d_out, d_in, device="meta"), "weight must be on cpu, got meta"),
        ("weight", torch.zeros(d_in, d_out).T, rf"weight must be contiguous, got strides \[1, {d_out}\]"),
        ("bias", torch.zeros(d_out - 1), rf"bias must have shape \[d_out\] = \[{d_out}\], got \[{d_out - 1}\]"),
        ("bias", torch.zeros(d_out).half(), "bias must have dtype torch.float32, got torch.float16"),
        ("bias", torch.zeros(2 * d_out)[::2], r"bias must be contiguous, got strides \[2\]"),
    ]


PEAKS = """
def kilobytes(field):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

for call in {calls}:
    open("/proc/self/clear_refs", "w").write("5")  # the mark starts again from here
    before = kilobytes("VmRSS")
    exec(call)
    print(kilobytes("VmHWM") - before)
"""


def peaks(setup: str, *calls: str) -> list[int]:
    """Kilobytes that each call adds, at its peak, to a fresh process after its setup. Skips where the system has no
    high-water mark that can be reset."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    program = setup + PEAKS.format(calls=repr(calls))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(line) for line in run.stdout.split()]
