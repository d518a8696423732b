"""Every op at the sizes a GPU is judged by, and the least a call must move and compute.

    python -m benchmarks.gpu_problems FOLDER [--shrink 32] [--device cuda]

runs each once on every backend of the device, a task of those in the folder: for compute-sanitizer to watch, and to have
Triton's kernels compiled by several processes before one measures them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import essa_kernels
from essa_kernels import NoiseKey, dispatch

from .gpu_tasks import Found, Tasks, Work

KEY = NoiseKey(seed=2026)
MEMBERS = 64
DTYPE = torch.bfloat16
DISTRIBUTIONS = ("gaussian", "rademacher")

Call = Callable[[str], object]


@dataclass(frozen=True)
class Problem:
    """One op at one size.

    Attributes:
        what: the size in words.
        make: device -> call(backend), on fresh operands.
        moved: bytes, every input read once and every output written once.
        flops: of the products; drawing noise is counted in normals.
        normals: noise values drawn, of either distribution.
    """

    what: str
    make: Callable[[str], Call]
    moved: int
    flops: int = 0
    normals: int = 0


def fill(op: Callable[..., Tensor], count: int) -> Problem:
    def make(device: str) -> Call:
        out = torch.empty(count, device=device)
        return lambda backend: op((count,), KEY, out=out, backend=backend)

    return Problem(f"{count} values", make, moved=4 * count, normals=count)


def perturb(count: int, distribution: str) -> Problem:
    def make(device: str) -> Call:
        t = torch.randn(count, device=device, dtype=DTYPE)
        return lambda backend: essa_kernels.perturb_(t, KEY, 1, 1e-3, distribution=distribution, backend=backend)

    return Problem(f"{count} bf16, {distribution}", make, moved=2 * 2 * count, normals=count)


def es_update(count: int, distribution: str) -> Problem:
    def make(device: str) -> Call:
        t, weights = torch.randn(count, device=device, dtype=DTYPE), torch.randn(MEMBERS, device=device)
        return lambda backend: essa_kernels.es_update_(t, KEY, weights, distribution=distribution, backend=backend)

    what = f"{count} bf16, {distribution}, {MEMBERS} members"
    return Problem(what, make, moved=2 * 2 * count, normals=count * MEMBERS // 2)


@dataclass(frozen=True)
class Adapter:
    """A LoRA of the rank on a d_in -> d_out layer, as `svd_lora` takes it, and rows of it for MEMBERS members."""

    rows: int
    d_in: int
    d_out: int
    rank: int

    @property
    def what(self) -> str:
        return f"{self.rows} rows, {self.d_in} -> {self.d_out}, r={self.rank}, bf16"

    def x(self, device: str) -> Tensor:
        return torch.randn(self.rows, self.d_in, device=device, dtype=DTYPE)

    def y(self, device: str) -> Tensor:
        return torch.randn(self.rows, self.d_out, device=device, dtype=DTYPE)

    def weight(self, device: str) -> Tensor:
        return torch.randn(self.d_out, self.d_in, device=device, dtype=DTYPE) / self.d_in**0.5

    def h(self, device: str) -> Tensor:
        return torch.randn(self.rows, self.rank, device=device)

    def offsets(self, device: str) -> Tensor:
        return torch.arange(MEMBERS + 1, device=device) * self.rows // MEMBERS

    def factors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        v_a = torch.randn(self.rank, self.d_in, device=device, dtype=DTYPE) / self.d_in**0.5
        u_b = torch.randn(self.d_out, self.rank, device=device, dtype=DTYPE) / self.rank**0.5
        return v_a, torch.randn(self.rank, self.rank, device=device), u_b

    def values(self, device: str) -> tuple[Tensor, Tensor]:
        s_a, s_b = torch.rand(2, MEMBERS, self.rank, device=device) + 0.5
        return s_a, s_b

    def bytes_of(self, **sizes: int) -> int:
        """Of so many rows of x, v_a, u_b and y in bfloat16 and h in float32, each given as how often it moves."""
        row = {"x": 2 * self.d_in, "y": 2 * self.d_out, "h": 4 * self.rank}
        whole = {"v_a": 2 * self.rank * self.d_in, "u_b": 2 * self.rank * self.d_out}
        return sum(times * (self.rows * row[name] if name in row else whole[name]) for name, times in sizes.items())

    def flops(self, *sizes: int) -> int:
        return 2 * self.rows * self.rank * sum(sizes)


def svd_lora(a: Adapter) -> Problem:
    def make(device: str) -> Call:
        operands = (a.x(device), *a.factors(device), *a.values(device), a.offsets(device), a.y(device))
        return lambda backend: essa_kernels.svd_lora(*operands, backend=backend)

    return Problem(a.what, make, a.bytes_of(x=1, y=2, v_a=1, u_b=1), a.flops(a.d_in, a.rank, a.d_out))


def svd_lora_shrink(a: Adapter) -> Problem:
    def make(device: str) -> Call:
        operands = (a.x(device), *a.factors(device)[:2], *a.values(device), a.offsets(device))
        return lambda backend: essa_kernels.svd_lora_shrink(*operands, backend=backend)

    return Problem(a.what, make, a.bytes_of(x=1, h=1, v_a=1), a.flops(a.d_in, a.rank))


def svd_lora_expand(a: Adapter) -> Problem:
    def make(device: str) -> Call:
        operands = (a.y(device), a.h(device), a.factors(device)[2])
        return lambda backend: essa_kernels.svd_lora_expand_(*operands, backend=backend)

    return Problem(a.what, make, a.bytes_of(h=1, y=2, u_b=1), a.flops(a.d_out))


def lora_perturbed(a: Adapter, distribution: str) -> Problem:
    def make(device: str) -> Call:
        x, y, members, offsets = a.x(device), a.y(device), torch.arange(MEMBERS, device=device), a.offsets(device)
        v_a, _, u_b = a.factors(device)
        options = {"distribution": distribution, "y": y}
        return lambda backend: essa_kernels.lora_perturbed(
            x, v_a, u_b, KEY, 1e-2, members, offsets, backend=backend, **options
        )

    normals = MEMBERS // 2 * a.rank * (a.d_in + a.d_out)
    return Problem(
        f"{a.what}, {distribution}", make, a.bytes_of(x=1, y=2, v_a=1, u_b=1), a.flops(a.d_in, a.d_out), normals
    )


def lowrank_perturbed(a: Adapter, distribution: str) -> Problem:
    def make(device: str) -> Call:
        x, y, members, offsets = a.x(device), a.y(device), torch.arange(MEMBERS, device=device), a.offsets(device)
        options = {"rank": a.rank, "distribution": distribution, "y": y}
        return lambda backend: essa_kernels.lowrank_perturbed(
            x, a.d_out, KEY, 1e-2, members, offsets, backend=backend, **options
        )

    normals = MEMBERS // 2 * a.rank * (a.d_in + a.d_out)
    return Problem(f"{a.what}, {distribution}", make, a.bytes_of(x=1, y=2), a.flops(a.d_in, a.d_out), normals)


def lowrank_update(d_out: int, d_in: int, members: int, distribution: str) -> Problem:
    def make(device: str) -> Call:
        w, weights = torch.zeros(d_out, d_in, device=device, dtype=DTYPE), torch.randn(members, device=device)
        return lambda backend: essa_kernels.lowrank_update_(w, KEY, weights, distribution=distribution, backend=backend)

    pairs = members // 2
    what = f"{d_in} -> {d_out}, rank 1, {members} members, bf16, {distribution}"
    return Problem(what, make, 2 * 2 * d_out * d_in, 2 * pairs * d_out * d_in, pairs * (d_out + d_in))


def svd_lora_linear(a: Adapter) -> Problem:
    def make(device: str) -> Call:
        operands = (a.x(device), a.weight(device), *a.factors(device), *a.values(device), a.offsets(device))
        return lambda backend: essa_kernels.svd_lora_linear(*operands, backend=backend)

    return with_base_layer(a, svd_lora(a), make)


def svd_lora_expand_linear(a: Adapter) -> Problem:
    def make(device: str) -> Call:
        operands = (a.x(device), a.weight(device), a.h(device), a.factors(device)[2])
        return lambda backend: essa_kernels.svd_lora_expand_linear(*operands, backend=backend)

    problem = with_base_layer(a, svd_lora_expand(a), make)
    return dataclasses.replace(problem, moved=problem.moved + a.bytes_of(x=1))


def lora_perturbed_linear(a: Adapter, distribution: str) -> Problem:
    def make(device: str) -> Call:
        x, weight, members, offsets = (
            a.x(device),
            a.weight(device),
            torch.arange(MEMBERS, device=device),
            a.offsets(device),
        )
        v_a, _, u_b = a.factors(device)
        return lambda backend: essa_kernels.lora_perturbed_linear(
            x, weight, v_a, u_b, KEY, 1e-2, members, offsets, distribution=distribution, backend=backend
        )

    return with_base_layer(a, lora_perturbed(a, distribution), make)


def lowrank_perturbed_linear(a: Adapter, distribution: str) -> Problem:
    def make(device: str) -> Call:
        x, weight, members, offsets = (
            a.x(device),
            a.weight(device),
            torch.arange(MEMBERS, device=device),
            a.offsets(device),
        )
        options = {"rank": a.rank, "distribution": distribution}
        return lambda backend: essa_kernels.lowrank_perturbed_linear(
            x, weight, KEY, 1e-2, members, offsets, backend=backend, **options
        )

    return with_base_layer(a, lowrank_perturbed(a, distribution), make)


def with_base_layer(a: Adapter, delta: Problem, make: Callable[[str], Call]) -> Problem:
    """The problem of a delta made together with its base layer: y is written once and not read."""
    moved = delta.moved - a.bytes_of(y=1) + 2 * a.d_in * a.d_out
    return dataclasses.replace(delta, make=make, moved=moved, flops=delta.flops + 2 * a.rows * a.d_in * a.d_out)


@dataclass(frozen=True)
class Cache:
    """Rows of a model that decodes, with a KV cache of so many positions."""

    rows: int
    length: int
    heads: int = 28
    kv_heads: int = 4
    d: int = 128


def decode_attention(c: Cache) -> Problem:
    def make(device: str) -> Call:
        query = torch.randn(c.rows, c.heads, c.d, device=device, dtype=DTYPE)
        key, value = torch.randn(2, c.rows, c.kv_heads, c.length, c.d, device=device, dtype=DTYPE)
        mask = torch.arange(c.length, device=device) >= torch.arange(c.rows, device=device)[:, None] % 32
        return lambda backend: essa_kernels.decode_attention(query, key, value, mask, backend=backend)

    what = f"{c.rows} rows, {c.length} positions, {c.heads} / {c.kv_heads} heads of {c.d}, bf16"
    moved = c.rows * (2 * 2 * c.d * (c.heads + c.kv_heads * c.length) + c.length)
    return Problem(what, make, moved, 4 * c.rows * c.heads * c.length * c.d)


@dataclass(frozen=True)
class Head:
    """An LM head and rows of hidden states, all of whose labels count."""

    rows: int
    d: int
    vocab: int

    @property
    def what(self) -> str:
        return f"{self.rows} rows, {self.d} -> {self.vocab}, bf16"

    def operands(self, device: str) -> tuple[Tensor, Tensor, Tensor, None, float, None, float, int]:
        """Hidden states, weight, labels and plain settings, in the registered op's order."""
        hidden = torch.randn(self.rows, self.d, device=device, dtype=DTYPE)
        weight = torch.randn(self.vocab, self.d, device=device, dtype=DTYPE) / self.d**0.5
        labels = torch.randint(self.vocab, (self.rows,), device=device)
        return hidden, weight, labels, None, 1.0, None, 1.0, -100

    def bytes_of(self, hidden: int, weight: int) -> int:
        return 2 * self.d * (hidden * self.rows + weight * self.vocab)

    def flops(self, products: int) -> int:
        """Of products as large as the logits'; either gradient is one."""
        return products * 2 * self.rows * self.d * self.vocab


def linear_logprob(h: Head, *, slopes: bool) -> Problem:
    def make(device: str) -> Call:
        operands = h.operands(device)
        return lambda backend: torch.ops.essa.linear_logprob(*operands, slopes, backend)

    what = f"{h.what}, {'with' if slopes else 'without'} slope"
    return Problem(what, make, h.bytes_of(hidden=1 + slopes, weight=1), h.flops(1 + slopes))


def linear_logprob_backward(h: Head) -> Problem:
    def make(device: str) -> Call:
        operands, grad = h.operands(device), torch.randn(h.rows, device=device)
        logprob, logsumexp, slope = torch.ops.essa.linear_logprob(*operands, True)
        saved = (grad, slope, logprob, logsumexp, *operands)
        return lambda backend: torch.ops.essa.linear_logprob_backward(*saved, [True, True, False], backend)

    return Problem(h.what, make, h.bytes_of(hidden=3, weight=2), h.flops(2))


@dataclass(frozen=True)
class StoredAdapters(Adapter):
    """One adapter for each member, and rows of them in any order. Stacked, or in lists as they lie in a PEFT model."""

    in_lists: bool = False

    @property
    def what(self) -> str:
        return f"{MEMBERS} adapters{' in lists' if self.in_lists else ''}, {super().what}"

    def operands(self, device: str) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        a = torch.randn(MEMBERS, self.rank, self.d_in, device=device, dtype=DTYPE) / self.d_in**0.5
        b = torch.randn(MEMBERS, self.d_out, self.rank, device=device, dtype=DTYPE) / self.rank**0.5
        a, b = ([factor.clone() for factor in stack] if self.in_lists else [stack] for stack in (a, b))
        return self.x(device), a, b, torch.randint(0, MEMBERS, (self.rows,), device=device)


def multi_lora(a: StoredAdapters) -> Problem:
    def make(device: str) -> Call:
        (x, v_a, u_b, ids), y = a.operands(device), a.y(device)
        v_a, u_b = (factor if a.in_lists else factor[0] for factor in (v_a, u_b))
        return lambda backend: essa_kernels.multi_lora(x, v_a, u_b, ids, y=y, backend=backend)

    return Problem(a.what, make, a.bytes_of(x=1, y=2, v_a=MEMBERS, u_b=MEMBERS), a.flops(a.d_in, a.d_out))


def multi_lora_backward(a: StoredAdapters) -> Problem:
    def make(device: str) -> Call:
        operands, d_y = a.operands(device), a.y(device)
        rest = (*operands, None, 1.0, [True, True, True])
        return lambda backend: torch.ops.essa.multi_lora_backward(d_y, *rest, backend)

    moved = a.bytes_of(x=2, y=1, v_a=2 * MEMBERS, u_b=2 * MEMBERS)
    return Problem(a.what, make, moved, a.flops(3 * a.d_in, 2 * a.d_out))


def problems(shrink: int = 1) -> dict[str, list[Problem]]:
    """op -> its problems, for every op there is; widths and counts divided by ``shrink``."""
    width = 4096 // shrink
    count = 2**28 // shrink**2
    adapters = [Adapter(rows, width, width, 16) for rows in (64, 512, 8192 // shrink)]
    few, many = (Adapter(rows, width, width, rank=8) for rows in (64, 512))
    rank_one = [Adapter(rows, width, width, rank=1) for rows in (64, 512)]
    heads = [Head(rows, width, 2**17 // shrink) for rows in (512, 2048)]
    stored = [StoredAdapters(adapter.rows, width, width, 16) for adapter in adapters]
    stored += [StoredAdapters(rows, width, width, 16, in_lists=True) for rows in (64, 512)]
    return {
        "gaussian": [fill(essa_kernels.gaussian, count)],
        "rademacher": [fill(essa_kernels.rademacher, count)],
        "perturb_": [perturb(count, d) for d in DISTRIBUTIONS],
        "es_update_": [es_update(count // 16, d) for d in DISTRIBUTIONS],
        "svd_lora": [svd_lora(adapter) for adapter in adapters],
        "svd_lora_shrink": [svd_lora_shrink(adapter) for adapter in adapters],
        "svd_lora_expand_": [svd_lora_expand(adapter) for adapter in adapters],
        "lora_perturbed": [lora_perturbed(adapter, d) for adapter in (few, many) for d in DISTRIBUTIONS],
        "lowrank_perturbed": [lowrank_perturbed(adapter, d) for adapter in rank_one for d in DISTRIBUTIONS],
        "lowrank_update_": [lowrank_update(width, width, MEMBERS, d) for d in DISTRIBUTIONS],
        "decode_attention": [
            decode_attention(Cache(rows, length // shrink)) for rows, length in ((64, 512), (64, 4096), (512, 512))
        ],
        "linear_logprob": [linear_logprob(head, slopes=slopes) for head in heads for slopes in (False, True)],
        "linear_logprob_backward": [linear_logprob_backward(head) for head in heads],
        "svd_lora_linear": [svd_lora_linear(adapter) for adapter in adapters],
        "svd_lora_expand_linear": [svd_lora_expand_linear(adapter) for adapter in adapters],
        "lora_perturbed_linear": [lora_perturbed_linear(adapter, d) for adapter in (few, many) for d in DISTRIBUTIONS],
        "lowrank_perturbed_linear": [
            lowrank_perturbed_linear(adapter, d) for adapter in rank_one for d in DISTRIBUTIONS
        ],
        "multi_lora": [multi_lora(adapters) for adapters in stored],
        "multi_lora_backward": [multi_lora_backward(adapters) for adapters in stored],
    }


def backends(op: str, device_type: str) -> list[str]:
    """The kernels that take the op's tensors on the device here."""
    names = [name for name in dispatch.PREFERENCE[device_type] if name != "reference"]
    return [name for name in names if dispatch.unavailable(name, device_type, op) is None]


def each(device: str, shrink: int, task: Callable[[str, str, Problem], Work]) -> list[tuple[str, Work]]:
    """The task of every op, backend of the device and problem, named."""
    return [
        (f"{op} on {backend}: {problem.what}", task(op, backend, problem))
        for op, sizes in problems(shrink).items()
        for problem in sizes
        for backend in backends(op, device)
    ]


def each_once(device: str, shrink: int) -> list[tuple[str, Work]]:
    def task(op: str, backend: str, problem: Problem) -> Work:
        def work(found: Found) -> None:
            problem.make(device)(backend)
            synchronize(device)

        return work

    return each(device, shrink, task)


def synchronize(device: str) -> None:
    """So that what goes wrong on the GPU is raised here."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="the tasks that processes share")
    parser.add_argument("--shrink", type=int, default=32, help="divides widths and counts (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    with torch.inference_mode():
        works = each_once(arguments.device, arguments.shrink)
        Tasks(arguments.folder).do(works, after_failure=lambda: synchronize(arguments.device))


if __name__ == "__main__":
    main()
