"""Hands the build of essa_kernels._C to CMake and ninja; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_tool(name: str) -> str:
    """The executable on PATH, or the one that the PyPI package of this name brings."""
    spec = importlib.util.find_spec(name)
    bundled = Path(spec.origin).parent / "data" / "bin" if spec and spec.origin else ROOT
    found = shutil.which(name) or shutil.which(name, path=bundled)
    if found is None:
        raise SystemExit(f"building essa_kernels needs {name}, found none on PATH: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake")
        # Kept between builds, also those of pip, which uses a new temporary folder each time. One for each toolchain:
        # CMake reads these variables only when it configures a folder for the first time.
        toolchain = [os.environ.get(variable, "") for variable in ("CXX", "CXXFLAGS", "LDFLAGS")]
        digest = hashlib.sha256(repr(toolchain).encode()).hexdigest()[:8]
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-{digest}"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DESSA_OUTPUT_DIR={Path(self.get_ext_fullpath(ext.name)).parent.resolve()}",
            f"-DESSA_CUDA={os.environ.get('ESSA_CUDA', 'auto')}",
        ]
        for command in configure, [cmake, "--build", str(build_dir), "--target", "_C"]:
            if subprocess.run(command, check=False).returncode != 0:
                raise SystemExit(f"building {ext.name} failed; see the messages of CMake above")


setup(ext_modules=[Extension("essa_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
