"""Stored adapters in one batch, in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .products import product


def multi_lora_(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    scalings: Tensor | None,
    scaling: float,
) -> None:
    """y += scaling B (A x) with the adapter of every row; each id is that of rows / ids consecutive rows."""
    for rows, _, scale, a_k, b_k in _adapters(x, a, b, ids, scalings, scaling):
        y[rows] = (y[rows].float() + product(scale * product(x[rows], a_k.T), b_k.T)).to(y.dtype)


def multi_lora_backward(
    d_x: Tensor | None,
    d_a: Sequence[Tensor] | None,
    d_b: Sequence[Tensor] | None,
    d_y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ids: Tensor,
    scalings: Tensor | None,
    scaling: float,
) -> None:
    """The gradients that are not None, from d_y; d_x is added to."""
    d_a_of, d_b_of = (None if d is None else _one_by_one(d) for d in (d_a, d_b))
    for rows, k, scale, a_k, b_k in _adapters(x, a, b, ids, scalings, scaling):
        g = scale * product(d_y[rows], b_k)
        if d_x is not None:
            d_x[rows] = (d_x[rows].float() + product(g, a_k)).to(d_x.dtype)
        if d_a_of is not None:
            d_a_of[k].copy_(product(g.T, x[rows]))
        if d_b_of is not None:
            d_b_of[k].copy_(product(d_y[rows].T, scale * product(x[rows], a_k.T)))


def _adapters(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], ids: Tensor, scalings: Tensor | None, scaling: float
) -> Iterator[tuple[Tensor, int, Tensor | float, Tensor, Tensor]]:
    """Which rows are whose: (rows, k, its scaling, its a, its b) for every adapter k."""
    owners = ids.repeat_interleave(x.shape[0] // ids.shape[0])
    for k, (a_k, b_k) in enumerate(zip(_one_by_one(a), _one_by_one(b), strict=True)):
        yield (owners == k).nonzero()[:, 0], k, scaling if scalings is None else scaling * scalings[k], a_k, b_k


def _one_by_one(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The adapters' factors, one tensor each, whether they come so or stacked."""
    return list(tensors[0].unbind()) if tensors[0].dim() == 3 else list(tensors)
