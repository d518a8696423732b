"""make gpu-check without a GPU: what it would run, what it writes, and that it says there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_problems
from essa_kernels import dispatch

SHRINK = 32

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_noise" name="a[cuda-cuda]" time="0.5"/>
<testcase classname="tests.ops.test_noise" name="b[cuda-cuda]" time="1.0"><skipped/></testcase>
<testcase classname="tests.ops.test_svd_lora" name="a[cuda-cuda]" time="2"><failure>no</failure></testcase>
<testcase classname="tests.gpu.test_device" name="c" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


def fake_measure(calls):
    """Runs every call and says that one took 2 ms, 1 ms in a graph."""
    for call in calls:
        call()
    return 2e-3, 1e-3


@pytest.fixture(autouse=True)
def without_grad():
    with torch.inference_mode():
        yield


def test_every_op_has_problems():
    assert set(gpu_problems.problems(SHRINK)) == set(dispatch.OPS)
    for op, sizes in gpu_problems.problems().items():
        assert sizes, op
        assert all(problem.moved > 0 for problem in sizes), op


def test_results_of_fake_times(tmp_path, native):
    best = gpu_check.ceilings("cpu", fake_measure, SHRINK)
    assert best.flops_per_s == pytest.approx(2 * (8192 // SHRINK) ** 3 / 1e-3)
    ops = gpu_check.op_rows("cpu", fake_measure, best, SHRINK)
    assert {row.op for row in ops} == set(dispatch.OPS)
    (row,) = (row for row in ops if row.op == "gaussian")
    assert row.normals_per_s == pytest.approx(2**28 / SHRINK**2 / 1e-3)
    assert row.times_floor == pytest.approx(best.bytes_per_s / row.bytes_per_s)
    stack = gpu_check.stack_rows("cpu", fake_measure, SHRINK)
    assert {row.rows for row in stack} == {64, 512}
    assert all(row.launched_share == row.graph_share == 1.0 for row in stack)

    steps = [gpu_check.Step("build", True, "built", 3.0), *gpu_check.test_steps(JUNIT)]
    gpu_check.write(tmp_path / "check", "A card", steps, best, ops, stack)
    written = json.loads((tmp_path / "check.json").read_text())
    assert len(written["ops"]) == len(ops)
    assert written["ceilings"]["flops_per_s"] == best.flops_per_s
    table = (tmp_path / "check.md").read_text()
    assert table.startswith("# A card\n")
    for row in ops:
        assert f"| {row.op} | {row.backend} | {row.what} | 2000.0 | 1000.0 |" in table
    assert "| pure inference | 512 | 2.000 | 100.0% | 1.000 | 100.0% |" in table


def test_populations_compute_what_the_layers_do(seed, native):
    """The ways to run the population agree with each other, so that their times can be compared."""
    from benchmarks.gpu_stack import METHODS, Stack

    stack = Stack("cpu", SHRINK)
    x, offsets = torch.randn(64, stack.hidden, dtype=gpu_problems.DTYPE), torch.arange(65)
    first, *others = (stack.forward(x, offsets, method).float() for name, method in METHODS.items() if "svd" in name)
    for other in others:
        assert (other - first).abs().mean() < 0.05 * first.abs().mean()


def test_steps_of_a_test_report():
    steps = {step.name: step for step in gpu_check.test_steps(JUNIT)}
    assert not steps["tests of device"].passed, "nothing ran"
    assert steps["tests of noise"].passed
    assert steps["tests of noise"].summary == "1 passed, 0 failed, 1 skipped"
    assert steps["tests of noise"].seconds == 1.5
    assert not steps["tests of svd_lora"].passed


def test_a_program_that_fails_or_hangs_is_a_failed_step():
    passed, output = gpu_check.run("fine", [sys.executable, "-c", "print('done')"], 60)
    assert (passed.passed, passed.summary, output) == (True, "done", "done\n")
    failed, _ = gpu_check.run("bad", [sys.executable, "-c", "raise SystemExit('why')"], 60)
    assert (failed.passed, failed.summary) == (False, "why")
    late, _ = gpu_check.run("late", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert (late.passed, late.summary) == (False, "stopped after 1 s")


def test_a_missing_sanitizer_is_said(monkeypatch):
    monkeypatch.setattr(gpu_check, "SANITIZER", None)
    (step,) = gpu_check.sanitize()
    assert "NOT RUN" in step.summary


def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--results", str(tmp_path / "check")]
    root = Path(gpu_check.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())
