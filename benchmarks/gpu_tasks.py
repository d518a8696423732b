"""Tasks that processes share through a folder: one that dies or hangs loses nothing but the task it was at.

Without torch, so that whoever watches the processes cannot fail as they do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
WORKER = "ESSA_GPU_CHECK_WORKER"  # a process's name, in its environment
POLL_S = 0.2
KILLED_S = 5.0  # a process whose kernel hangs may outlive its end; it is waited for no longer than that

Found = dict[str, Any]
Work = Callable[[Found], None]
"""What a task does. What it puts into the dictionary is kept, also if it raises afterwards."""


@dataclass(frozen=True)
class Outcome:
    """How a task went: passed, failed or skipped; None as long as it has not ended."""

    result: str | None = None
    message: str = ""
    details: str = ""
    seconds: float = 0.0
    found: Found = field(default_factory=dict)


class Tasks:
    """Named tasks. A file says that one was begun, another how it ended; and one of each process what it is at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def announce(self, names: Iterable[str]) -> None:
        """Say which tasks there are. Every process may, if all say the same."""
        write(self.folder / "announced", list(names))

    def begin(self, name: str) -> bool:
        """Take a task, unless a process has already."""
        try:
            with self._file(name, "begun").open("x") as file:
                json.dump(name, file)
        except FileExistsError:
            return False
        write(self._at(os.environ.get(WORKER, "")), name)
        return True

    def end(self, name: str, outcome: Outcome) -> None:
        write(self._file(name, "ended"), asdict(outcome))

    def do(self, works: Sequence[tuple[str, Work]], after_failure: Callable[[], object]) -> None:
        """Do, in this order, all that no process has begun. What ``after_failure`` raises is not caught."""
        self.announce(name for name, _ in works)
        for name, work in works:
            if not self.begin(name):
                continue
            print(name, flush=True)
            start, found, message, details = time.monotonic(), Found(), "", ""
            try:
                work(found)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other tasks go on
                message, details = last_line("".join(traceback.format_exception_only(error))), traceback.format_exc()
            result = "failed" if details else "passed"
            self.end(name, Outcome(result, message, details, time.monotonic() - start, found))
            if details:
                after_failure()

    def outcomes(self) -> dict[str, Outcome | None]:
        """Of those announced, in order, and of others that were begun. None: not begun."""
        begun = [name for path in self.folder.glob("*.begun") if (name := read(path))]
        outcomes: dict[str, Outcome | None] = dict.fromkeys([*(read(self.folder / "announced") or ()), *sorted(begun)])
        for name in begun:
            outcomes[name] = Outcome(**(read(self._file(name, "ended")) or {}))
        return outcomes

    def at(self, worker: str) -> tuple[str | None, float] | None:
        """The task a process is at, None between two, and since when, by the clock of files. None: it has begun none."""
        path = self._at(worker)
        if not path.exists():
            return None
        name = read(path)
        return None if self._file(name, "ended").exists() else name, path.stat().st_mtime

    def _file(self, name: str, suffix: str) -> Path:
        return self.folder / f"{hashlib.sha1(name.encode()).hexdigest()}.{suffix}"

    def _at(self, worker: str) -> Path:
        return self.folder / f"at-{worker}"


def write(path: Path, value: object) -> None:
    """Whole or not at all, for those who read it meanwhile."""
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(json.dumps(value))
    written.replace(path)


def read(path: Path) -> Any:
    """What a file holds; None if it is not there, or empty yet."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


# Processes


@dataclass(frozen=True)
class Ended:
    """A process and its output. Its status is None if it was stopped."""

    status: int | None
    output: str
    seconds: float


class Process:
    """A program that is stopped together with all it has started, its output in a file."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> None:
        self.log, self.start, self.killed = log, time.monotonic(), 0.0
        with log.open("w") as output:
            self.program = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        self.killed = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.program.pid, signal.SIGKILL)

    def ended(self) -> Ended:
        """Of one that has ended or was killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.program.wait(max(0.0, self.killed + KILLED_S - time.monotonic()))
        status = None if self.killed else self.program.returncode
        return Ended(status, self.log.read_text(errors="replace"), time.monotonic() - self.start)


def run(command: Sequence[str | Path], limit_s: float, log: Path, **environment: str) -> Ended:
    """One program, for so long at most."""
    process = Process(command, log, environment)
    try:
        process.program.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
    except BaseException:
        process.kill()
        raise
    return process.ended()


@dataclass(frozen=True)
class Crew:
    """Processes of one command that share tasks. One that ends with status 0 has seen all of them begun."""

    command: Sequence[str | Path]
    tasks: Tasks
    workers: int
    environment: Mapping[str, str] = field(default_factory=dict)


class Worker(Process):
    """One process of a crew."""

    count = 0

    def __init__(self, crew: Crew) -> None:
        Worker.count += 1
        self.name, self.crew = str(Worker.count), crew
        super().__init__(crew.command, crew.tasks.folder / f"{self.name}.log", {**crew.environment, WORKER: self.name})

    def is_gone(self, task_s: float) -> bool:
        """True once it has ended; one that has been at a task for too long is killed."""
        status = self.program.poll()  # before what it has written is read, which is the last word then
        task, since = self.crew.tasks.at(self.name) or (None, 0.0)
        if status is None and (task is None or time.time() - since < task_s):
            return False
        if status is None:
            self.kill()
        if task is not None:
            why = f"its process ended with status {status}" if status is not None else f"not done after {task_s:.0f} s"
            self.crew.tasks.end(task, Outcome("failed", why))
        return True


def work(crews: Sequence[Crew], limit_s: float, task_s: float) -> list[tuple[Crew, Ended]]:
    """Have all tasks done, as far as the time goes; returns every process there was.

    One that dies or is at a task for too long has a successor, unless it has not begun any task.
    """
    end = time.monotonic() + limit_s
    ended: list[tuple[Crew, Ended]] = []
    working = [Worker(crew) for crew in crews for _ in range(crew.workers)]
    try:
        while working and time.monotonic() < end:
            time.sleep(POLL_S)
            for worker in [worker for worker in working if worker.is_gone(task_s)]:
                working.remove(worker)
                ended.append((worker.crew, worker.ended()))
                if ended[-1][1].status != 0 and worker.crew.tasks.at(worker.name):
                    working.append(Worker(worker.crew))
    finally:
        for worker in working:
            worker.kill()
    return ended + [(worker.crew, worker.ended()) for worker in working]
