"""The wheel: complete, self-contained, and working in an environment that has nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT, Environment

KNOWN_ANSWERS = json.loads((ROOT / "tests" / "ops" / "known_answers.json").read_text())["vectors"]
DRAW = """
import sys, torch, essa_kernels
assert "site-packages" in essa_kernels.__file__, essa_kernels.__file__
seed, generation, site, member, rows, cols = map(int, sys.argv[1:])
key = essa_kernels.NoiseKey(seed, generation, site)
print(essa_kernels.gaussian([rows, cols], key, member, backend="cpu").numpy().astype("<f4").tobytes().hex())
"""


@pytest.fixture(scope="session")
def module(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.startswith("essa_kernels/_C."))
        return Path(archive.extract(name, tmp_path_factory.mktemp("module")))


def binutil(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def test_every_file_of_both_packages_is_in_the_wheel(wheel: Path) -> None:
    packages = {"essa_kernels": ROOT / "essa_kernels", "essa": ROOT / "python" / "essa"}
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in packages.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.split("/")[0] in packages}
    assert {name for name in packed if not name.startswith("essa_kernels/_C.")} == expected


def test_noise_has_the_known_bits(installed: Environment) -> None:
    answer = next(vector for vector in KNOWN_ANSWERS if vector["distribution"] == "gaussian" and vector["key"][3] % 2)
    printed = installed.run("python", "-c", DRAW, *map(str, answer["key"] + answer["shape"]))
    assert hashlib.sha256(bytes.fromhex(printed.split()[-1])).hexdigest() == answer["sha256"]


def test_commands_run(installed: Environment) -> None:
    assert "align" in installed.run("essa", "--help")
    info = installed.run("essa", "info")
    assert "svd_lora" in info and "compiled_isas" in info


def test_the_instruction_set_can_be_lowered_and_nothing_else(installed: Environment) -> None:
    report = "import json, essa_kernels; print(json.dumps(essa_kernels.env_report()['compiled_module']))"
    lowered = json.loads(installed.run("python", "-c", report, env={"ESSA_CPU_ISA": "baseline"}))
    assert lowered["cpu_isa"] == "baseline"
    refused = json.loads(installed.run("python", "-c", report, env={"ESSA_CPU_ISA": "fastest"}))
    assert "ESSA_CPU_ISA is 'fastest'" in refused["error"]


def test_the_wheel_needs_no_torch_no_driver_and_no_cuda_runtime(module: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", binutil("readelf", "-d", module))
    system = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++", "ld-linux-x86-64"}
    assert {library.split(".so")[0] for library in needed} <= system | {"ld-linux-aarch64"}


def test_nothing_but_the_entry_point_is_exported(module: Path) -> None:
    symbols = binutil("nm", "-D", "--defined-only", module).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__C"]


def test_wide_instructions_stay_in_the_kernels_chosen_at_run_time(module: Path) -> None:
    # An inline function compiled with AVX and called from a baseline path would kill the process on an older machine.
    leaks, function = set(), ""
    for line in binutil("objdump", "-d", "--no-show-raw-insn", module).split("\n"):
        if line.endswith(">:"):
            function = line.split()[1]
        elif re.search(r"%[yz]mm|\tv[a-z0-9]+ ", line) and not re.search(r"4avx2|6avx512|10avx512bf16", function):
            leaks.add(function)
    assert not leaks
