"""Wheels built from the source distribution, as users and the release build them, and an empty environment for one."""

from __future__ import annotations

import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **options) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


@dataclass
class Environment:
    """A virtual environment that the tests run code in, far from the source tree."""

    path: Path

    def run(self, program: str, *arguments: str | Path, **options) -> str:
        empty = self.path / "empty"
        empty.mkdir(exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ESSA_CPU_ISA")}
        return run(self.path / "bin" / program, *arguments, cwd=empty, env=clean | options.pop("env", {}), **options)

    def pip_install(self, *arguments: str | Path, **options) -> None:
        pip = ("-m", "pip", "install", "-qq", "--no-compile", "--constraint", ROOT / "constraints.txt")
        self.run("python", *pip, *arguments, **options)


def make_environment(path: Path) -> Environment:
    venv.create(path, with_pip=True)
    return Environment(path)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel for this Python, made the way `make wheel` makes it; CUDA kernels are in it if nvcc is here."""
    tools = make_environment(tmp_path_factory.mktemp("tools"))
    tools.pip_install("build")
    output = tmp_path_factory.mktemp("wheel")
    tools.run("python", "-m", "build", "--outdir", output, ROOT)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that held nothing but pip until the wheel went in."""
    environment = make_environment(tmp_path_factory.mktemp("installed"))
    environment.pip_install(wheel)
    return environment
