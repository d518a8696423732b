"""Reading rows: from a local file, or from a dataset on the Hugging Face hub."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from pathlib import Path
from typing import IO, Any

from essa.config import InputError
from essa.hub import offline_note, reach_hub

LONGEST_FIELD = 2**31 - 1  # of a CSV file; csv's own limit is 128 KiB
CONVERTED = "refs/convert/parquet"
"""Where the hub keeps what it made of a dataset that comes with a script: a folder for each configuration."""


def read_rows(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    data_dir: str | None = None,
    argument: str = "dataset_name",
) -> list[dict[str, Any]]:
    """Rows of a local .jsonl, .json, .csv (each also as .gz) or .parquet file, or of a dataset on the Hugging Face hub.

    Files are read as they are: a CSV answer `027` stays text. A .json file holds a list of objects.

    Args:
        split, config, data_dir: which rows of a dataset on the hub, as `datasets.load_dataset` takes them.
        argument: what the user knows ``name`` by, for messages.
    """
    path = Path(name)
    reader = next((reader for suffix, reader in READERS.items() if name.lower().endswith(suffix)), None)
    if path.is_file():
        if reader is None:
            raise InputError(f"{argument} {name!r}: unknown file type, must be one of {', '.join(READERS)}")
        if config is not None or data_dir is not None:
            raise InputError(
                f"{argument} {name!r} is a file: only a dataset on the hub has a configuration or a data_dir"
            )
        try:
            rows = reader(path, argument)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{argument} {name!r} cannot be read: {error}") from error
    elif reader is not None:
        raise InputError(f"{argument} {name!r}: no such file")
    elif path.is_dir():
        raise InputError(f"{argument} {name!r} is a folder, must be a file or the name of a dataset on the hub")
    else:
        rows = _read_hub(name, split, config, data_dir, argument)
    if not rows:
        raise InputError(f"{argument} {name!r} is empty")
    return rows


def _open(path: Path, newline: str | None = None) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _read_jsonl(path: Path, argument: str) -> list[dict[str, Any]]:
    rows = []
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:  # a number of too many digits is one too
                raise InputError(f"{argument} {str(path)!r}, line {number}: not JSON ({error})") from error
    return rows


def _read_json(path: Path, argument: str) -> list[dict[str, Any]]:
    try:
        with _open(path) as text:
            rows = json.load(text)
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise InputError(f"{argument} {str(path)!r}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise InputError(f"{argument} {str(path)!r}: must hold a list of objects, got {type(rows).__name__}")
    return rows


def _read_parquet(path: Path, argument: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{argument} {str(path)!r}: reading Parquet needs `pip install pyarrow`") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{argument} {str(path)!r}: not a Parquet file ({error})") from error


def _read_csv(path: Path, argument: str) -> list[dict[str, Any]]:
    csv.field_size_limit(LONGEST_FIELD)
    with _open(path, newline="") as lines:
        rows = list(csv.DictReader(lines))
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"{argument} {str(path)!r} row {number}: its fields are not those of the header")
    return rows


PLAIN = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
READERS = {**PLAIN, ".parquet": _read_parquet, **{f"{suffix}.gz": reader for suffix, reader in PLAIN.items()}}


def _read_hub(name: str, split: str, config: str | None, data_dir: str | None, argument: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{argument} {name!r} is not a local file; reading it from the hub needs `pip install datasets`"
        ) from error
    reach_hub(name)
    try:
        try:
            return list(datasets.load_dataset(name, config, data_dir=data_dir, split=split))
        except RuntimeError as error:
            # Nobody runs a dataset's script any more. OpenAI's TL;DR comes with one.
            if "scripts are no longer supported" not in str(error) or config is None or data_dir is not None:
                raise
            return list(datasets.load_dataset(name, data_dir=config, split=split, revision=CONVERTED))
    except Exception as error:
        parts = {"split": split, "configuration": config, "data_dir": data_dir}
        asked = ", ".join(f"{part} {value!r}" for part, value in parts.items() if value is not None)
        raise InputError(
            f"{argument} {name!r} is neither a local file nor a dataset the hub gave us ({asked}): {error}{offline_note()}"
        ) from error
