"""Every Triton kernel compiled without a GPU, as the launching code would launch it: what it needs, what it computes."""

from __future__ import annotations

import re
import subprocess
from typing import Any, NamedTuple

import pytest
import torch
from torch.torch_version import TorchVersion

from .ptx import assert_correctly_rounded

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from essa_kernels import gpu
from essa_kernels.dispatch import LEAST_TRITON_TO_INTERPRET
from essa_kernels.tl import (
    decode_attention,
    es_update,
    linear_logprob,
    lora_perturbed,
    lowrank,
    multi_lora,
    noise,
    svd_lora,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# With test_older_triton.py what older compilers make need only compile.
COUNTED = TorchVersion(triton.__version__) >= LEAST_TRITON_TO_INTERPRET
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, arch: str) -> list[Launch]:
    """Collects what would be launched on ``arch``, in place of launching it."""
    collected = []

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
        collected.append(Launch(kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | named, options))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(gpu, "architecture", lambda device: arch)
    return collected


def compiled(launch: Launch, arch: str) -> Any:
    """The launch compiled with the specialisation a real one would have."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            aligned = False
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            aligned = False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[arch], options=launch.options)


def assert_fits(kernel: Any, arch: str, most_registers: int, most_shared: int = 64 << 10) -> None:
    """No spills, and registers within bounds."""
    if not COUNTED:
        return
    if arch.startswith("gfx"):
        assembly = kernel.asm["amdgcn"]
        # A scalar register that spills goes to a lane of a vector register, not to memory.
        for spilled in (r"\.vgpr_spill_count: *(\d+)", r"; ScratchSize: *(\d+)"):
            assert int(re.search(spilled, assembly)[1]) == 0, spilled
        registers = int(re.search(r"; TotalNumVgprs: *(\d+)", assembly)[1])
    else:
        command = [get_ptxas(TARGETS[arch].arch).path, "-v", "--gpu-name", f"{arch}a" if arch == "sm_90" else arch]
        report = subprocess.run(
            [*command, "-o", "/dev/null", "-"], input=kernel.asm["ptx"], capture_output=True, text=True, check=False
        )
        assert report.returncode == 0, report.stderr
        assert re.search(r"(\d+) bytes spill stores", report.stderr)[1] == "0", report.stderr
        assert re.search(r"(\d+) bytes spill loads", report.stderr)[1] == "0", report.stderr
        registers = int(re.search(r"Used (\d+) registers", report.stderr)[1])
    print(f"{kernel.metadata.name} {arch}: {registers} registers, {kernel.metadata.shared} bytes shared")
    assert registers <= most_registers
    assert kernel.metadata.shared <= most_shared


@pytest.fixture(params=["sm_80", "sm_90", "gfx942"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("cols", [4096, 129])
@pytest.mark.parametrize("fill", [noise.gaussian, noise.rademacher])
def test_noise(launches, arch, fill, cols):
    fill(torch.empty(64, cols, device="meta"), 2**64 - 1, 5, 1, 3)
    (launch,) = launches
    kernel = compiled(launch, arch)
    assert_fits(kernel, arch, most_registers=64)
    if arch.startswith("sm"):
        ptx = kernel.asm["ptx"]
        assert_correctly_rounded(ptx)
        assert "bar.sync" not in ptx, "the noise goes through shared memory"
        assert ("st.global.v4" in ptx) == (fill is noise.rademacher and cols == 4096)
    else:
        assert_correctly_rounded_on_amd(kernel.asm["amdgcn"])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_es_update(launches, arch, distribution, dtype):
    """One launch for the tensors of a dtype, whatever their number and shapes."""
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in [(64, 4096), (1, 129), (37, 1)]]
    for given in (tensors, tensors[:1]):
        es_update.perturb_(given, 2**64 - 1, 5, 1, 3, 0.01, distribution)
        es_update.es_update_(given, 2**64 - 1, 5, 1, torch.empty(32, device="meta"), distribution)
    assert len(launches) == 4
    for launch in launches:
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, most_registers=128)
        if arch.startswith("sm"):
            assert_correctly_rounded(kernel.asm["ptx"])
        else:
            assert_correctly_rounded_on_amd(kernel.asm["amdgcn"])


def assert_correctly_rounded_on_amd(assembly: str) -> None:
    """No approximate instruction, and every square root is corrected: v_sqrt_f32 alone may be an ulp off."""
    if not COUNTED:
        return
    assert ".amdhsa_float_round_mode_32 0" in assembly, "not to nearest even"
    assert ".amdhsa_float_denorm_mode_32 3" in assembly, "denormals are flushed"
    used = re.findall(r"^\s+(v_\w+_f32)\w*", assembly, re.MULTILINE)
    for inexact in ("v_exp_f32", "v_log_f32", "v_sin_f32", "v_cos_f32", "v_rsq_f32", "v_mad_f32", "v_mac_f32"):
        assert inexact not in used
    corrections = [name for name in used if re.fullmatch(r"v_cmp_[gl][et]_f32", name)]
    assert len(corrections) >= 2 * used.count("v_sqrt_f32")


def test_a_key_compiles_nothing_anew(launches, arch):
    keys = [(0, 0, 0, 0), (1, 1, 1, 2), (16, 32, 48, 64), (2**64 - 1, 2**32 - 1, 2**30 - 1, 2**33 - 1)]
    for fill in (noise.gaussian, noise.rademacher):
        for key in keys:
            fill(torch.empty(64, 4096, device="meta"), *key)
        key_arguments = [
            {
                parameter.name: launch.arguments[parameter.name]
                for parameter in launch.kernel.params
                if parameter.name in noise.KEY_ARGUMENTS and parameter.do_not_specialize
            }
            for launch in launches
        ]
        for arguments in key_arguments:
            assert list(arguments) == noise.KEY_ARGUMENTS
            assert all(-(2**31) <= word < 2**31 for word in arguments.values())


def operands(rows: int, rank: int, dtype: torch.dtype, size: int) -> tuple[torch.Tensor, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    shared = empty(rank, size, dtype=dtype), empty(rank, rank), empty(size, rank, dtype=dtype)
    values = empty(64, rank), empty(64, rank), empty(65, dtype=torch.int64)
    return empty(rows, size, dtype=dtype), empty(rows, size, dtype=dtype), *shared, *values


def check_svd_lora(launches: list[Launch], arch: str, dtype: torch.dtype, rank: int, size: int = 4096) -> None:
    """Every kernel of the three ways through svd_lora."""
    y, x, v_a, core, u_b, *values = operands(64, rank, dtype, size)
    svd_lora.svd_lora_(y, x, v_a, core, u_b, *values)
    h = torch.empty(64, rank, device="meta")
    svd_lora.svd_lora_shrink(h, x, v_a, core, *values)
    svd_lora.svd_lora_expand_(y, h, u_b)
    svd_lora.svd_lora_(*operands(8192, rank, dtype, size))
    for launch in {launch.kernel: launch for launch in launches}.values():
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, most_registers=256)
        if arch.startswith("sm") and size % 16 == 0 and rank % 8 == 0:
            ptx = kernel.asm["ptx"]
            assert not re.search(r"ld\.global\.[bu](8|16)\b", ptx), "narrow loads"
            if dtype != torch.float32 and launch.kernel is not svd_lora.mix_kernel:
                assert re.search("mma", ptx), "no matrix unit"


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 8), (torch.float32, 16)])
def test_svd_lora(launches, arch, dtype, rank):
    check_svd_lora(launches, arch, dtype, rank)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4096, 1134])
@pytest.mark.parametrize("rank", [16, 32, 48, 64, 256, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_svd_lora_at_other_shapes(launches, arch, dtype, rank, size):
    check_svd_lora(launches, arch, dtype, rank, size)


def check_perturbed(launches, arch, dtype: torch.dtype, distribution: str, rows: int) -> None:
    """Both kernels of both forward ops, with so many rows for 64 members."""
    y, x, a, _, b, *_, offsets = operands(rows, 8, dtype, 4096)
    members = torch.empty(64, dtype=torch.int64, device="meta")
    where = (members, offsets)
    lora_perturbed.lora_perturbed_(y, x, a, b, 2**64 - 1, 5, 2, 0.01, *where, 2.0, distribution)
    lowrank.lowrank_perturbed_(y, x, 2**64 - 1, 5, 2, 0.01, *where, 1, distribution)
    assert len(launches) == 4
    for launch in launches:
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, most_registers=255)
        if arch.startswith("sm"):
            assert_noise_is_correctly_rounded(kernel.asm["ptx"])


def assert_noise_is_correctly_rounded(ptx: str) -> None:
    """Beside a product that may be fused: nothing approximate, and no square root but the exact one."""
    assert not re.search(r"\.approx|(?<!sqrt\.rn)\.ftz", ptx)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_perturbed(launches, arch, distribution):
    check_perturbed(launches, arch, torch.bfloat16, distribution, rows=512)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [64, 4096])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perturbed_at_other_shapes(launches, arch, dtype, distribution, rows):
    check_perturbed(launches, arch, dtype, distribution, rows)


def assert_wide_loads(launch: Launch, ptx: str) -> None:
    """But for the bias, one element a thread, of which there is one row."""
    assert len(re.findall(r"ld\.global\.[bu](?:8|16)\b", ptx)) <= launch.arguments["BIASED"], "narrow loads"


def check_perturbed_linear(
    launches, arch, dtype: torch.dtype, distribution: str, rows: int, size: int = 4096, most_shared: int = 160 << 10
) -> None:
    """What ends the base layer for both ops, with so many rows for 64 members."""
    y, x, a, _, b, *_, offsets = operands(rows, 8, dtype, size)
    weight, members = (
        torch.empty(shape, dtype=t, device="meta") for shape, t in [((size, size), dtype), (64, torch.int64)]
    )
    of_lora, where = (a.float(), b.float().mT.contiguous().mT), (members, offsets)
    lora_perturbed.lora_perturbed_linear(
        y, x, weight, weight[0], *of_lora, 2**64 - 1, 5, 2, 0.01, *where, 2.0, distribution
    )
    lowrank.lowrank_perturbed_linear(y, x, weight, None, 2**64 - 1, 5, 2, 0.01, *where, 1, distribution)
    assert len(launches) == 4
    for launch in launches[1::2]:
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, 256, most_shared)
        if arch.startswith("sm"):
            ptx = kernel.asm["ptx"]
            assert_noise_is_correctly_rounded(ptx)
            if size % 16 == 0 and dtype is not torch.float32:
                assert_wide_loads(launch, ptx)
                assert re.search("mma", ptx), "no matrix unit"


@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_perturbed_linear(launches, arch, distribution, rows):
    check_perturbed_linear(launches, arch, torch.bfloat16, distribution, rows)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4096, 8192, 1134])
@pytest.mark.parametrize("rows", [7, 64, 4096])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perturbed_linear_at_other_shapes(launches, arch, dtype, distribution, rows, size):
    check_perturbed_linear(launches, arch, dtype, distribution, rows, size)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_lowrank_update(launches, arch, distribution):
    weights = [torch.empty(4864, 896, dtype=torch.bfloat16, device="meta"), torch.empty(129, 7, device="meta")]
    lowrank.lowrank_update_(weights, 2**64 - 1, 5, 2, torch.empty(32, device="meta"), 2, distribution)
    assert len(launches) == 2
    for launch in launches:
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, most_registers=255)
        if arch.startswith("gfx"):
            assert_correctly_rounded_on_amd(kernel.asm["amdgcn"])
        elif distribution == "gaussian":
            assert_correctly_rounded(kernel.asm["ptx"])
        else:
            assert "fma.rn.f32" in kernel.asm["ptx"]


def check_linear_logprob(launches: list[Launch], arch: str, dtype: torch.dtype, d: int, *, capped: bool) -> None:
    """Every kernel of the forward pass, with and without slopes, and of the backward pass."""
    hidden, weight, d_hidden, d_weight = (torch.empty(n, d, dtype=dtype, device="meta") for n in (512, 32_000) * 2)
    bias, d_bias = torch.empty(2, 32_000, dtype=dtype, device="meta") if capped else (None, None)
    labels = torch.empty(512, dtype=torch.int64, device="meta")
    grad, logprob, logsumexp = torch.empty(3, 512, device="meta")
    slope = torch.empty(512, d, dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float32, device="meta")
    operands = (hidden, weight, labels, bias, 1.5, 30.0 if capped else None, 0.7, -100)
    linear_logprob.linear_logprob(logprob, logsumexp, slope, *operands)
    linear_logprob.linear_logprob(logprob, logsumexp, None, *operands)
    linear_logprob.linear_logprob_backward(d_hidden, d_weight, d_bias, grad, slope, logprob, logsumexp, *operands)
    different = {(launch.kernel, launch.arguments.get("SLOPES")): launch for launch in launches}
    assert len(different) == 8
    for launch in different.values():
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, most_registers=256)
        if arch.startswith("sm") and d % 16 == 0 and dtype != torch.float32 and "INNER" in launch.arguments:
            products = launch.arguments.get("SLOPES", True) or launch.kernel is not linear_logprob.fold_kernel
            assert bool(re.search("mma", kernel.asm["ptx"])) == products, "no matrix unit"


def test_linear_logprob(launches, arch):
    check_linear_logprob(launches, arch, torch.bfloat16, 2048, capped=True)


@pytest.mark.slow
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("d", [4096, 1134])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_logprob_at_other_shapes(launches, arch, dtype, d, capped):
    check_linear_logprob(launches, arch, dtype, d, capped=capped)


def check_svd_lora_linear(
    launches: list[Launch], arch: str, dtype: torch.dtype, rank: int, size: int = 4096, most_shared: int = 160 << 10
) -> None:
    """The kernel for few rows and the one for many."""
    for rows in (64, 512):
        y, x, v_a, *rest = operands(rows, rank, dtype, size)
        weight = torch.empty(size, size, dtype=dtype, device="meta")
        svd_lora.svd_lora_linear(y, x, weight, weight[0], v_a, *rest)
        h = torch.empty(rows, 3 * rank, dtype=torch.float32, device="meta")[:, rank : 2 * rank]
        svd_lora.svd_lora_expand_linear(y, x, weight, None, h, rest[1])
    linear = [launch for launch in launches if launch.kernel is svd_lora.linear_kernel]
    assert len(linear) == 4
    for launch in linear:
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, 256, most_shared)
        if arch.startswith("sm") and size % 16 == 0 and rank % 8 == 0:
            ptx = kernel.asm["ptx"]
            assert_wide_loads(launch, ptx)
            assert dtype is torch.float32 or re.search("mma", ptx), "no matrix unit"
            if arch == "sm_90" and dtype is not torch.float32 and launch.arguments["SHRINKS"]:
                assert_products_per_step(launch, ptx)


def assert_products_per_step(launch: Launch, ptx: str) -> None:
    """Of a step along K, in products of 16: as many of x with V_A as with W, each by its own columns."""
    steps, columns, ranks = (launch.arguments[name] // 16 for name in ("INNER", "COLUMNS", "RANK_A"))
    widths = [int(width) // 16 for width in re.findall(r"wgmma.mma_async\S*m64n(\d+)k16", ptx)]
    after = len(widths) - 2 * steps  # what u_b takes at the end
    assert widths.count(ranks) == steps and widths.count(columns) == steps + after, widths


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 16)])
def test_svd_lora_linear(launches, arch, dtype, rank):
    check_svd_lora_linear(launches, arch, dtype, rank)


@pytest.mark.parametrize("arch", ["sm_89"], indirect=True)
def test_layers_fit_a_gpu_of_less_shared_memory(launches, arch):
    check_svd_lora_linear(launches, arch, torch.bfloat16, 16, size=8192, most_shared=99 << 10)
    launches.clear()
    for rows in (64, 512):
        check_perturbed_linear(launches, arch, torch.bfloat16, "rademacher", rows, size=8192, most_shared=99 << 10)
        launches.clear()


@pytest.mark.slow
@pytest.mark.parametrize("size", [4096, 8192, 1134])
@pytest.mark.parametrize("rank", [8, 32, 64, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_svd_lora_linear_at_other_shapes(launches, arch, dtype, rank, size):
    check_svd_lora_linear(launches, arch, dtype, rank, size)


def check_decode_attention(launches: list[Launch], arch: str, dtype: torch.dtype, group: int, d: int) -> None:
    cache = torch.empty(64, 2, 1024, d, dtype=dtype, device="meta")
    query, mask = torch.empty(64, 2 * group, d, dtype=dtype, device="meta"), torch.empty(64, 600, dtype=torch.bool)
    for seen in (None, mask):
        part = cache[:, :, :600]
        decode_attention.decode_attention(torch.empty_like(query), query, part, part, seen, 0.125)
    for launch in launches:
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, most_registers=256, most_shared=(64 if arch.startswith("gfx") else 160) << 10)
        if arch.startswith("sm") and dtype is not torch.float32:
            assert re.search("mma", kernel.asm["ptx"]), "no matrix unit"
            assert re.search(r"cp\.async", kernel.asm["ptx"]), "no loads ahead"


@pytest.mark.parametrize(
    ("dtype", "group", "d"), [(torch.bfloat16, 7, 64), (torch.float16, 4, 128), (torch.float32, 7, 64)]
)
def test_decode_attention(launches, arch, dtype, group, d):
    check_decode_attention(launches, arch, dtype, group, d)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "d"), [(1, 64), (1, 128), (8, 80), (5, 128), (16, 256), (71, 64)])
def test_decode_attention_at_other_shapes(launches, arch, dtype, group, d):
    check_decode_attention(launches, arch, dtype, group, d)


def check_multi_lora(launches: list[Launch], arch: str, dtype: torch.dtype, ranks: list[int], size: int = 4096) -> None:
    """Every kernel of both passes, each for both factors."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, d_x = empty(64, size), empty(64, size)
    factors = [empty(rank, size) for rank in ranks], [empty(size, rank) for rank in ranks]
    rest = empty(64, dtype=torch.int64), None, 2.0
    multi_lora.multi_lora_(d_x, x, *factors, *rest)
    multi_lora.multi_lora_backward(d_x, *factors, d_x, x, *factors, *rest)
    assert len(launches) == 7
    for launch in launches[:2] + launches[3:]:
        kernel = compiled(launch, arch)
        assert_fits(kernel, arch, most_registers=256)
        if arch.startswith("sm") and size % 16 == 0 and dtype is not torch.float32:
            assert re.search("mma", kernel.asm["ptx"]), "no matrix unit"
            if all(rank % 8 == 0 for rank in ranks):
                assert not re.search(r"ld\.global\.[bu](8|16)\b", kernel.asm["ptx"]), "narrow loads"


@pytest.mark.parametrize(("dtype", "ranks"), [(torch.bfloat16, [8, 16]), (torch.float32, [16])])
def test_multi_lora(launches, arch, dtype, ranks):
    check_multi_lora(launches, arch, dtype, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4096, 1134])
@pytest.mark.parametrize("ranks", [[32, 64], [256], [5, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_multi_lora_at_other_shapes(launches, arch, dtype, ranks, size):
    check_multi_lora(launches, arch, dtype, ranks, size)
