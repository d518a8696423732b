"""A population attached to a model: what the forward of a LoRA layer becomes while it is attached."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import svd_lora, svd_lora_expand_, svd_lora_linear, svd_lora_shrink
from .factors import Factors
from .fused import Forward, fused_base

# Layers of one module that its forward gives the same tensor.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


class Population:
    """Which rows of the batch belong to which member. Made by a parametrisation's ``attach``."""

    def __init__(self, members: int) -> None:
        self.members = members
        self._rows = 0
        self._offsets: Tensor | None = None
        self._scaled: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def assign(self, offsets: Tensor) -> None:
        """Say whose row is whose; to be called before the first forward and whenever the batch changes.

        Args:
            offsets: [members + 1], int64: member m owns the sequences offsets[m] .. offsets[m + 1] - 1 of the batch.
                Starts with 0, never descends, ends with the number of sequences; members may own none.

        Raises:
            ValueError: offsets are not that.
        """
        if not isinstance(offsets, Tensor) or offsets.dtype is not torch.int64 or offsets.dim() != 1:
            raise ValueError(f"offsets must be a tensor of shape [members + 1] and dtype torch.int64, got {offsets!r}")
        if offsets.shape[0] != self.members + 1:
            raise ValueError(f"offsets must have shape [members + 1] = [{self.members + 1}], got {list(offsets.shape)}")
        offsets = offsets.to("cpu", copy=True)
        if offsets[0] != 0 or (offsets.diff() < 0).any():
            raise ValueError(f"offsets must start with 0 and never descend, got {offsets.tolist()}")
        self._offsets = offsets
        self._rows = int(offsets[-1])
        self._scaled.clear()

    def offsets_for(self, x: Tensor) -> Tensor:
        """The offsets of the tokens in x [batch, sequence, d] or [batch * sequence, d], on x's device."""
        key = (x.shape[:-1], x.device)
        scaled = self._scaled.get(key)
        return self._scale(*key) if scaled is None else scaled

    def _scale(self, shape: torch.Size, device: torch.device) -> Tensor:
        if self._offsets is None:
            raise RuntimeError("population.assign(offsets) must be called before the model's forward")
        tokens = shape.numel()
        flat = len(shape) < 2  # the model has merged the batch with the sequence
        if (tokens % self._rows if self._rows else tokens) if flat else shape[0] != self._rows:
            batch = f"{tokens} tokens" if flat else f"{shape[0]} sequences"
            raise ValueError(
                f"offsets must cover the batch: they end with {self._rows} sequences, the batch has {batch}"
            )
        length = tokens // self._rows if self._rows else 0
        scaled = self._scaled[shape, device] = (self._offsets * length).to(device)
        return scaled


class Attaching:
    """Replacing forwards, once at a time."""

    _attached = False

    @contextlib.contextmanager
    def _replaced(
        self, population: Population, forwards: Sequence[tuple[str, nn.Module, Forward]]
    ) -> Iterator[Population]:
        """Give each named module its forward for as long as the context lasts."""
        if self._attached:
            raise RuntimeError("attach: a population is attached already, leave it first")
        for name, module, _ in forwards:
            if _is_replaced(module):
                raise RuntimeError(f"attach: the forward of {name} has been replaced already, undo that first")
        before = [vars(module).get(_slot(module)) for _, module, _ in forwards]
        self._attached = True
        try:
            for _, module, forward in forwards:
                vars(module)[_slot(module)] = forward
            yield population
        finally:
            for own, (_, module, _) in zip(before, forwards, strict=True):
                if own is None:
                    vars(module).pop(_slot(module), None)
                else:
                    vars(module)[_slot(module)] = own
            self._attached = False


def _slot(module: nn.Module) -> str:
    """Where a module keeps its forward. A hook of accelerate's, which brings the input to the module's GPU, stays before it."""
    return "_old_forward" if "_hf_hook" in vars(module) else "forward"


def own_forward(module: nn.Module) -> Forward:
    """The forward that a population's takes the place of."""
    return getattr(module, _slot(module))


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is another than its class's and accelerate's."""
    if _slot(module) == "forward":
        return "forward" in vars(module)
    hooked, own = getattr(vars(module)["forward"], "func", None), vars(module)["_old_forward"]
    return (
        getattr(hooked, "__module__", None) != "accelerate.hooks"
        or getattr(own, "__func__", None) is not type(module).forward
    )


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """One LoRA layer of the model and where its singular values are among the coordinates of a member."""

    name: str
    module: Any
    factors: Factors
    columns_a: slice
    columns_b: slice


class Casts(dict[torch.dtype, tuple[Tensor, list[Tensor]]]):
    """Per dtype of the activations, made when first asked for: the layers' v_a stacked, [sum k_a, d_in], and each layer's
    u_b [d_out, k_b]."""

    def __init__(self, layers: Sequence[AdaptedLayer], device: torch.device) -> None:
        self.layers, self.device = layers, device

    def __missing__(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        v_a = [layer.factors.v_a for layer in self.layers]
        stacked = v_a[0] if len(v_a) == 1 else torch.cat(v_a)
        u_b = [layer.factors.u_b.to(self.device, dtype) for layer in self.layers]
        self[dtype] = stacked.to(self.device, dtype), u_b
        return self[dtype]


class Projections:
    """Adapted layers that are given the same tensor, or one layer alone: their part of the model that members share."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self.layers = layers
        self.core = torch.block_diag(*(layer.factors.core for layer in layers))
        self.ranges = _ranges([layer.factors.core for layer in layers])
        self._casts: Casts | None = None

    def casts(self, device: torch.device) -> Casts:
        """Kept from one population to the next, but on one device only: where the model is now."""
        if self._casts is None or self._casts.device != device:
            self._casts = Casts(self.layers, device)
        return self._casts

    def forwards(
        self, population: Population, values: Tensor, adapter_name: str
    ) -> list[tuple[str, nn.Module, Forward]]:
        """Each layer, by name, with its forward for singular values [members, size], LoRA's scaling folded in."""
        device = self.layers[0].module.lora_A[adapter_name].weight.device
        s_a = torch.cat([values[:, layer.columns_a] for layer in self.layers], 1).to(device)
        s_b = torch.cat([values[:, layer.columns_b] for layer in self.layers], 1).to(device)
        shrink = Shrink(population, self, device, self.core.to(device), s_a, s_b)
        found: list[tuple[str, nn.Module, Forward]] = []
        for position, layer in enumerate(self.layers):
            base_layer = layer.module.base_layer
            alone = len(self.layers) == 1
            forward = lone_forward(base_layer, shrink) if alone else shared_forward(base_layer, shrink, position)
            make_fused = functools.partial(fused_forward, base_layer, shrink, position)
            found.append((layer.name, layer.module, fused_base(base_layer, forward, make_fused)))
        return found


class Shrink:
    """The half of `svd_lora` up to u_b, computed once for all projections of the same tensor.

    The first projection to see a tensor computes every projection's h, the others take theirs. That they see the same
    tensor for the same rows is checked and not assumed: a projection that sees another one starts anew with it. So is
    that it has not changed meanwhile, but for inference tensors, which do not count their changes. The tensor is held
    until the last projection has taken its h.
    """

    def __init__(
        self,
        population: Population,
        projections: Projections,
        device: torch.device,
        core: Tensor,
        s_a: Tensor,
        s_b: Tensor,
    ) -> None:
        self.offsets_for = population.offsets_for
        self.casts = projections.casts(device)
        self.core, self.s_a, self.s_b = core, s_a, s_b
        self.ranges = projections.ranges
        self.x: Tensor | None = None
        self.offsets: Tensor | None = None
        self.version: int | None = None
        self.h: dict[int, Tensor] = {}

    def take(self, position: int, x: Tensor) -> Tensor:
        """h [rows, k_b], float32, of one projection."""
        offsets = self.offsets_for(x)
        same = x is self.x and offsets is self.offsets and _version(x) == self.version
        if not same or position not in self.h:
            self._compute(x, offsets)
        h = self.h.pop(position)
        if not self.h:
            self.x = self.offsets = None
        return h

    def _compute(self, x: Tensor, offsets: Tensor) -> None:
        v_a, _ = self.casts[x.dtype]
        h = svd_lora_shrink(x, v_a, self.core, self.s_a, self.s_b, offsets)
        self.h = {position: h[:, of_b] for position, (_, of_b) in enumerate(self.ranges)}
        self.x, self.offsets, self.version = x, offsets, _version(x)


def _ranges(cores: Sequence[Tensor]) -> list[tuple[slice, slice]]:
    """Where the ranks of A and of B of each core are in the block-diagonal one."""
    ranges, end_a, end_b = [], 0, 0
    for core in cores:
        start_a, start_b, end_a, end_b = end_a, end_b, end_a + core.shape[1], end_b + core.shape[0]
        ranges.append((slice(start_a, end_a), slice(start_b, end_b)))
    return ranges


def _version(x: Tensor) -> int | None:
    """Counts the in-place changes of a tensor; inference tensors have no such count."""
    return None if x.is_inference() else x._version


def shared_forward(base_layer: nn.Module, shrink: Shrink, position: int) -> Forward:
    casts, take = shrink.casts, shrink.take

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base_layer(x, *args, **kwargs)
        _, u_b = casts[y.dtype]
        return svd_lora_expand_(y, take(position, x), u_b[position])

    return forward


def lone_forward(base_layer: nn.Module, shrink: Shrink) -> Forward:
    casts, core, s_a, s_b, offsets_for = shrink.casts, shrink.core, shrink.s_a, shrink.s_b, shrink.offsets_for

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = base_layer(x, *args, **kwargs)
        v_a, (u_b,) = casts[x.dtype]
        if y.dtype is x.dtype:
            return svd_lora(x, v_a, core, u_b, s_a, s_b, offsets_for(x), y)
        h = svd_lora_shrink(x, v_a, core, s_a, s_b, offsets_for(x))
        return svd_lora_expand_(y, h, casts[y.dtype][1][0])

    return forward


def fused_forward(base_layer: Any, shrink: Shrink, position: int) -> Callable[[Tensor], Tensor]:
    """One projection and its base layer in one kernel, which makes its own h."""
    casts, offsets_for, (of_a, of_b) = shrink.casts, shrink.offsets_for, shrink.ranges[position]
    core, s_a, s_b = shrink.core[of_b, of_a], shrink.s_a[:, of_a], shrink.s_b[:, of_b]
    spectra = core.contiguous(), s_a.contiguous(), s_b.contiguous()

    def forward(x: Tensor) -> Tensor:
        v_a, u_b = casts[x.dtype]
        own_core, own_s_a, own_s_b = spectra
        return svd_lora_linear(
            x, base_layer.weight, v_a[of_a], own_core, u_b[position], own_s_a, own_s_b, offsets_for(x), base_layer.bias
        )

    return forward


def group(layers: Sequence[AdaptedLayer]) -> list[Projections]:
    """The layers, those that by their names are given the same tensor together."""
    groups: dict[Any, list[AdaptedLayer]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        family = next((family for family in SHARED_INPUT if leaf in family), leaf)
        groups.setdefault((parent, family, layer.factors.v_a.shape[1]), []).append(layer)
    return [Projections(group) for group in groups.values()]
