"""The LM head of a preference step, forward and backward: time in one process, memory each in a process of its own.

A DPO loss over pairs of completions, all positions of them scored, from hidden states on: with a frozen head, as under
LoRA, and with a trained one. The rivals are TRL's fused head, which its DPOTrainer uses; Liger's chunked loss, one pair
at a time; and a log-softmax over whole logits. Nobody's loss is compiled, and TRL's head is asked for log-probabilities
alone, not for what its trainer logs.

    python -m benchmarks.bench_linear_logprob METHOD CASE DTYPE frozen|trained THREADS

prints the bytes that one step adds to a fresh process at its peak, the gradients it leaves included.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from essa_kernels import linear_logprob

from .compare import Peak, compare, resident, timed

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# pairs, tokens of a completion, d, vocabulary; the second is the head of Qwen2.5-0.5B
CASES = {
    "512 rows, 1024 -> 32000": (4, 64, 1024, 32_000),
    "256 rows, 896 -> 151936": (2, 64, 896, 151_936),
    "2048 rows, 512 -> 32000": (8, 128, 512, 32_000),
}
BETA = 0.1


def dpo_loss(logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of chosen completions, then as many rejected ones, under a reference that finds all equally likely."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = logprobs(hidden.flatten(0, 1), weight, labels.flatten()).view(labels.shape)
        chosen, rejected = rows.sum(1).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


@dpo_loss
def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, labels)


@dpo_loss
def trl_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[
        0
    ]


@dpo_loss
def log_softmax(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(1, dtype=torch.float32).gather(1, labels[:, None])[:, 0]


def liger_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, _ = LigerFusedLinearDPOLoss(beta=BETA, compiled=False, use_ref_model=False)(weight, hidden, labels)
    return loss


METHODS = {
    "ours": ours,
    "TRL's fused head": trl_fused,
    "Liger's chunked loss": liger_chunked,
    "log_softmax": log_softmax,
}
RIVALS = [name for name in METHODS if name != "ours"]
MODULES = {"TRL's fused head": "trl.kernels.chunked_logprob", "Liger's chunked loss": "liger_kernel.chunked_loss"}


def operands(pairs: int, tokens: int, d: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2 pairs, tokens, d], head and labels; the logits are about 1."""
    weight = torch.randn(vocab, d, dtype=dtype).div_(d**0.5)
    return torch.randn(2 * pairs, tokens, d, dtype=dtype), weight, torch.randint(0, vocab, (2 * pairs, tokens))


def step(method: str, hidden: Tensor, weight: Tensor, labels: Tensor, *, trained: bool) -> list[Tensor]:
    """Loss and gradients of one forward and backward pass."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)]
        loss = METHODS[method](*leaves, labels)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def assert_same_step(method: str, tensors: tuple[Tensor, Tensor, Tensor], trained: bool) -> None:
    """Loss and gradients of ours and of the rival are the same but for rounding."""
    tolerance = 0.03 if tensors[0].dtype is torch.bfloat16 else 1e-4
    for mine, theirs in zip(*(step(name, *tensors, trained=trained) for name in ("ours", method)), strict=True):
        assert (mine.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


def needs(method: str) -> None:
    if method in MODULES:
        pytest.importorskip(MODULES[method])


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rival", RIVALS)
def test_time(benchmark, record, rival, case, dtype, trained):
    needs(rival)
    with torch.inference_mode(False):
        tensors = operands(*CASES[case], DTYPES[dtype])
    assert_same_step(rival, tensors, trained)
    mine, theirs = (functools.partial(step, name, *tensors, trained=trained) for name in ("ours", rival))
    benchmark.pedantic(mine, rounds=1)
    what = f"{case}, {dtype}, head {'trained' if trained else 'frozen'}"
    record(compare(what, timed(mine), rival, timed(theirs), rounds=3))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_memory(benchmark, record, request, case, dtype, trained):
    pairs, tokens, d, vocab = CASES[case]
    threads = request.config.getoption("--threads")
    left = DTYPES[dtype].itemsize * d * (2 * pairs * tokens + (vocab if trained else 0))

    def peak(method: str) -> int:
        arguments = [method, case, dtype, "trained" if trained else "frozen", str(threads)]
        command = [sys.executable, "-m", "benchmarks.bench_linear_logprob", *arguments]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    mine = benchmark.pedantic(peak, args=("ours",), rounds=1)
    for rival in RIVALS:
        needs(rival)
        what = f"{case}, {dtype}, head {'trained' if trained else 'frozen'}"
        record(Peak(what, rival, mine, peak(rival), left))


def peak_of_a_step(method: str, case: str, dtype: str, head: str, threads: str) -> int:
    """Resident bytes at the peak of one step beyond those before it, by the kernel's own high-water mark."""
    torch.set_num_threads(int(threads))
    step(method, *operands(1, 2, 16, 32, DTYPES[dtype]), trained=True)  # what a first call loads is not counted
    tensors = operands(*CASES[case], DTYPES[dtype])
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = resident("VmRSS")
    gradients = step(method, *tensors, trained=head == "trained")
    assert gradients
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak_of_a_step(*sys.argv[1:]))
