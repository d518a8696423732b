"""What gpu_check knows so far: its steps and measurements, as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .gpu_tasks import Ended, Outcome, last_line

MESSAGE, DETAILS, OUTPUT = 300, 4_000, 20_000  # at most so many characters of what failed
CEILINGS, PURE = "ceilings", "pure inference"  # measurements that others are compared with
PASSED, FAILED, NOT_FINISHED, NOT_RUN = "passed", "FAILED", "NOT FINISHED", "NOT RUN"


@dataclass(frozen=True)
class Step:
    """One part of the check and how it went."""

    name: str
    result: str = NOT_RUN
    summary: str = ""
    seconds: float = 0.0


def step_of(name: str, outcomes: Mapping[str, Outcome | None], processes: Sequence[Ended], seconds: float) -> Step:
    """The tasks that processes went through as one step. It takes one that was done, and none that failed or was left."""
    results = [NOT_RUN if outcome is None else outcome.result for outcome in outcomes.values()]
    count = {result: results.count(result) for result in ("passed", "failed", "skipped", None, NOT_RUN)}
    said = {"failed": "failed", "skipped": "skipped", None: "cut short", NOT_RUN: "not run"}
    summary = [f"{count['passed']} of {len(results)} passed"]
    summary += [f"{count[result]} {words}" for result, words in said.items() if count[result]]
    died = [last_line(process.output).strip("= ") for process in processes if process.status]
    stopped = any(process.status is None for process in processes)
    if count["failed"] or died:
        result = FAILED
    elif stopped or (count[NOT_RUN] < len(results) and count[None] + count[NOT_RUN]):
        result = NOT_FINISHED
    else:
        result = PASSED if count["passed"] else NOT_RUN
    return Step(name, result, ", ".join([*summary, *died[:1]]), seconds)


@dataclass
class Results:
    """Written to path.json, path.md and, of what did not pass, path.log."""

    path: Path
    device: str
    steps: dict[str, Step] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    ops: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def add(self, step: Step) -> None:
        print(f"== {step.name}: {step.result}, {step.summary} ({step.seconds:.0f} s)", flush=True)
        self.steps[step.name] = step

    def add_failures(self, step: str, outcomes: Mapping[str, Outcome | None], processes: Iterable[Ended]) -> None:
        for name, outcome in outcomes.items():
            if outcome and outcome.result == "failed":
                self.failures[f"{step}: {name}"] = outcome.message[:MESSAGE]
                self.log.append(f"== {step}: {name}\n{outcome.message[:MESSAGE]}\n{outcome.details[-DETAILS:]}")
        for process in processes:
            if process.status != 0:
                why = "was stopped" if process.status is None else f"ended with status {process.status}"
                self.log.append(f"== {step}: a process {why}\n{process.output[-OUTPUT:]}")

    def measured(self, outcomes: dict[str, Outcome | None]) -> None:
        """Takes the rows of all that was measured, as far as it was."""
        found = {name: outcome.found for name, outcome in outcomes.items() if outcome}
        self.ceilings = found.get(CEILINGS, {})
        timed = [row for row in found.values() if "launched_s" in row]
        self.ops = [row | self._rates(row) for row in timed if "op" in row]
        layers = [row for row in timed if "rows" in row]
        alone = {row["rows"]: row for row in layers if row["what"] == PURE}
        self.layers = [row | shares(row, alone.get(row["rows"], {})) for row in layers]

    def _rates(self, row: dict[str, Any]) -> dict[str, float]:
        """Per second in a graph, and how often the time holds the least that the card could take."""
        if "graph_s" not in row:
            return {}
        rates = {f"{amount}_per_s": row[amount] / row["graph_s"] for amount in ("moved", "flops", "normals")}
        if len(self.ceilings) < 2:
            return rates
        floor_s = max(row["moved"] / self.ceilings["bytes_per_s"], row["flops"] / self.ceilings["flops_per_s"])
        return rates | {"times_floor": row["graph_s"] / floor_s}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = asdict(self) | {"path": str(self.path), "steps": [asdict(step) for step in self.steps.values()]}
        del known["log"]
        self.path.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.as_markdown())
        self.path.with_suffix(".log").write_text("\n\n".join(self.log))

    def as_markdown(self) -> str:
        steps = [(s.name, s.result, s.summary, f"{s.seconds:.0f}") for s in self.steps.values()]
        lines = [f"# {self.device}", "", *table(("step", "result", "", "seconds"), steps)]
        if self.ceilings:
            lines += ["", "Measured here: " + ", ".join(ceilings_in_words(self.ceilings)) + "."]
        if self.layers:
            head = ("7B-shaped layers", "rows", "launched, ms", "share of pure inference", "in a graph, ms", "share")
            lines += ["", *table(head, map(layers_row, self.layers))]
        if self.ops:
            rates = ("GB/s", "TFLOP/s", "Gnormals/s", "times the floor")
            head = ("op", "backend", "size", "launched, us", "in a graph, us", *rates)
            lines += [
                "",
                "The floor is the longer of a call's bytes and its operations at the card's best, measured here.",
                "",
                *table(head, map(op_row, self.ops)),
            ]
        if self.failures:
            lines += ["", *table(("failed", "why"), self.failures.items())]
        return "\n".join(lines) + "\n"


def shares(row: dict[str, Any], alone: dict[str, Any]) -> dict[str, float]:
    """Of pure inference's speed."""
    times = (time for time in ("launched", "graph") if f"{time}_s" in row and f"{time}_s" in alone)
    return {f"{time}_share": alone[f"{time}_s"] / row[f"{time}_s"] for time in times}


def ceilings_in_words(best: dict[str, float]) -> list[str]:
    words = {
        "bytes_per_s": "{:.0f} GB/s copied (read and written)",
        "flops_per_s": "{:.0f} TFLOP/s in an 8192-cubed bf16 product",
    }
    scale = {"bytes_per_s": 1e9, "flops_per_s": 1e12}
    return [words[name].format(value / scale[name]) for name, value in best.items()]


def layers_row(row: dict[str, Any]) -> tuple[str, ...]:
    times = ((number(row, f"{t}_s", 1e3, 3), number(row, f"{t}_share", 100, 1, "%")) for t in ("launched", "graph"))
    return row["what"], str(row["rows"]), *(cell for pair in times for cell in pair)


def op_row(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = (
        number(row, "launched_s", 1e6, 1),
        number(row, "graph_s", 1e6, 1),
        number(row, "moved_per_s", 1e-9, 0),
        number(row, "flops_per_s", 1e-12, 2),
        number(row, "normals_per_s", 1e-9, 1),
        number(row, "times_floor", 1, 2),
    )
    return row["op"], row["backend"], row["what"], *numbers


def number(row: dict[str, Any], name: str, scale: float, digits: int, unit: str = "") -> str:
    """Of what was not found, a dash."""
    return f"{row[name] * scale:.{digits}f}{unit}" if name in row else "-"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
