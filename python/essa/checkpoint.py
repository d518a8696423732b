"""A run on disk: `run.json` says what it is, `history.jsonl` what happened. Together they rebuild the search exactly.

`run.json` is written when a run starts or is resumed. `history.jsonl` grows by one line a generation (prompts, rewards) and one an evaluation;
the search state itself is never stored, because asking and telling again from the recorded rewards brings it back bit by
bit. Each line carries a digest of itself and of everything before it, starting from the digest of the run's identity,
so an altered, reordered or foreign line is noticed. A process that dies while writing leaves a last line without its
newline: it is dropped, and its generation is done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from essa.config import InputError

FORMAT = 1
RUN_FILE, HISTORY_FILE = "run.json", "history.jsonl"
LOCK_FILE = ".lock"
COMMAND_FILE = "trdpo.json"
"""Holds the options of `essa trdpo`, so that a resumed run need not be told them again."""
RESULTS = ("adapter", "model", COMMAND_FILE, RUN_FILE)
SYNC_SECONDS = 1.0


class SaveError(InputError):
    """The run could not be written, as when the disk is full. What was written before is intact; it can be resumed."""


class Run:
    """An open run directory, locked against a second process.

    Attributes:
        directory: the folder.
        identity: what must stay the same for the history to mean anything.
        about: everything else worth knowing: versions, machine, the command.
        records: the verified lines of the history, without their digests.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], about: dict[str, Any]) -> None:
        self.directory, self.identity, self.about = directory, identity, about
        self.records: list[dict[str, Any]] = []
        self._digest_of_identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._digest = self._digest_of_identity
        self._size = 0
        self._synced = 0.0
        self._file: int | None = None

    @staticmethod
    def refuse_existing(directory: str | Path) -> None:
        """Raise `InputError` if a new run cannot go into this folder."""
        refuse_existing(Path(directory), RUN_FILE, HISTORY_FILE)

    @classmethod
    def create(cls, directory: str | Path, identity: dict[str, Any], about: dict[str, Any]) -> Run:
        """Start a run in a folder that holds none."""
        cls.refuse_existing(directory)
        directory = Path(directory)
        run = cls(directory, json.loads(json.dumps(identity)), json.loads(json.dumps(about, default=str)))
        make_folder(directory)
        run._write()
        run._open()
        return run

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Read and verify a run, without locking it.

        Raises:
            InputError: there is no run, or one of its files is damaged or belongs to another run.
        """
        directory = Path(directory)
        path = directory / RUN_FILE
        if not path.is_file():
            raise InputError(f"no run to resume in {str(directory)!r}: it has no {RUN_FILE}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{str(path)!r} is damaged: {error}") from error
        if (
            not isinstance(content, dict)
            or not {"format", "digest"} <= content.keys()
            or not all(isinstance(content.get(part), dict) for part in ("identity", "about"))
        ):
            raise InputError(f"{str(path)!r} does not describe a run of this program")
        if content["format"] != FORMAT:
            raise InputError(f"{str(path)!r} has format {content['format']!r}, this version reads format {FORMAT}")
        run = cls(directory, content["identity"], content["about"])
        if run._digest != content["digest"]:
            raise InputError(f"{str(path)!r} was altered: its identity does not match its digest")
        run._read_history()
        return run

    @property
    def command(self) -> dict[str, Any]:
        """The options of the command that started the run; none where it was started from Python. No digest covers them."""
        command = self.about.get("command", {})
        if not isinstance(command, dict):
            raise InputError(f"{str(self.directory / RUN_FILE)!r} is damaged: its command is {command!r}")
        return command

    @classmethod
    def resume(cls, directory: str | Path, identity: dict[str, Any], about: dict[str, Any]) -> Run:
        """Read, verify and lock a run that has this identity, and note how it goes on."""
        run = cls.read(directory)
        differences = _differences(run.identity, json.loads(json.dumps(identity)))
        if differences:
            raise InputError(
                f"the run in {str(directory)!r} cannot be resumed with other settings: " + "; ".join(differences)
            )
        run._open()
        run.about = json.loads(json.dumps({**run.about, **about}, default=str))
        run._write()
        return run

    def append(self, record: dict[str, Any]) -> None:
        """Add one line. It survives the process at once, and the machine after at most `SYNC_SECONDS`."""
        body = json.dumps(record, allow_nan=False, separators=(",", ":"))
        self._digest = _chain(self._digest, body)
        line = f'{body[:-1]},"digest":"{self._digest}"}}\n'.encode()
        assert self._file is not None, "append needs a run that was created or resumed"
        os.ftruncate(self._file, self._size)
        written = 0
        while written < len(line):
            written += os.pwrite(self._file, line[written:], self._size + written)
        self._size += len(line)
        self.records.append(json.loads(body))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _write(self) -> None:
        content = {"format": FORMAT, "digest": self._digest_of_identity, "identity": self.identity, "about": self.about}
        write_atomically(self.directory / RUN_FILE, json.dumps(content, indent=2) + "\n")

    def _open(self) -> None:
        self._file = os.open(self.directory / HISTORY_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(self._file, self.directory)
        except InputError:
            os.close(self._file)
            self._file = None
            raise

    def _read_history(self) -> None:
        path = self.directory / HISTORY_FILE
        content = path.read_bytes() if path.is_file() else b""
        *lines, _torn = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                digest = record.pop("digest")
                body = json.dumps(record, allow_nan=False, separators=(",", ":"))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(f"{str(path)!r} is damaged at line {number}: {error}") from error
            self._digest = _chain(self._digest, body)
            if digest != self._digest:
                raise InputError(f"{str(path)!r} line {number} was altered or belongs to another run")
            self.records.append(record)
            self._size += len(line) + 1


def _chain(digest: str, body: str) -> str:
    return hashlib.sha256(f"{digest} {body}".encode()).hexdigest()[:16]


def _differences(recorded: Any, given: Any, name: str = "") -> list[str]:
    if isinstance(recorded, dict) and isinstance(given, dict):
        return [
            difference
            for key in sorted(recorded.keys() | given.keys())
            for difference in _differences(recorded.get(key), given.get(key), f"{name} {key}".strip())
        ]
    return [] if recorded == given else [f"{name} was {recorded!r}, now {given!r}"]


def refuse_existing(directory: Path, *run_files: str) -> None:
    """Raise `InputError` if a new run cannot go into a folder: it holds one, or what one of any kind would overwrite.

    Args:
        run_files: what a run of the new one's kind, which could be resumed, is known by.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir {str(directory)!r} is not a folder")
    if any((directory / name).exists() for name in run_files):
        raise InputError(
            f"output_dir {str(directory)!r} already holds a run; resume it with resume_from_checkpoint, "
            "or choose another output_dir"
        )
    for name in RESULTS:
        if (directory / name).exists():
            raise InputError(
                f"output_dir {str(directory)!r} holds {name!r} already, which is not overwritten; choose another output_dir"
            )


def read_command(folder: Path) -> dict[str, Any]:
    """The options that the run of `essa trdpo` in a folder was started with.

    Raises:
        InputError: there is no such run, or its file is damaged.
    """
    path = folder / COMMAND_FILE
    if not path.is_file():
        raise InputError(f"no run to resume in {str(folder)!r}: it has no {COMMAND_FILE}")
    try:
        command = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(command, dict):
        raise InputError(f"{str(path)!r} is damaged: it must hold an object of options, got {type(command).__name__}")
    return command


def check_resumed_folder(resumed: str | Path, output_dir: Path) -> None:
    """Raise `InputError` unless a run goes on in its own folder."""
    if Path(resumed).resolve() != output_dir.resolve():
        raise InputError(
            f"resume_from_checkpoint must be the run's own output_dir {str(output_dir)!r}, got {str(resumed)!r}"
        )


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run's folder. Raises `InputError` if there is one."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(lock, folder)
        yield
    finally:
        os.close(lock)


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"output_dir {str(folder)!r} is in use by another process") from error


def make_folder(path: Path, argument: str = "output_dir") -> None:
    """Make a folder and its parents. Raises `InputError` if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{argument} {str(path)!r} cannot be made: {error.strerror}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either there in full or not at all, also after a power cut."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    _sync_folder(path.parent)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder that appears whole or not at all. One that is there already makes place for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        fresh = Path(scratch, path.name)
        fresh.mkdir()
        fill(fresh)
        if path.exists():
            shutil.rmtree(path)
        os.replace(fresh, path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
