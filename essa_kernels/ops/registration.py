"""Registration with torch and the argument checks the ops share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from operator import index

import torch
from torch import Tensor

from .. import dispatch, gpu
from ..noise import BLOCKS_PER_TILE, GAUSSIAN_TILE, MEMBER_END, RADEMACHER_TILE, SITE_END, NoiseKey

LIBRARY = torch.library.Library("essa", "DEF")  # a tenth of custom_op's cost per call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILES = {"gaussian": GAUSSIAN_TILE, "rademacher": RADEMACHER_TILE}
MAX_BLOCKS = 2**32
MAX_FLOAT32 = torch.finfo(torch.float32).max

Expected = tuple[str, Tensor, torch.dtype, str, tuple[int, ...]]
"""One argument and what it must be: name, tensor, dtype, the names of its dimensions, shape."""


def register(schema: str, run: Callable, fake: Callable) -> Callable:
    """Define an op with its computation on real tensors and on fake ones; return what calls it."""
    name = schema.partition("(")[0]
    # Inductor must not hand over other strides than the checks saw in eager mode.
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"essa::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.essa, name).default

    def call(*arguments):
        try:
            return op(*arguments)
        except (AttributeError, RuntimeError):
            _check_kinds(op, arguments)
            raise

    return call


def _check_kinds(op: torch._ops.OpOverload, arguments: Sequence) -> None:
    """Raise, by name, what torch says in terms of its own dispatch of an argument that is no dense tensor, or no text."""
    name = op._schema.name.removeprefix("essa::")
    name = name if name in dispatch.OPS else name.removesuffix("_")
    given = zip(op._schema.arguments, arguments, strict=False)
    # What is written to may be this package's, made as x is.
    for expected, value in sorted(given, key=lambda pair: pair[0].alias_info is not None):
        kind = str(expected.type)
        if value is None and kind.startswith("Optional"):
            continue
        if "Tensor" in kind:
            tensors = value if kind.startswith("List") else [value]
            for i, tensor in enumerate(tensors):
                _check_is_dense(name, expected.name if len(tensors) == 1 else f"{expected.name}[{i}]", tensor)
        elif "str" in kind and not isinstance(value, str):
            raise TypeError(f"{name}: {expected.name} must be a string, got {value!r}") from None


def _check_is_dense(op: str, name: str, value: object) -> None:
    check_are_tensors(op, **{name: value})
    assert isinstance(value, Tensor)
    if value.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, torch.strided, got {value.layout}") from None


def check_are_tensors(op: str, **arguments: object) -> None:
    """Raise unless every argument is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}") from None


def direct(op: str, backend: str | None, *arguments: object, has_backward: bool = False) -> bool | None:
    """Try an op that works in place as one compiled call, which is most of what few rows cost.

    An op without a backward leaves it to the checks to refuse inputs that require grad.

    Returns:
        True if it is computed; False if the arguments are as they must be, but another backend computes it, or the CPU
        was not asked; None if that is not known and the checks are to name what is wrong.
    """
    if torch.is_grad_enabled() and not has_backward:
        return None
    threads = torch.get_num_threads() if backend is None or backend == "cpu" else 0
    return dispatch.direct(op)(*arguments, threads)


# These checks name what is wrong; reading a property of a tensor costs about 0.1 us: each is read once.


def check_no_grad(op: str, **tensors: Tensor) -> None:
    """Raise if grad mode is on and an input requires grad: these ops have no backward."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, but {op} has no backward; call it under torch.no_grad() or detach {name}"
            )


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless the tensor has a supported dtype and at least one dimension."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} must have dtype float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got none")


def check_matrix(op: str, name: str, tensor: Tensor, dims: str, rows_at_least: int = 1) -> tuple[int, int]:
    """The sizes of a tensor that must be a matrix with columns and at least so many rows."""
    shape = tensor.shape
    if len(shape) != 2 or shape[0] < rows_at_least or shape[1] < 1:
        sizes = " and ".join(f"{dim} >= {size}" for dim, size in zip(dims.split(", "), (rows_at_least, 1), strict=True))
        raise ValueError(f"{op}: {name} must have shape [{dims}] with {sizes}, got {list(shape)}")
    return shape


def check_tensors(op: str, device: torch.device, *tensors: Expected) -> None:
    """Raise unless every tensor has its dtype and shape and is on ``device``."""
    for name, tensor, dtype, dims, shape in tensors:
        if tensor.dtype is not dtype:
            raise ValueError(f"{op}: {name} must have dtype {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} must have shape [{dims}] = {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_contiguous(op: str, **tensors: Tensor) -> None:
    """Raise unless every tensor is contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            _check_is_dense(op, name, tensor)
            raise ValueError(f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}")


def check_base_layer(op: str, x: Tensor, d_out: int, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless they are the weight and the bias of a linear layer that takes x."""
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    check_no_grad(op, **given)
    check_tensors(op, x.device, ("weight", weight, x.dtype, "d_out, d_in", (d_out, x.shape[-1])))
    if bias is not None:
        check_tensors(op, x.device, ("bias", bias, x.dtype, "d_out", (d_out,)))
    check_contiguous(op, **given)


def as_tensors(op: str, name: str, given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The tensors that an op with a list takes; a tensor is a list of one."""
    if isinstance(given, Tensor):
        return [given]
    tensors = list(given) if isinstance(given, Sequence) else [given]
    if wrong := [tensor for tensor in tensors if not isinstance(tensor, Tensor)]:
        raise TypeError(f"{op}: {name} must be a tensor or a sequence of tensors, got {type(wrong[0]).__name__}")
    if not tensors:
        raise ValueError(f"{op}: {name} must be a tensor or a sequence of at least one, got none")
    return tensors


def check_updated(op: str, name: str, tensors: Sequence[Tensor], site: int, sites_each: int = 1) -> None:
    """Raise unless the tensors of a list can be updated in place, tensor i with noise from site + 2 i."""
    for i, tensor in enumerate(tensors):
        numbered = name if len(tensors) == 1 else f"{name}[{i}]"
        check_no_grad(op, **{numbered: tensor})
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {numbered} must have dtype float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device.type != tensors[0].device.type:
            raise ValueError(f"{op}: {numbered} must be on {tensors[0].device.type}, got {tensor.device.type}")
        check_contiguous(op, **{numbered: tensor})
    last = site + 2 * (len(tensors) - 1) + sites_each - 1
    if last >= SITE_END:
        got = f"got {site} for {len(tensors)}"
        raise ValueError(
            f"{op}: key.site must leave a site below 2**30 for every tensor, site + 2 * i for {name}[i], {got}"
        )


def check_apart(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise if two tensors of a list share memory. Only on real tensors."""
    if len(tensors) == 1:
        return
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, i) for i, t in enumerate(tensors) if t.numel())
    for (_, end, i), (start, _, j) in itertools.pairwise(spans):
        if start < end:
            one, other = sorted((i, j))
            raise ValueError(f"{op}: {name} must not share memory, got {name}[{one}] and {name}[{other}] that do")


def on_one_device(op: str, tensors: Sequence[Tensor], site: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """A list cut where the device changes, each part with the site of its first tensor."""
    if len({tensor.device for tensor in tensors}) > 1 and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: a CUDA graph is captured on one GPU, the tensors are on several")
    for _, part in itertools.groupby(enumerate(tensors), lambda numbered: numbered[1].device):
        numbers, neighbours = zip(*part, strict=True)
        yield site + 2 * numbers[0], neighbours


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the noise matrix of a tensor."""
    if len(shape) == 1:
        return 1, shape[0]
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def check_offsets(op: str, offsets: Tensor, rows: int) -> None:
    """Raise unless offsets cover the rows. Only on the CPU: to look at a GPU's memory is to wait for it."""
    if not offsets.is_cpu:
        return
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows:
        got = f"{values[0]} and {values[-1]}"
        raise ValueError(f"{op}: offsets must start with 0 and end with the number of rows, {rows}, got {got}")
    if values != sorted(values):
        m = next(m for m in range(len(values) - 1) if values[m] > values[m + 1])
        raise ValueError(f"{op}: offsets must not descend, got {values[m]}, {values[m + 1]} at member {m}")


def rows_of_x(x: Tensor) -> Tensor:
    """x as [rows, d], a row's elements adjacent."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.is_contiguous() or rows.stride(1) == 1 else rows.contiguous()


def rows_of_y(op: str, y: Tensor) -> Tensor:
    """y as a view [rows, d] whose rows do not overlap and have adjacent elements."""
    if y.is_contiguous():
        return y if y.dim() == 2 else y.view(-1, y.shape[-1])
    try:
        rows = y.view(-1, y.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]):
        raise ValueError(f"{op}: y must be rows of adjacent elements at one stride, got strides {list(y.stride())}")
    return rows


def beyond_decode(rows: Tensor) -> bool:
    """Whether x or y has more rows than the kernels for decoding, a GPU's, are made for."""
    if not rows.is_cuda or not rows.dim():
        return False
    return rows.numel() > gpu.few_rows("cuda_kernels", rows.device) * rows.shape[-1]


def check_members(op: str, members: Tensor) -> None:
    """Raise unless the members are distinct and in range. Only on the CPU, like `check_offsets`."""
    if not members.is_cpu:
        return
    values = members.tolist()
    if values and not 0 <= min(values) <= max(values) < MEMBER_END:
        wrong = next(m for m in values if not 0 <= m < MEMBER_END)
        raise ValueError(f"{op}: members must be in 0 .. 2**33 - 1, got {wrong}")
    if len(set(values)) < len(values):
        twice = next(m for i, m in enumerate(values) if m in values[:i])
        raise ValueError(f"{op}: members must be distinct, got {twice} twice")


def check_key(op: str, key: NoiseKey, *, two_factors: bool = False) -> tuple[int, int, int]:
    """Seed, generation and site as an op takes them; its integers are int64."""
    if not isinstance(key, NoiseKey):
        raise TypeError(f"{op}: key must be a NoiseKey, got {key!r}")
    if two_factors and key.site % 2:
        raise ValueError(f"{op}: key.site must be even, the second factor draws from the next, got {key.site}")
    return key.seed - 2**64 if key.seed >= 2**63 else key.seed, key.generation, key.site


def check_distribution(op: str, distribution: str) -> str:
    """Raise unless it is the name of a distribution."""
    if not isinstance(distribution, str) or distribution not in TILES:
        raise ValueError(f"{op}: distribution must be gaussian or rademacher, got {distribution!r}")
    return distribution


def check_real(op: str, name: str, value: float) -> float:
    """Raise unless it is a number that float32 holds."""
    if not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not -MAX_FLOAT32 <= number <= MAX_FLOAT32:
        raise ValueError(f"{op}: {name} must be finite in float32, got {value!r}")
    return number


def check_size(op: str, name: str, value: int) -> int:
    """Raise unless it is an integer >= 1."""
    try:
        value = index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}") from None
    if value < 1:
        raise ValueError(f"{op}: {name} must be >= 1, got {value}")
    return value


def check_counter(op: str, name: str, shape: Sequence[int], rows: int, cols: int, distribution: str) -> None:
    """Raise unless a noise matrix of so many rows and columns, which ``name`` of ``shape`` asks for, fits the counter."""
    tile = TILES[distribution]
    if rows * -(-cols // tile) * BLOCKS_PER_TILE > MAX_BLOCKS:
        limit = f"rows * ceil(cols / {tile}) * {BLOCKS_PER_TILE} <= 2**32"
        raise ValueError(f"{op}: {name} must fit the counter, {limit}, got {list(shape)}")


def as_weights(op: str, weights: Tensor | Sequence[float]) -> Tensor:
    """The members' weights as a tensor [members], float32."""
    if not isinstance(weights, Tensor):
        try:
            weights = torch.tensor(list(weights), dtype=torch.float32)
        except (TypeError, ValueError, OverflowError):
            message = f"{op}: weights must be a float32 tensor or a sequence of numbers, got {weights!r}"
            raise TypeError(message) from None
    if weights.dtype is not torch.float32:
        raise ValueError(f"{op}: weights must have dtype torch.float32, got {weights.dtype}")
    if weights.dim() != 1 or weights.shape[0] < 1:
        raise ValueError(f"{op}: weights must have shape [members] with members >= 1, got {list(weights.shape)}")
    return weights


def check_weights(op: str, weights: Tensor, device: torch.device) -> None:
    """Raise unless weights can be used on a device."""
    check_no_grad(op, weights=weights)
    if weights.device.type != "cpu" and weights.device != device:
        allowed = "cpu" if device.type == "cpu" else f"cpu or {device}"
        raise ValueError(f"{op}: weights must be on {allowed}, got {weights.device}")


def fold_pairs(op: str, weights: Tensor, scale: float | None = None) -> Tensor:
    """(weights[2k] - weights[2k + 1]) * scale of every pair, float32; a missing last member weighs 0."""
    if weights.is_cpu and not weights.isfinite().all():
        m = int(weights.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"{op}: weights must be finite, got {float(weights[m])} for member {m}")
    if weights.shape[0] % 2:
        weights = torch.cat([weights, weights.new_zeros(1)])
    folded = weights[0::2] - weights[1::2]
    if weights.is_cpu and not folded.isfinite().all():
        k = int(folded.isfinite().logical_not().nonzero()[0])
        got = f"{float(weights[2 * k])} - {float(weights[2 * k + 1])} for members {2 * k} and {2 * k + 1}"
        raise ValueError(f"{op}: weights must have differences in their pairs that are finite in float32, got {got}")
    if scale is not None:
        folded *= scale
    return folded
