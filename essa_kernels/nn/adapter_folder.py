"""Writing a PEFT adapter folder so that a reader finds whole files, whenever the writer dies."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor


def write_adapter_folder(model: Any, adapter_name: str, state: dict[str, Tensor], folder: Path) -> None:
    """Write ``state`` and the adapter's configuration: a new folder in one step, or file by file over an old one.

    Raises:
        FileExistsError: ``folder`` is a file.
    """
    from safetensors.torch import save_file

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir must be a folder, {str(folder)!r} is a file")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        written = scratch / folder.name
        written.mkdir()
        _saved_config(model, adapter_name).save_pretrained(str(written))
        save_file(state, written / "adapter_model.safetensors", metadata={"format": "pt"})
        for file in written.iterdir():
            _flush(file)
        if folder.exists():
            for file in written.iterdir():
                os.replace(file, folder / file.name)
            _flush(folder)
        else:
            os.replace(written, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(scratch)


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
