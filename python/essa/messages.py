"""What a driver and its workers tell each other: JSON with arrays of numbers set apart as bytes, compressed if that helps.

A message can be read by anyone and runs nothing. Every number comes back exactly: JSON writes the shortest text that reads
as the same float, and an array is sent in float32 only where that holds all of it.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np


def pack(body: dict[str, Any]) -> bytes:
    """A message that says ``body``, which may hold arrays of floats, however deep."""
    arrays: list[bytes] = []

    def apart(values: np.ndarray) -> dict[str, Any]:
        kind = "f4" if np.array_equal(values.astype("<f4"), values) else "f8"
        arrays.append(values.astype(f"<{kind}").tobytes())
        return {kind: values.shape}

    text = json.dumps(body, separators=(",", ":"), default=apart)
    plain = text.encode() + b"\n" + b"".join(arrays)
    return min(zlib.compress(plain), plain, key=len)


def unpack(message: bytes) -> dict[str, Any]:
    """What `pack` was given, its arrays in float64."""
    plain = message if message.startswith(b"{") else zlib.decompress(message)
    text, _, rest = plain.partition(b"\n")
    taken = 0

    def put_back(found: dict[str, Any]) -> Any:
        nonlocal taken
        kind, shape = next(iter(found.items()), ("", None))
        if kind not in ("f4", "f8") or not isinstance(shape, list):
            return found
        values = np.frombuffer(rest, f"<{kind}", math.prod(shape), taken)
        taken += values.nbytes
        return values.astype(np.float64).reshape(shape)

    return json.loads(text, object_hook=put_back)
