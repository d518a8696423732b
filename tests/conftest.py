"""What all tests share: fresh random data whose seed is printed, and the backends this machine offers."""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from essa_kernels import dispatch

hypothesis.settings.register_profile("essa", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.load_profile("essa")

SEED = int(os.environ.get("ESSA_TEST_SEED") or secrets.randbits(32))


def pytest_report_header() -> str:
    return f"essa: ESSA_TEST_SEED={SEED}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own, new in every session; torch's generator starts from it."""
    value = (SEED + sum(request.node.nodeid.encode())) % 2**32
    print(f"seed {value} (repeat with ESSA_TEST_SEED={SEED})")
    torch.manual_seed(value)
    return value


def available_backends() -> list[tuple[str, str]]:
    """(backend, device) pairs an op can run on here."""
    pairs = [(backend, device) for device in dispatch.PREFERENCE for backend in dispatch.MODULES]
    return [(backend, device) for backend, device in pairs if dispatch.unavailable(backend, device) is None]


@pytest.fixture(params=available_backends(), ids="-".join)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Every (backend, device) pair that works here. Skips CUDA's for tests of an op without a CUDA kernel."""
    file = request.module.__name__.rpartition("test_")[2]
    ops = {op for op, (name, _) in dispatch.OPS.items() if name == file}
    if request.param[0] == "cuda" and ops and ops <= dispatch.WITHOUT_CUDA:
        pytest.skip(f"{file} has no CUDA kernel")
    return request.param


@pytest.fixture
def native() -> None:
    """Skips the test where the compiled module is missing."""
    if error := dispatch.compiled_module_error():
        pytest.skip(error)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa_environment(request: pytest.FixtureRequest, native: None) -> dict[str, str]:
    """The environment of a process held to one instruction set. Skips those not to be had here.

    avx512bf16 is not among them: where it is to be had, every process that is not held to another has it.
    """
    environment = os.environ | {"ESSA_CPU_ISA": request.param}
    module = Path(importlib.util.find_spec("essa_kernels._C").origin)
    load = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(module.parent)!r}); import _C"]
    attempt = subprocess.run(load, env=environment, capture_output=True, text=True, check=False)
    if "this build on this machine allows" in attempt.stderr:
        pytest.skip(attempt.stderr.strip().splitlines()[-1])
    assert attempt.returncode == 0, attempt.stderr
    return environment
