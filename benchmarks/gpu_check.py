"""Everything a GPU can show, in one command of less than nine minutes: make gpu-check

Builds the extension with its CUDA kernels, runs every op's tests on the device, runs every kernel once under
compute-sanitizer, and measures: each op against this card's own copy bandwidth and matrix product, and a population
over the layers of a 7B-shaped model against those layers alone. Writes results/gpu_check.json and .md. Exits with 1
where there is no GPU, or where anything failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check"
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "ESSA_CUDA": "on"}
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
BUILD_S, TESTS_S, SANITIZER_S = 150, 200, 45  # with a minute or two for the measurements, under nine minutes
ROTATED_BYTES = 256 << 20  # operand sets of an op, together more than any cache

Measure = Callable[[Sequence[Callable[[], object]]], tuple[float, float]]
"""Calls of one op on different operands -> seconds per call, launched one by one and replayed from a CUDA graph."""


@dataclass(frozen=True)
class Step:
    """One program of the check and how it went."""

    name: str
    passed: bool
    summary: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best: bytes read and written by a copy, bf16 multiply-adds of a product, per second."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Row:
    """An op at one size on one backend. Times are seconds per call."""

    op: str
    backend: str
    what: str
    launched_s: float
    graph_s: float
    bytes_per_s: float
    flops_per_s: float
    normals_per_s: float
    times_floor: float


@dataclass(frozen=True)
class StackRow:
    """A population's forward beside pure inference: seconds, and shares of pure inference's speed."""

    what: str
    rows: int
    launched_s: float
    graph_s: float
    launched_share: float
    graph_share: float


# Programs


def run(name: str, command: Sequence[str | Path], limit_s: int, **environment: str) -> tuple[Step, str]:
    """A program as a step that passes if it exits with 0 in time, and what it printed."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            text=True,
            check=False,
        )
        output, passed = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as expired:
        output, passed = f"{(expired.stdout or b'').decode(errors='replace')}\nstopped after {limit_s} s", False
    if not passed:
        print(output[-6000:], flush=True)
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
    return Step(name, passed, last.strip("= "), time.monotonic() - start), output


def build() -> Step:
    step, _ = run("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD_S)
    return step


def tests(report: Path) -> list[Step]:
    """Every test of the ops that runs on the device: one step per file."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_device.py", "tests/ops", "-k", "cuda or test_device"]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    report.unlink(missing_ok=True)
    whole, _ = run("tests", command, TESTS_S)
    return [*test_steps(report.read_text()), whole] if report.exists() else [whole]


def test_steps(junit: str) -> list[Step]:
    """pytest's report as one step per test file. A file of which nothing ran has not passed."""
    counts: dict[str, dict[str, float]] = {}
    for case in xml.etree.ElementTree.fromstring(junit).iter("testcase"):
        file = case.get("classname", "").split(".test_")[-1].split(".")[0]
        count = counts.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        count[outcome] += 1
        count["seconds"] += float(case.get("time", 0))
    return [
        Step(
            f"tests of {file}",
            count["failed"] == 0 and count["passed"] > 0,
            ", ".join(f"{count[outcome]:.0f} {outcome}" for outcome in ("passed", "failed", "skipped")),
            count["seconds"],
        )
        for file, count in sorted(counts.items())
    ]


def sanitize() -> list[Step]:
    """Every kernel once, small, under compute-sanitizer's tools; where it is missing, a step that says so."""
    if SANITIZER is None:
        return [Step("compute-sanitizer", True, "NOT RUN: compute-sanitizer was not found")]
    program = [sys.executable, "-m", "benchmarks.gpu_problems", "--shrink", "32"]
    steps = []
    for tool in ("memcheck", "racecheck"):
        command = [SANITIZER, "--tool", tool, "--error-exitcode", "1"]
        step, _ = run(
            f"compute-sanitizer {tool}", [*command, *program], SANITIZER_S, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        steps.append(step)
    return steps


# Measurements


def on_gpu(calls: Sequence[Callable[[], object]], rounds: int = 15) -> tuple[float, float]:
    """Seconds per call by the device's own clock, medians: launched one by one, and replayed from a CUDA graph."""

    def all_calls() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        all_calls(), all_calls()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    graph.replay()
    launched, replayed = (device_seconds(work, rounds) / len(calls) for work in (all_calls, graph.replay))
    return launched, replayed


def device_seconds(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings(device: str, measure: Measure, shrink: int = 1) -> Ceilings:
    source = torch.randn(2**28 // shrink**2, device=device)
    target = torch.empty_like(source)
    _, copy_s = measure([lambda: target.copy_(source)])
    size = 8192 // shrink
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    _, product_s = measure([lambda: torch.mm(a, b)])
    return Ceilings(2 * source.nbytes / copy_s, 2 * size**3 / product_s)


def op_rows(device: str, measure: Measure, best: Ceilings, shrink: int = 1) -> list[Row]:
    """Every op on every backend of the device."""
    from .gpu_problems import backends, problems

    rows = []
    for op, sizes in problems(shrink).items():
        for problem in sizes:
            sets = max(1, min(32, ROTATED_BYTES // problem.moved)) if shrink == 1 else 2
            calls = [problem.make(device) for _ in range(sets)]
            floor_s = max(problem.moved / best.bytes_per_s, problem.flops / best.flops_per_s)
            for backend in backends(op, device):
                launched_s, graph_s = measure([lambda c=call, b=backend: c(b) for call in calls])
                rates = (amount / graph_s for amount in (problem.moved, problem.flops, problem.normals))
                rows.append(Row(op, backend, problem.what, launched_s, graph_s, *rates, graph_s / floor_s))
    return rows


def stack_rows(device: str, measure: Measure, shrink: int = 1) -> list[StackRow]:
    """Decode and prefill of a population over the layers of a 7B-shaped model."""
    from .gpu_problems import DTYPE, MEMBERS
    from .gpu_stack import METHODS, Stack, pure

    stack, found = Stack(device, shrink), []
    for rows in (64, 512):
        x = torch.randn(rows, stack.hidden, device=device, dtype=DTYPE)
        offsets = torch.arange(MEMBERS + 1, device=device) * (rows // MEMBERS)
        times = {
            name: measure([lambda m=method, x=x, o=offsets: stack.forward(x, o, m)])
            for name, method in {"pure inference": pure, **METHODS}.items()
        }
        alone = times["pure inference"]
        found += [
            StackRow(name, rows, *seconds, alone[0] / seconds[0], alone[1] / seconds[1])
            for name, seconds in times.items()
        ]
    return found


# Results


def write(
    path: Path, device: str, steps: list[Step], best: Ceilings | None, ops: list[Row], stack: list[StackRow]
) -> None:
    """path.json with all numbers, path.md with the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": device,
        "ceilings": asdict(best) if best else None,
        "steps": [asdict(step) for step in steps],
        "ops": [asdict(row) for row in ops],
        "stack": [asdict(row) for row in stack],
    }
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(device, steps, best, ops, stack))


def as_markdown(device: str, steps: list[Step], best: Ceilings | None, ops: list[Row], stack: list[StackRow]) -> str:
    lines = [f"# {device}", "", "| step | result | | seconds |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {'passed' if s.passed else 'FAILED'} | {s.summary} | {s.seconds:.0f} |" for s in steps]
    if best:
        lines += [
            "",
            (
                f"Measured here: {best.bytes_per_s / 1e9:.0f} GB/s copied (read and written), "
                f"{best.flops_per_s / 1e12:.0f} TFLOP/s in an 8192-cubed bf16 product. "
                "The floor is the longer of bytes and operations at these."
            ),
            "",
            "| op | backend | size | launched, us | in a graph, us | GB/s | TFLOP/s | Gnormals/s | times the floor |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.op} | {r.backend} | {r.what} | {r.launched_s * 1e6:.1f} | {r.graph_s * 1e6:.1f} | "
            f"{r.bytes_per_s / 1e9:.0f} | {r.flops_per_s / 1e12:.2f} | {r.normals_per_s / 1e9:.1f} | {r.times_floor:.2f} |"
            for r in ops
        ]
        lines += [
            "",
            "| 7B-shaped layers | rows | launched, ms | share of pure inference | in a graph, ms | share |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.what} | {r.rows} | {r.launched_s * 1e3:.3f} | {r.launched_share:.1%} | {r.graph_s * 1e3:.3f} | "
            f"{r.graph_share:.1%} |"
            for r in stack
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="write PATH.json and PATH.md (default: %(default)s)"
    )
    path = parser.parse_args().results
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU, nothing was checked", file=sys.stderr)
        return 1
    properties = torch.cuda.get_device_properties(0)
    device = f"{properties.name}, compute capability {properties.major}.{properties.minor}, torch {torch.__version__}"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = [build()]
    best, ops, stack = None, [], []
    if steps[0].passed:
        steps += [*tests(path.with_suffix(".xml")), *sanitize()]
        write(path, device, steps, best, ops, stack)  # should a measurement take the process down
        start = time.monotonic()
        with torch.inference_mode():
            best = ceilings("cuda", on_gpu)
            ops, stack = op_rows("cuda", on_gpu, best), stack_rows("cuda", on_gpu)
        steps.append(Step("measurements", True, f"{len(ops)} ops and sizes", time.monotonic() - start))
    write(path, device, steps, best, ops, stack)
    print(path.with_suffix(".md").read_text())
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
