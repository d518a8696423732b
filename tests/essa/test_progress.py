from __future__ import annotations

import io
from types import SimpleNamespace

from essa.progress import Progress
from rich.console import Console

METRICS = {"reward": 0.25, "reward_best": 0.75, "samples_per_second": 1234.5, "tokens_per_second": 9876.5}


def show(terminal, steps=3, first=0, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=150, color_system=None)
    state = SimpleNamespace(global_step=first)
    with Progress(SimpleNamespace(generations=3), state, {}, console=console, **options) as progress:
        for step in range(first + 1, steps + 1):
            state.global_step = step
            if step == 2:
                progress.evaluated({"eval_reward": 0.5})
            progress.update(METRICS)
            progress.log(METRICS)
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = show(terminal=False).splitlines()
    assert lines[0].startswith("generation 1/3: best 0.750  mean 0.250  1,234 samples/s  9,876 tokens/s  ETA 0:00:0")
    assert lines[1] == "generation 2: eval 0.500"
    assert "eval 0.500" in lines[2] and lines[3].startswith("generation 3/3") and lines[3].endswith("ETA 0:00:00")
    assert len(lines) == 4


def test_one_live_line_on_a_terminal():
    text = show(terminal=True)
    for words in ("3/3", "best 0.750", "mean 0.250", "eval 0.500", "1,234 samples/s", "ETA"):
        assert words in text
    assert "generation 3/3:" not in text


def test_silence_and_resuming():
    assert show(terminal=False, enabled=False) == ""
    assert show(terminal=False, first=2).startswith("resumed after generation 2 of 3\n")
