"""Run as a script, writes known_answers.json from the reference. The answers change only with NOISE_VERSION."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from essa_kernels import NOISE_VERSION
from essa_kernels.noise import STRATEGY_SITE
from essa_kernels.reference import noise

PATH = Path(__file__).with_name("known_answers.json")

# (seed, generation, site, member)
KEYS = [
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (42, 7, 3, 10),
    (0x0123456789ABCDEF, 123456, STRATEGY_SITE, 77777),
    (2**64 - 1, 2**32 - 1, 2**30 - 1, 2**33 - 1),
]
SHAPES = [(1, 1), (1, 64), (3, 65), (2, 200), (5, 63), (129, 7), (7, 1134), (2, 2048), (3, 2049), (1, 100003)]
SAMPLE = 8


def answer(distribution: str, key: tuple[int, int, int, int], shape: tuple[int, int]) -> dict:
    """One vector: the bits of the first and last values of the matrix, and the digest of all."""
    out = torch.empty(shape)
    getattr(noise, distribution)(out, *key)
    return {"distribution": distribution, "key": list(key), "shape": list(shape), **summary(out)}


def summary(out: torch.Tensor) -> dict:
    """What is kept of a matrix: bits as hexadecimal, and SHA-256 of its little-endian float32."""
    bits = out.cpu().contiguous().view(torch.int32).flatten()
    ends = torch.cat([bits[:SAMPLE], bits[-SAMPLE:]]).tolist()
    return {
        "ends": " ".join(f"{word & 0xFFFFFFFF:08x}" for word in ends),
        "sha256": hashlib.sha256(bits.numpy().astype("<i4").tobytes()).hexdigest(),
    }


def main() -> None:
    vectors = [answer(d, key, shape) for d in ("gaussian", "rademacher") for key in KEYS for shape in SHAPES]
    lines = ",\n".join(json.dumps(vector) for vector in vectors)
    PATH.write_text(f'{{"noise_version": {NOISE_VERSION}, "vectors": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
