"""Reading PTX."""

from __future__ import annotations

import re

# The instructions on floats that the noise contract allows. "add.f32" without a rounding mode is round to nearest too,
# but may be fused with a product that feeds it. Triton before 3.6 flushes denormals in roots, and no squared radius is one.
ALLOWED = re.compile(
    r"(fma|mul|add|sub|sqrt)\.rn\.f32|sqrt\.rn\.ftz\.f32|(add|sub)\.f32|cvt\.rn\.f32\.[su]32|neg\.f32"
    r"|cvt\.rn\.b?f16(x2)?\.f32|cvt\.f32\.b?f16"
    r"|(ld|st|mov|selp|setp)\.[\w.:]*"
)
INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+ +)?([a-z][\w.:]*)\s+(.*);", re.MULTILINE)


def assert_correctly_rounded(ptx: str) -> None:
    """Only correctly rounded float instructions, and no product that a compiler may fuse into a sum."""
    producer = {}
    floats = [found.groups() for found in INSTRUCTION.finditer(ptx) if re.search(r"\.f(32|64)|\.approx", found[1])]
    assert any(name.startswith("sqrt.rn.") for name, _ in floats) or not any("fma" in name for name, _ in floats)
    for name, operands in floats:
        assert ALLOWED.fullmatch(name), f"{name} {operands}"
        result, *inputs = re.findall(r"%\w+", operands)
        if name in ("add.f32", "sub.f32"):
            assert not any(producer.get(register, "").startswith("mul") for register in inputs), f"{name} {operands}"
        producer[result] = name
