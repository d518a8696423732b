"""A run's record says how it was started, but not whose code may run: whoever can write to its folder could name their own.

What brings in code is taken from the command line, or from a YAML file named there, and has to be given again on resuming.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from essa.config import InputError

BROUGHT_IN_BY = {"reward": ":", "parametrization": ":", "strategy": ":", "ray_address": ":", "attn_implementation": "/"}
"""Options, and what their values have in them where they name a module, a cluster that is sent and sends code, or a
kernel on the hub; built-in names have not."""


def brings_in_code(option: str, value: Any) -> bool:
    """Whether an option's value makes a command run code that is not its own."""
    if option == "trust_remote_code":
        return bool(value)
    return option in BROUGHT_IN_BY and BROUGHT_IN_BY[option] in str(value)


def check_recorded(recorded: dict[str, Any], directory: str) -> None:
    """Raise `InputError` if one of these options, known from the record of a run alone, brings in code."""
    if options := _options_with_code(recorded):
        raise InputError(
            f"resuming the run in {directory!r} would run code that only its record names; if you trust it, add: {options}"
        )


def resume_command(command: str, folder: str | Path, started_with: dict[str, Any]) -> str:
    """What to type in order to resume a run of `essa align` or `essa trdpo` that was started with these options."""
    options = _options_with_code(started_with)
    return f"essa {command} --resume_from_checkpoint {shlex.quote(str(folder))}" + (options and f" {options}")


def _options_with_code(options: dict[str, Any]) -> str:
    words = []
    for name, value in options.items():
        if value is True and brings_in_code(name, value):
            words.append(f"--{name}")
        elif brings_in_code(name, value):
            words += [f"--{name} {shlex.quote(str(part))}" for part in (value if isinstance(value, list) else [value])]
    return " ".join(words)
