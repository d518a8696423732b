"""The kernels compile with the oldest Triton the package allows, and with the one of the torch before last."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
# Triton 3.4 links for AMD with a linker that it does not bring along.
@pytest.mark.parametrize(("version", "archs"), [("3.4.0", "sm_80 or sm_90"), ("3.6.0", "sm_80 or sm_90 or gfx942")])
def test_kernels_compile_with(version, archs, tmp_path):
    install = ["-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--target", tmp_path, f"triton=={version}"]
    subprocess.run([sys.executable, *install], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu/test_ahead_of_time.py", "-k", archs],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
