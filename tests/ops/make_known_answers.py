"""Run as a script, writes known_answers.json from the reference. The answers change only with NOISE_VERSION."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from essa_kernels import NOISE_VERSION, NoiseKey, es_update_, perturb_
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

UPDATED_SHAPES = [(3, 65), (2, 2100), (7,), (130, 1)]  # one list, tensor i at site + 2 i
UPDATED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UPDATE_KEY = NoiseKey(0x0123456789ABCDEF, 123456, 42)
SIGMAS = [0.02, 2.0**-130]  # the second leaves subnormal numbers where it meets a 0
WEIGHTS = [0.25, -1.5, 0.3, 0.3, -0.1, 0.7, 1e-3]  # a pair that folds to 0, a member without partner


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


def updates(backend: str, device: str = "cpu") -> Iterator[dict]:
    """The vectors of perturb_ and es_update_: lists of tensors whose start every dtype holds exactly."""
    for distribution in ("gaussian", "rademacher"):
        for name, dtype in UPDATED_DTYPES.items():
            common = {"distribution": distribution, "dtype": name}
            options = {"distribution": distribution, "backend": backend}
            for sigma in SIGMAS:
                t = perturb_(_start(dtype, device), UPDATE_KEY, 77777, sigma, **options)
                yield {"op": "perturb_", **common, "sigma": sigma, **summary(_flat(t))}
            t = es_update_(_start(dtype, device), UPDATE_KEY, WEIGHTS, **options)
            yield {"op": "es_update_", **common, **summary(_flat(t))}


def _start(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Multiples of 1/16 up to 3, every 101st a 0."""
    sizes = [torch.Size(shape).numel() for shape in UPDATED_SHAPES]
    values = [(torch.arange(size) * 37 % 101 - 50) / 16 for size in sizes]
    return [v.view(shape).to(device, dtype) for v, shape in zip(values, UPDATED_SHAPES, strict=True)]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def main() -> None:
    vectors = [answer(d, key, shape) for d in ("gaussian", "rademacher") for key in KEYS for shape in SHAPES]
    parts = {"vectors": vectors, "updates": list(updates("reference"))}
    lists = (f'"{name}": [\n' + ",\n".join(map(json.dumps, part)) + "\n]" for name, part in parts.items())
    PATH.write_text(f'{{"noise_version": {NOISE_VERSION}, {", ".join(lists)}}}\n')


if __name__ == "__main__":
    main()
