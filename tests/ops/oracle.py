"""What every op's tests hold its results to, and how they run the kernels in other ways than this process does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

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
