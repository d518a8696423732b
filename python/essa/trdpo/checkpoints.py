"""Checkpoints of a run of TR-DPO, as transformers' Trainer lays them out: `output_dir/checkpoint-STEP`.

Before a run goes on from one it is read in full: a file that is cut short or altered is named, and the checkpoint before
is taken. Weights are read as safetensors; of the optimiser, the schedule and the random states, which torch loads by
`weights_only`, the archive's checksums are. The trainer would go on without a file that is missing: it must not be.
"""

from __future__ import annotations

import itertools
import json
import logging
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from essa.config import InputError
from essa.trdpo.reference import STATE_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

NUMBERED = re.compile(r"checkpoint-[0-9]+")
RANDOM_STATE = re.compile(r"rng_state(?:_([0-9]+))?\.pth")
"""Of one process, or of one of several."""


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """Those that were written to the end, by step: the trainer's state is the last file."""
    return sorted((path for path in _numbered(folder) if (path / TRAINER_STATE_NAME).is_file()), key=step_of)


def parts_of_checkpoints(folder: str | Path) -> list[Path]:
    """Those that were not written to the end, by step. A link is none: the trainer makes folders."""
    folders = [path for path in _numbered(folder) if not path.is_symlink()]
    return sorted((path for path in folders if not (path / TRAINER_STATE_NAME).is_file()), key=step_of)


def _numbered(folder: str | Path) -> list[Path]:
    """The folders named as the trainer names them. Others are the user's."""
    named = [path for path in Path(folder).glob("checkpoint-*") if NUMBERED.fullmatch(path.name)]
    return [path for path in named if path.is_dir()]


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
    more = sorted(checkpoint.glob(f"*/{ADAPTER_NAME}"))
    for path in (*sorted(checkpoint.iterdir()), *more):
        read = READERS.get(path.suffix)
        try:
            if read is not None:
                read(path)
        except (OSError, ValueError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.relative_to(checkpoint)} is damaged: {error}"
    missing = _missing_weights(checkpoint)
    if missing is None and not _of_the_model_only(checkpoint):
        missing = _missing_state(checkpoint)
    return None if missing is None else f"it has no {missing}"


def _missing_weights(checkpoint: Path) -> str | None:
    """Which file of the policy's weights is not there: its adapters', the model's, or one of the model's parts."""
    # An adapter that is not PEFT's default one is in a folder of its name.
    adapters = [
        path.parent for path in (*checkpoint.glob(ADAPTER_CONFIG_NAME), *checkpoint.glob(f"*/{ADAPTER_CONFIG_NAME}"))
    ]
    for folder in adapters:
        if not (folder / ADAPTER_NAME).is_file():
            return str((folder / ADAPTER_NAME).relative_to(checkpoint))
    if adapters or any((checkpoint / name).is_file() for name in (ADAPTER_NAME, SAFE_WEIGHTS_NAME)):
        return None
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return f"{ADAPTER_NAME}, {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}"
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return next((part for part in parts if not (checkpoint / part).is_file()), None)


def _missing_state(checkpoint: Path) -> str | None:
    """Which file of the optimiser, the schedule and the random states is not there."""
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (checkpoint / name).is_file():
            return name
    found = [match[1] for path in checkpoint.iterdir() if (match := RANDOM_STATE.fullmatch(path.name))]
    if None in found:
        return None
    processes = {int(number) for number in found}
    lacks = next((number for number in range(max(processes, default=-1)) if number not in processes), None)
    if lacks is not None:
        return f"rng_state_{lacks}.pth"
    return None if processes else "rng_state.pth"


def _of_the_model_only(checkpoint: Path) -> bool:
    """Whether a run's arguments had `save_only_model`. They are a pickle: its text is read, nothing in it is run."""
    try:
        with zipfile.ZipFile(checkpoint / TRAINING_ARGS_NAME) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            codes = [(code.name, value) for code, value, _ in pickletools.genops(archive.read(pickled))]
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return False
    told = [code for code in codes if "PUT" not in code[0] and code[0] != "MEMOIZE"]
    return any(value == "save_only_model" and after == "NEWTRUE" for (_, value), (after, _) in itertools.pairwise(told))


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
    if path.name == SAFE_WEIGHTS_INDEX_NAME:
        parts = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError("it names no files")
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
