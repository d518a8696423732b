"""Checkpoints of a run of TR-DPO, as transformers' Trainer lays them out: `output_dir/checkpoint-STEP`."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """Those that were written to the end, by step: the trainer's state is the last file."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])
