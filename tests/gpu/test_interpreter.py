"""Runs interpreted.py in a process where Triton interprets its kernels: the choice is made when Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_triton_kernels_in_the_interpreter(seed):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "ESSA_TEST_SEED": str(seed)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(HERE / "interpreted.py")]
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
