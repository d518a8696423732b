"""csrc/cuda compiled by nvcc, without a GPU: what the kernels need, and only correctly rounded noise."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .ptx import assert_correctly_rounded

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
KERNELS = sorted(path.name for path in CUDA.glob("*.cu") if "__global__" in path.read_text())

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_fit(tmp_path, source, arch):
    command = [NVCC, "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-c", CUDA / source, "-o", tmp_path / "o.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) <= {"0"}, done.stderr
    assert set(re.findall(r"(\d+) bytes stack frame", done.stderr)) <= {"0"}, done.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    print(source, "registers:", sorted(registers))
    assert max(registers) <= (64 if source == "noise.cu" else 128)


@pytest.mark.parametrize(("source", "roots"), [("noise.cu", 8), ("es_update.cu", 4)])
def test_noise_is_correctly_rounded(tmp_path, source, roots):
    ptx = tmp_path / "noise.ptx"
    subprocess.run([NVCC, "-std=c++17", "-O3", "-arch=compute_90", "-ptx", CUDA / source, "-o", ptx], check=True)
    assert_correctly_rounded(ptx.read_text())
    assert ptx.read_text().count("sqrt.rn.f32") == roots
    assert ("st.global.v4" in ptx.read_text()) == (source == "noise.cu")
