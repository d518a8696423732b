"""Runs interpreted.py in a process where Triton interprets its kernels: the choice is made when Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_interpreted(seed: int, *arguments: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "ESSA_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_triton_kernels_in_the_interpreter(seed):
    run_interpreted(seed, "tests/gpu/interpreted.py")


@pytest.mark.slow
def test_the_tests_of_the_ops_in_the_interpreter(seed):
    run_interpreted(seed, "tests/ops", "-k", "triton")
