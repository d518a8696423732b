"""Batches whose rows belong to members, and the members' noise as every op draws it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from essa_kernels import NoiseKey, gaussian, rademacher

KEY = NoiseKey(2**63 + 2026, generation=2**31 + 3, site=6)
LAST = 2**33 - 1

# members, rows of each, d_in, d_out, rank
CASES = {
    "one of everything": ([4], [1], 1, 1, 1),
    "pairs": ([0, 1, 2, 3], [3, 8, 1, 40], 1134, 129, 8),
    "one row each, any order": ([*range(64, 0, -1), LAST], [1] * 65, 129, 65, 8),
    "ragged, pairs apart": ([9, LAST, 3, 8, 2, LAST - 1, 20], [2, 0, 7, 5, 0, 3, 1], 127, 200, 5),
    "rows of several tiles": ([7, 6, 1], [4, 2, 6], 4097, 2050, 3),
    "large rank": ([1, 0], [33, 2], 64, 96, 33),
    "many rows": ([5, 4], [290, 30], 63, 33, 4),
    "empty groups first": ([3, 2, 0, 1], [0, 0, 0, 9], 33, 31, 16),
}


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def noise(shape: tuple[int, int], distribution: str, site: int, member: int) -> Tensor:
    """By the reference, which the tests of the noise hold to the contract; float64."""
    draw = {"gaussian": gaussian, "rademacher": rademacher}[distribution]
    return draw(shape, KEY.at(site=site), member, backend="reference").double()


def groups(members: Tensor, offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(member, its rows) of every group that has rows."""
    for member, (first, last) in zip(members.tolist(), itertools.pairwise(offsets.tolist()), strict=True):
        if first < last:
            yield member, slice(first, last)
