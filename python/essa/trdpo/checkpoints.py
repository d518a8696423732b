"""Checkpoints of a run of TR-DPO, as transformers' Trainer lays them out: `output_dir/checkpoint-STEP`.

Before a run goes on from one it is read in full: a file that is cut short or altered is named, and the checkpoint before
is taken. Weights are read as safetensors; of the optimiser, the schedule and the random states, which torch loads by
`weights_only`, the archive's checksums are.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from essa.config import InputError
from essa.trdpo.reference import STATE_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """Those that were written to the end, by step: the trainer's state is the last file."""
    numbered = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted((path for path in numbered if (path / TRAINER_STATE_NAME).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def last_sound_checkpoint(folder: str | Path) -> Path:
    """The last checkpoint that can be gone on from. Warns of damaged ones after it.

    Raises:
        InputError: there is none.
    """
    whole = whole_checkpoints(folder)
    for place, checkpoint in reversed(list(enumerate(whole))):
        found = damage(checkpoint)
        if found is None:
            return checkpoint
        if place:
            logger.warning("%s is left out: %s; going on from the checkpoint before it", checkpoint, found)
        else:
            raise InputError(
                f"no checkpoint in {str(folder)!r} can be resumed from; of the first, {checkpoint.name}, {found}. To start "
                "over choose another output_dir, or remove this one's checkpoints"
            )
    raise InputError(f"no checkpoint to resume in {str(folder)!r}; its run was to save one every save_steps steps")


def check_checkpoint(checkpoint: Path) -> None:
    """Raise `InputError` if a checkpoint cannot be gone on from."""
    found = damage(checkpoint)
    if found is not None:
        before = [path for path in whole_checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
        instead = f"; the checkpoint before it is {str(before[-1])!r}" if before else ""
        raise InputError(f"checkpoint {str(checkpoint)!r} cannot be resumed from: {found}{instead}")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    for name in (TRAINER_STATE_NAME, STATE_FILE, WEIGHTS_FILE):
        if not (checkpoint / name).is_file():
            return f"it has no {name}: it is none of this trainer's, or incomplete"
    if (checkpoint / OPTIMIZER_NAME).is_file() != (checkpoint / SCHEDULER_NAME).is_file():
        return f"it has only one of {OPTIMIZER_NAME} and {SCHEDULER_NAME}"
    for path in sorted(checkpoint.iterdir()):
        read = READERS.get(path.suffix)
        try:
            if read is not None:
                read(path)
        except (OSError, ValueError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} is damaged: {error}"
    return None


def _read_weights(path: Path) -> None:
    with safe_open(path, "pt") as weights:
        names = weights.keys()
        for name in names:
            if not weights.get_tensor(name).isfinite().all():
                raise ValueError(f"{name} is not finite")


def _read_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if (altered := archive.testzip()) is not None:
            raise ValueError(f"{altered} does not match its checksum")


def _read_json(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name not in (TRAINER_STATE_NAME, STATE_FILE):
        return
    if not isinstance(content, dict):
        raise TypeError(f"it must hold an object, got {type(content).__name__}")
    if path.name == TRAINER_STATE_NAME and content.get("global_step") != step_of(path.parent):
        raise ValueError(f"its global_step is {content.get('global_step')!r}")


READERS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _read_weights,
    ".pt": _read_archive,
    ".pth": _read_archive,
    ".json": _read_json,
}
