"""The shape of the house: who may import whom, and that every op has all its parts."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "essa_kernels"
ESSA = ROOT / "python" / "essa"
OPS = sorted(p.stem for p in (KERNELS / "ops").glob("*.py") if p.stem not in ("__init__", "registration"))

# part of essa_kernels -> the parts it may import; every part may import itself
MAY_IMPORT = {
    "gpu": set(),
    "noise": set(),
    "reference": {"noise"},
    "tl": {"gpu", "noise"},
    "native": {"_C"},
    "dispatch": {"gpu"},
    "ops": {"dispatch", "gpu", "noise"},
    "env": {"dispatch", "noise"},
    "nn": {"dispatch", "gpu", "public"},
    "__init__": {"dispatch", "env", "noise", "ops"},
}


def python_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, relative ones resolved: "essa_kernels.noise.NoiseKey"."""
    package = path.relative_to(ROOT / "python" if ESSA in path.parents else ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def part_of(dotted: str) -> str:
    """Which part of essa_kernels a dotted name belongs to; a name from the package itself is public."""
    part = dotted.removeprefix("essa_kernels").lstrip(".").partition(".")[0]
    return part if part in MAY_IMPORT or part == "_C" else "public"


@pytest.mark.parametrize("path", python_files(KERNELS), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_within_essa_kernels(path):
    inside = path.relative_to(KERNELS).parts
    part = inside[0] if len(inside) > 1 else path.stem
    names = imports(path)
    parts = {part_of(name) for name in names if name.split(".")[0] == "essa_kernels"}
    assert parts <= MAY_IMPORT[part] | {part}
    assert not any(name.split(".")[0] == "essa" for name in names)


@pytest.mark.parametrize("path", python_files(ESSA), ids=lambda p: str(p.relative_to(ROOT)))
def test_essa_uses_public_names_only(path):
    public = {"essa_kernels", "essa_kernels.nn", "essa_kernels.noise"}
    for name in imports(path):
        if name.split(".")[0] != "essa_kernels" or name in public:
            continue
        module, _, attribute = name.rpartition(".")
        assert module in public, name
        assert not attribute.startswith("_"), name
        assert attribute in getattr(importlib.import_module(module), "__all__", [attribute]), name


def test_no_kernel_lives_in_essa():
    for path in python_files(ESSA):
        assert not {name.split(".")[0] for name in imports(path)} & {"triton", "pybind11", "ctypes"}, path


def test_csrc_knows_neither_torch_nor_python():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for path in sources:
        headers = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
        assert not [h for h in headers if h.startswith(("torch", "ATen", "c10"))], path
        if path.name != "bindings.cpp":
            assert not [h for h in headers if h.startswith(("pybind11", "Python"))], path


def test_the_noise_contract_includes_nothing_of_ours():
    for path in (ROOT / "csrc" / "noise").iterdir():
        assert '#include "' not in path.read_text(), path


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_all_its_parts(op):
    from essa_kernels.dispatch import OPS, WITHOUT_CUDA

    parts = [
        f"essa_kernels/reference/{op}.py",
        f"essa_kernels/tl/{op}.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/bench_{op}.py",
    ]
    if not {name for name, (file, _) in OPS.items() if file == op} <= WITHOUT_CUDA:
        parts.append(f"csrc/cuda/{op}.cu")
    assert not [part for part in parts if not (ROOT / part).is_file()]


def test_every_implementation_has_the_reference_signature():
    from essa_kernels.dispatch import MODULES, OPS

    for file, function in OPS.values():
        expected = inspect.signature(getattr(importlib.import_module(f"essa_kernels.reference.{file}"), function))
        for module in {m.format(file=file) for m in MODULES.values()}:
            tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
            definition = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
            assert [a.arg for a in definition.args.args] == list(expected.parameters), f"{module}.{function}"


def test_every_module_says_what_it_is_for():
    for path in python_files(KERNELS) + python_files(ESSA):
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("package", ["essa_kernels", "essa_kernels.nn", "essa"])
def test_public_names_have_docstrings(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value):
            continue
        assert value.__doc__, name
        for attribute, member in vars(value).items() if inspect.isclass(value) else ():
            if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{attribute}"


def test_importing_needs_neither_compiled_module_nor_triton():
    program = (
        "import sys; sys.modules['triton'] = sys.modules['essa_kernels._C'] = None; import essa_kernels as e;"
        "e.gaussian(3, e.NoiseKey(0), backend='reference'); print(e.explain())"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert "* reference" in child.stdout
