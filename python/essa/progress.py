"""Progress of a run: a live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as LiveProgress

COLUMNS = (
    ("reward_best", "best {:.3f}"),
    ("reward", "mean {:.3f}"),
    ("eval_reward", "eval {:.3f}"),
    ("samples_per_second", "{:,.0f} samples/s"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
)


def stderr_console() -> Console:
    """Where a run's messages go."""
    return Console(file=sys.stderr, highlight=False)


@final
class Progress:
    """Shows generation, best and mean reward, evaluation, throughput and the time left, on stderr.

    Args:
        args: the run's `ESSAConfig`.
        state: the run's `TrainerState`; read, never written.
        metrics: what is known from before, when a run is resumed.
        enabled: False shows nothing.
        console: where to write; by default stderr.
    """

    def __init__(
        self,
        args: Any,
        state: Any,
        metrics: dict[str, float],
        *,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self._state, self._enabled = state, enabled
        self._console = console or stderr_console()
        self._live: LiveProgress | None = None
        self._task: Any = None
        self._eval = metrics
        self._generations = args.generations
        self._first = state.global_step
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        if self._enabled and self._first:
            self.say(f"resumed after generation {self._first} of {self._generations}")
        if self._enabled and self._console.is_terminal:
            columns = (TextColumn("generation"), MofNCompleteColumn(), BarColumn(bar_width=20))
            self._live = LiveProgress(*columns, TextColumn("{task.fields[numbers]}"), console=self._console)
            self._live.start()
            self._task = self._live.add_task("", total=self._generations, completed=self._first, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One message that stays, whether or not there is a live line."""
        self._console.print(text, soft_wrap=True, markup=False)

    def evaluated(self, metrics: dict[str, float]) -> None:
        self._eval = metrics
        if self._live is None and self._enabled:
            self.say(f"generation {self._state.global_step}: eval {metrics['eval_reward']:.3f}")

    def update(self, metrics: dict[str, float]) -> None:
        """Refresh the live line after a generation."""
        if self._live is not None:
            self._live.update(self._task, completed=self._state.global_step, numbers=self._line(metrics))

    def log(self, metrics: dict[str, float]) -> None:
        """A line for the log, where there is no live line."""
        if self._live is None and self._enabled:
            self.say(f"generation {self._state.global_step}/{self._generations}: {self._line(metrics)}")

    def _line(self, metrics: dict[str, float]) -> str:
        known = {**self._eval, **metrics}
        parts = [text.format(known[name]) for name, text in COLUMNS if name in known]
        with contextlib.suppress(ZeroDivisionError):
            done = self._state.global_step - self._first
            left = (time.monotonic() - self._started) / done * (self._generations - self._state.global_step)
            parts.append(f"ETA {datetime.timedelta(seconds=round(left))}")
        return "  ".join(parts)
