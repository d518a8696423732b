"""Finding the worker processes that a test has started, to kill them; other runs on this machine have theirs."""

from __future__ import annotations

import os
from pathlib import Path


def replicas(driver: int | None = None) -> list[int]:
    """Process ids of a driver's workers, by default this process's."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::Replica") and _descends(entry.parent, driver or os.getpid()):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def _descends(process: Path, ancestor: int) -> bool:
    """Ray's workers are children of its node's process, which is one of the driver's."""
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    parent = int(status["PPid"])
    return parent == ancestor or (parent > 1 and _descends(process.parent / str(parent), ancestor))
