"""The card's best, a population over the layers of a 7B-shaped model, and every op: each measurement a task.

    python -m benchmarks.gpu_measure FOLDER

does those that no process has begun in the folder; `gpu_check` runs it again if one takes the process down.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .gpu_problems import DTYPE, MEMBERS, Problem, each, synchronize
from .gpu_results import CEILINGS, PURE
from .gpu_stack import METHODS, Method, Stack, pure
from .gpu_tasks import Found, Tasks, Work

ROTATED_BYTES = 256 << 20  # operand sets of an op, together more than any cache
ROUNDS = 15
ROWS = (64, 512, 8192)  # a token of every member, 8 and 128

Calls = Sequence[Callable[[], object]]
"""The same computation on different operands."""
Measure = Callable[[Calls, Found], None]
"""Puts launched_s and graph_s into the findings: seconds per call, launched one by one and replayed from a CUDA graph."""


def on_gpu(calls: Calls, found: Found) -> None:
    """Medians, by the device's own clock."""

    def all_calls() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_calls(), all_calls()
    stream.synchronize()
    found["launched_s"] = device_seconds(all_calls) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    graph.replay()
    found["graph_s"] = device_seconds(graph.replay) / len(calls)


def device_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measurements(device: str, measure: Measure, shrink: int = 1) -> list[tuple[str, Work]]:
    """Tasks whose findings say of what, and what `measure` found."""
    return [
        (CEILINGS, lambda found: ceilings(device, measure, shrink, found)),
        *layers(device, measure, shrink),
        *ops(device, measure, shrink),
    ]


def ceilings(device: str, measure: Measure, shrink: int, found: Found) -> None:
    copy, product = Found(), Found()
    source = torch.randn(2**28 // shrink**2, device=device)
    target = torch.empty_like(source)
    measure([lambda: target.copy_(source)], copy)
    found["bytes_per_s"] = 2 * source.nbytes / copy["graph_s"]
    size = 8192 // shrink
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    measure([lambda: torch.mm(a, b)], product)
    found["flops_per_s"] = 2 * size**3 / product["graph_s"]


def layers(device: str, measure: Measure, shrink: int) -> list[tuple[str, Work]]:
    """Pure inference at every number of rows, and every way to run a population."""
    stack = functools.cache(lambda: Stack(device, shrink))

    def task(name: str, method: Method, rows: int) -> Work:
        def work(found: Found) -> None:
            found |= {"what": name, "rows": rows}
            x = torch.randn(rows, stack().hidden, device=device, dtype=DTYPE)
            offsets = torch.arange(MEMBERS + 1, device=device) * (rows // MEMBERS)
            measure([lambda: stack().forward(x, offsets, method)], found)

        return work

    return [
        (f"{name}, {rows} rows", task(name, method, rows))
        for rows in ROWS
        for name, method in {PURE: pure, **METHODS}.items()
    ]


def ops(device: str, measure: Measure, shrink: int) -> list[tuple[str, Work]]:
    def task(op: str, backend: str, problem: Problem) -> Work:
        def work(found: Found) -> None:
            found |= {"op": op, "backend": backend, "what": problem.what}
            found |= {"moved": problem.moved, "flops": problem.flops, "normals": problem.normals}
            sets = max(1, ROTATED_BYTES // problem.moved) if shrink == 1 else 2
            calls = [problem.make(device) for _ in range(sets)]
            measure([functools.partial(call, backend) for call in calls], found)

        return work

    return each(device, shrink, task)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="the tasks")
    arguments = parser.parse_args()
    with torch.inference_mode():
        Tasks(arguments.folder).do(measurements("cuda", on_gpu), after_failure=lambda: synchronize("cuda"))


if __name__ == "__main__":
    main()
