"""What gives away columns of text that hold something else than their names say.

Two texts do not show which of them is the prompt, so only a dialogue's own marks are an error. The rest is counted, and worth
a warning where most rows look like it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from essa.config import InputError

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PAIR = ("chosen", "rejected")
ASKING = ("?", ":", "=")
"""What prompts end in, and answers hardly ever do."""


def check_turns(completions: dict[str, Any], where: str) -> None:
    """A completion that stands beside its prompt does not begin with the human's turn."""
    for column, text in completions.items():
        if isinstance(text, str) and text.startswith(HH_HUMAN):
            raise InputError(
                f"{where}: `{column}` begins with {HH_HUMAN!r}, as a prompt does; does it repeat the prompt (then leave "
                "`prompt` out), or are the columns swapped?"
            )


def repeats_prompt(prompt: Any, completions: Sequence[Any]) -> bool:
    """Whether every completion begins with its prompt, which would so be read twice."""
    head = prompt.strip() if isinstance(prompt, str) else ""
    return bool(head) and all(text.lstrip().startswith(head) for text in completions)


def looks_swapped(prompt: Any, completions: Sequence[Any]) -> bool:
    """Whether of a pair the chosen completion alone asks something, or stands at the head of the two other texts."""
    if not isinstance(prompt, str) or len(completions) != 2:
        return False
    chosen, rejected = (text.strip() for text in completions)
    asks = [text.endswith(ASKING) for text in (prompt.strip(), chosen, rejected)]
    return asks == [False, True, False] or all(text.startswith(chosen) for text in (prompt.strip(), rejected))


def check_scores(rows: list[Any], name: str) -> None:
    """Datasets that come with scores show whether chosen and rejected were swapped."""
    pairs = [[_number(row.get(f"score_{column}")) for column in PAIR] for row in rows if isinstance(row, dict)]
    scored = [(chosen, rejected) for chosen, rejected in pairs if chosen is not None and rejected is not None]
    lower = sum(chosen < rejected for chosen, rejected in scored)
    if lower > len(scored) / 2:
        raise InputError(
            f"{name}: score_chosen is below score_rejected in {lower} of {len(scored)} rows; are `chosen` and "
            "`rejected` swapped?"
        )


def _number(value: Any) -> float | None:
    """A score, which a CSV file has as text, or None where there is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
