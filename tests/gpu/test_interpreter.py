"""Runs interpreted.py in a process where Triton interprets its kernels: the choice is made when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from essa_kernels import dispatch

ROOT = Path(__file__).parents[2]


def run_interpreted(monkeypatch: pytest.MonkeyPatch, seed: int, *arguments: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if reason := dispatch.unavailable("triton", "cpu"):
        pytest.skip(reason)
    environment = os.environ | {"ESSA_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_triton_kernels_in_the_interpreter(monkeypatch, seed):
    run_interpreted(monkeypatch, seed, "tests/gpu/interpreted.py")


@pytest.mark.slow
def test_the_tests_of_the_ops_in_the_interpreter(monkeypatch, seed):
    run_interpreted(monkeypatch, seed, "tests/ops", "-k", "triton")


def test_an_old_triton_is_refused(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert dispatch.unavailable("triton", "cuda") == "triton 3.3.1 is installed, 3.4 or newer is needed"
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    needed = "3.9 or newer is needed to interpret kernels"
    assert dispatch.unavailable("triton", "cpu") == f"triton 3.8.0 is installed, {needed}"


def test_a_triton_that_does_not_load_is_named(monkeypatch):
    pytest.importorskip("triton")

    def broken(name: str) -> None:
        raise RuntimeError("no libtriton")

    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    assert dispatch.unavailable("triton", "cuda") == "triton does not load: no libtriton"
