"""Tuning on request: other launch parameters for the kernels of one call, tried on the GPU at hand.

    found = tune(lambda: svd_lora(*operands, backend="triton"))
    Path("tuned.json").write_text(json.dumps(found))

and in a later process ``config.use(json.loads(Path("tuned.json").read_text()))``. Noise and updates have the same bits
under all parameters; products may sum in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import triton
from triton.errors import TritonError

from .config import IN_USE, Configs, use

Call = Callable[[], object]


def seconds_on_gpu(call: Call) -> float:
    """The median of many calls, with a cold cache."""
    return triton.testing.do_bench(call, return_mode="median") * 1e-3


def tune(call: Call, *, least_gain: float = 0.03, measure: Callable[[Call], float] = seconds_on_gpu) -> Configs:
    """Find faster launch parameters for the kernels that a call launches, and use them from here on.

    One parameter at a time is doubled or halved, stages one more or less; what gains enough is kept, until nothing does.
    What decides between kernels by size (names with min, max or least) is left alone: one size says nothing of it. What
    the GPU refuses, for want of registers or shared memory, counts as slow. Takes seconds to minutes, for compiling.

    Args:
        call: runs ops at the sizes to tune for, through the Triton backend; it is called many times.
        least_gain: the share of the time that a change must save, in [0, 1). Less is noise.
        measure: call -> seconds; by default the GPU's own time.

    Returns:
        What is better than `configs.json`, in its form; empty if nothing is. After an interruption all is as before.

    Raises:
        ValueError: ``least_gain`` is out of range, or the call launches no kernel that has parameters.
    """
    if not 0 <= least_gain < 1:
        raise ValueError(f"least_gain must be in [0, 1), got {least_gain!r}")
    IN_USE.clear()
    call()
    start = {key: dict(parameters) for key, parameters in IN_USE.items()}
    if not start:
        raise ValueError("call must launch one of this package's Triton kernels, it launched none")
    best = {key: dict(parameters) for key, parameters in start.items()}
    try:
        _climb(call, best, least_gain, measure)
    except BaseException:
        _use(start)
        raise
    _use(best)
    found: Configs = {}
    for (arch, kernel), parameters in best.items():
        if changed := {name: value for name, value in parameters.items() if value != start[arch, kernel][name]}:
            found.setdefault(arch, {})[kernel] = changed
    return found


def _climb(
    call: Call,
    best: dict[tuple[str, str], dict[str, int]],
    least_gain: float,
    measure: Callable[[Call], float],
) -> None:
    """Change ``best``, parameters by architecture and kernel, for as long as that gains."""
    fastest, gained = measure(call), True
    while gained:
        gained = False
        for key, parameters in best.items():
            for name, value in _neighbours(parameters):
                _use(best | {key: parameters | {name: value}})
                try:
                    seconds = measure(call)
                except TritonError:
                    seconds = math.inf
                if seconds < fastest * (1 - least_gain):
                    fastest, gained, parameters[name] = seconds, True, value


def _neighbours(parameters: dict[str, int]) -> list[tuple[str, int]]:
    """Single changes to try."""
    changes = []
    for name, value in parameters.items():
        if name == "num_stages":
            changes += [(name, value + 1), (name, value - 1)]
        elif not name.startswith(("min_", "max_", "least_")):
            changes += [(name, 2 * value), (name, value // 2)]
    return [(name, value) for name, value in changes if value >= 1]


def _use(parameters: dict[tuple[str, str], dict[str, int]]) -> None:
    for (arch, kernel), values in parameters.items():
        use({arch: {kernel: values}})
