"""The build's own switches, and the wheel for older systems."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pybind11
import pytest

import essa_kernels

from .conftest import ROOT, make_environment, run


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    cmake = [sys.executable, "-m", "cmake", "-S", ROOT, "-B", build]
    tools = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return subprocess.run([*cmake, *tools, *options], check=False, capture_output=True, text=True)


def test_an_unknown_cuda_setting_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DESSA_CUDA=maybe")
    assert done.returncode != 0
    assert "ESSA_CUDA must be auto, on or off, got 'maybe'" in done.stderr


@pytest.mark.parametrize("setting", ["on", "auto"])
def test_an_nvcc_that_cannot_compile(setting: str, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho this nvcc is broken\nexit 1\n")
    nvcc.chmod(0o755)
    done = configure(tmp_path / "build", f"-DESSA_CUDA={setting}", f"-DNVCC={nvcc}")
    assert "this nvcc is broken" in done.stdout + done.stderr
    assert (done.returncode == 0) == (setting == "auto")


def native_isa() -> str:
    return str(essa_kernels.env_report()["compiled_module"]["cpu_isa"])


@pytest.mark.slow
def test_a_build_without_cuda_imports_and_explains(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info"))
    environment = make_environment(tmp_path / "environment")
    environment.pip_install(tree, env={"ESSA_CUDA": "off"})
    info = environment.run("essa", "info")
    assert '"cuda": false' in info


@pytest.mark.slow
def test_the_manylinux_wheel_needs_glibc_2_28_at_most(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info"))
    run("make", "wheel-manylinux", f"PYTHON={sys.executable}", cwd=tree)
    (wheel,) = (tree / "dist").glob("*manylinux_2_28*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.startswith("essa_kernels/_C."))
        symbols = run("objdump", "-T", archive.extract(name, tmp_path))
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([0-9.]+)", symbols)}
    assert versions and max(versions) <= (2, 28)
    assert "GLIBCXX" not in symbols and "CXXABI" not in symbols

    environment = make_environment(tmp_path / "environment")
    environment.pip_install(wheel)
    info = environment.run("essa", "info")
    assert '"compiler": "Clang' in info
    assert f'"cpu_isa": "{native_isa()}"' in info
