"""Matrices on which implementations are compared bit by bit, and a program that draws them in a process of its own."""

from __future__ import annotations

import random
import sys

import torch

import essa_kernels
from essa_kernels import NoiseKey

COLUMNS = (1, 7, 63, 64, 65, 127, 129, 896, 1134, 2047, 2048, 2049, 4097)


def cases(seed: int, count: int = 40) -> list[tuple[str, tuple[int, int], NoiseKey, int]]:
    """(distribution, shape, key, member), every column count several times, the fields over their whole range."""
    choose = random.Random(seed)
    return [
        (
            ("gaussian", "rademacher")[i % 2],
            (choose.choice((1, 2, 3, 17, 100)), COLUMNS[i // 2 % len(COLUMNS)]),
            NoiseKey(choose.getrandbits(64), choose.getrandbits(32), choose.getrandbits(30)),
            choose.getrandbits(33),
        )
        for i in range(count)
    ] + [
        (d, shape, NoiseKey(seed, 1, 2), 3) for d in ("gaussian", "rademacher") for shape in ((1000, 601), (2, 300001))
    ]


def draw(seed: int, backend: str, device: str = "cpu") -> list[torch.Tensor]:
    """The cases' noise, on the CPU."""
    return [
        getattr(essa_kernels, distribution)(shape, key, member, device=device, backend=backend).cpu()
        for distribution, shape, key, member in cases(seed)
    ]


def different_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """In how many elements two float32 tensors differ."""
    return int((a.contiguous().view(torch.int32) != b.contiguous().view(torch.int32)).sum())


if __name__ == "__main__":
    torch.save(draw(int(sys.argv[1]), "cpu"), sys.argv[2])
