"""Writing a folder of weights so that a reader finds whole files, whenever the writer dies."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


def write_adapter_folder(model: Any, adapter_name: str, state: dict[str, Tensor], folder: Path) -> None:
    """Write ``state`` and the adapter's configuration as a folder, as `write_folder` does.

    Raises:
        FileExistsError: ``folder`` is a file.
    """
    from safetensors.torch import save_file

    def fill(written: Path) -> None:
        _saved_config(model, adapter_name).save_pretrained(str(written))
        save_file(state, written / "adapter_model.safetensors", metadata={"format": "pt"})

    write_folder(folder, fill)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write files into a folder that appears, or takes the old one's place, in one step.

    Raises:
        FileExistsError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir must be a folder, {str(folder)!r} is a file")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        written = scratch / folder.name
        written.mkdir()
        fill(written)
        for file in written.iterdir():
            _flush(file)
        if folder.exists():
            ours = [file.name for file in written.iterdir()]
            _link_others(folder, written, ours)
            _flush(written)
            _exchange(written, folder)
        else:
            _flush(written)
            os.rename(written, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(scratch)


def _link_others(old: Path, new: Path, ours: list[str]) -> None:
    """Take along whatever else is in a folder, without copying its data where the file system can link."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    def left_out(folder: str, names: list[str]) -> list[str]:
        return ours if Path(folder) == old else []

    shutil.copytree(old, new, symlinks=True, ignore=left_out, copy_function=link, dirs_exist_ok=True)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change places: in one step on Linux, else in two."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    places = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old))
    if renameat2 is None or renameat2(*places, RENAME_EXCHANGE) != 0:
        aside = new.with_name(f"{old.name}.old")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise


def _saved_config(model: Any, adapter_name: str) -> Any:
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    for field, value in vars(config).items():
        if isinstance(value, set):  # in the order of the process's hash seed; the file is to be the same in every run
            setattr(config, field, sorted(value))
    return config


def _flush(path: Path) -> None:
    """Wait until a file's data, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
