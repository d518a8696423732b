"""Two ways to the same result, timed in turns in one process, so that whatever else the machine does meets both; and the
memory of a process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of ours and of the rival, and the quartiles of rival / ours over the rounds."""

    what: str
    rival: str
    ours_s: float
    rival_s: float
    ratio: tuple[float, float, float]
    as_share: bool = False

    def as_row(self) -> str:
        low, middle, high = self.ratio
        shown = f"{middle:.1%} ({low:.1%} - {high:.1%})" if self.as_share else f"{middle:.2f}x ({low:.2f} - {high:.2f})"
        return f"| {self.what} | {duration(self.ours_s)} | {self.rival} | {duration(self.rival_s)} | {shown} |"

    def as_dict(self) -> dict:
        return {
            "what": self.what,
            "rival": self.rival,
            "ours_s": self.ours_s,
            "rival_s": self.rival_s,
            "ratio_quartiles": self.ratio,
        }


@dataclass(frozen=True)
class Peak:
    """Bytes of memory of ours and of the rival at their peaks beyond the inputs; `left` of them are the results."""

    what: str
    rival: str
    ours: int
    rivals: int
    left: int

    def as_row(self) -> str:
        apart = f"{(self.ours - self.left) / (self.rivals - self.left):.3f}x"
        return (
            f"| {self.what}, peak | {size(self.ours)} | {self.rival} | {size(self.rivals)} | "
            f"{self.ours / self.rivals:.3f}x of its memory ({apart} beyond {size(self.left)} of results) |"
        )

    def as_dict(self) -> dict:
        return asdict(self)


def compare(
    what: str,
    ours: Callable[[], float],
    rival_name: str,
    rival: Callable[[], float],
    *,
    rounds: int,
    as_share: bool = False,
) -> Comparison:
    """Run both in turns, `rounds` times after one warm-up.

    Args:
        ours, rival: run the work once and return its seconds; see `timed`.
        as_share: show the ratio as a percentage: how much of the rival's speed ours has.
    """
    ours(), rival()
    times = [(ours(), rival()) for _ in range(rounds)]
    ratios = sorted(theirs / mine for mine, theirs in times)
    low, middle, high = statistics.quantiles(ratios, n=4)
    mine, theirs = (min(column) for column in zip(*times, strict=True))
    return Comparison(what, rival_name, mine, theirs, (low, middle, high), as_share)


def timed(work: Callable[[], object], calls: int = 1) -> Callable[[], float]:
    """Seconds per call of `work`."""

    def once() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls

    return once


def resident(field: str) -> int:
    """Bytes of this process by a line of its status: VmRSS now, VmHWM at the peak. Linux only.

    getrusage would count what the parent held when it started the process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def give_back_freed() -> None:
    """Give what this process has freed back to the system: kept, it would hide as much of what is taken next. glibc only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
