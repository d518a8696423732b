"""The report of a run: `report.html`, one self-contained file that follows the reader's light or dark theme, and
`report.png`, its learning curve. Both come from `run.json` and `history.jsonl` alone."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from essa.checkpoint import Run, write_atomically

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#64748b")
INK = "#010203"
"""Stands for the colour of text and axes in the drawing, and becomes `currentColor` in the page."""

SEARCHED = {
    "svd": "the singular values of a LoRA adapter",
    "lora": "the factors of a LoRA adapter",
    "lowrank": "the weights of a model, with low-rank noise",
    "full": "all weights of a model",
}

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #151b23; --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; }
}
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 60rem; padding: 2rem 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } p { color: var(--soft); }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.number { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; }
.number b { display: block; font-size: 1.35rem; } .number span { color: var(--soft); font-size: .85rem; }
figure { margin: 0; } figure svg { height: auto; width: 100%; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid var(--line); padding: .3rem .5rem .3rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); width: 16rem; }
"""


@dataclass(frozen=True)
class Curve:
    """One line of the learning curve: `values[i]` was reached after `samples[i]` completions and `seconds[i]`.

    `kind` is "main" (drawn strongly), "side" (drawn thinly), or "level" (a horizontal reference line).
    """

    name: str
    samples: Sequence[float]
    seconds: Sequence[float]
    values: Sequence[float]
    kind: str = "main"


@dataclass(frozen=True)
class Table:
    heading: str
    rows: Sequence[tuple[str, Any]]


def run_curves(run: Run) -> list[Curve]:
    """The training and evaluation curves of a run, over the samples and seconds of its search."""
    steps = [record for record in run.records if "rewards" in record]
    samples, seconds = [0], [0.0]
    for record in steps:
        samples.append(samples[-1] + record["samples"])
        seconds.append(seconds[-1] + record["seconds"])
    means = [_mean([_mean(row) for row in record["rewards"]]) for record in steps]
    evaluations = [record for record in run.records if "evaluation" in record]
    curves = [Curve("training prompts, mean", samples[1:], seconds[1:], means, "side" if evaluations else "main")]
    if any(len(row) > 1 for record in steps for row in record["rewards"]):
        best = [max(_mean(row) for row in record["rewards"]) for record in steps]
        curves.append(Curve("training prompts, best member", samples[1:], seconds[1:], best, "side"))
    if evaluations:
        at = [record["step"] for record in evaluations]
        values = [record["evaluation"]["reward"] for record in evaluations]
        curves.insert(0, Curve("evaluation", [samples[i] for i in at], [seconds[i] for i in at], values))
    return curves


def write_report(
    directory: str | Path,
    *,
    title: str | None = None,
    name: str | None = None,
    curves: Sequence[Curve] = (),
    tables: Sequence[Table] = (),
) -> Path:
    """Write `report.html` and `report.png` into a run's folder and return the path of the page.

    Args:
        directory: the run's output_dir.
        title: the page's heading; by default the run's name or folder.
        name: what the run's own curves are called beside those of rivals.
        curves: rivals or reference levels, drawn beside the run's own curves.
        tables: shown before the settings.
    """
    run = Run.read(directory)
    own = [dataclasses.replace(curve, name=f"{name}, {curve.name}") if name else curve for curve in run_curves(run)]
    title = title or run.about["settings"].get("run_name") or run.directory.resolve().name
    png, svg = _draw([*own, *curves], title)
    searched = _searched(run.identity["settings"]["parametrization"])
    lead = f"Gradient-free alignment: a search over {searched}."
    text = page(title, lead, _headline(run), svg, [*tables, *_own_tables(run)], "learning curve")
    (run.directory / "report.png").write_bytes(png)
    path = run.directory / "report.html"
    write_atomically(path, text)
    return path


def picture(draw: Callable[[Any], None], title: str, size: tuple[float, float] = (9, 4)) -> tuple[bytes, str]:
    """What `draw` puts into a matplotlib figure, as PNG, with its title, and as SVG for a page, which has a title."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    with matplotlib.rc_context({**ink, "svg.fonttype": "none", "svg.hashsalt": "essa", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        for axes in figure.axes:
            axes.grid(alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.suptitle(title)
        figure.savefig(png, format="png", dpi=150)
    return png.getvalue(), svg.getvalue()


def _searched(parametrization: str) -> str:
    return SEARCHED.get(parametrization, f"what {parametrization} names")


def _draw(curves: Sequence[Curve], title: str) -> tuple[bytes, str]:
    """The learning curve, over samples and over seconds."""

    def draw(figure: Any) -> None:
        by_samples, by_seconds = figure.subplots(1, 2, sharey=True)
        for axes, along, label in (
            (by_samples, "samples", "completions sampled"),
            (by_seconds, "seconds", "seconds of search"),
        ):
            for number, curve in enumerate(curves):
                _draw_curve(axes, curve, getattr(curve, along), COLOURS[number % len(COLOURS)])
            axes.set_xlabel(label)
        by_samples.set_ylabel("reward")
        handles, labels = by_samples.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(curves)), frameon=False)

    return picture(draw, title)


def _draw_curve(axes: Any, curve: Curve, along: Sequence[float], colour: str) -> None:
    if curve.kind == "level":
        axes.axhline(curve.values[-1], color=colour, linestyle="--", linewidth=1.2, label=curve.name)
    elif curve.kind == "side":
        axes.plot(along, curve.values, color=colour, linewidth=0.9, alpha=0.6, label=curve.name)
    else:
        axes.plot(along, curve.values, color=colour, linewidth=2, marker="o", markersize=3, label=curve.name)


def _own_tables(run: Run) -> list[Table]:
    steps = [record for record in run.records if "rewards" in record]
    samples, tokens = sum(r["samples"] for r in steps), sum(r["tokens"] for r in steps)
    seconds, decoding = sum(r["seconds"] for r in steps), sum(r["rollout_seconds"] for r in steps)
    throughput = [("generations", len(steps)), ("samples", f"{samples:,}"), ("generated tokens", f"{tokens:,}")]
    if steps:
        throughput += [
            ("search seconds (evaluation aside)", f"{seconds:,.1f}"),
            ("of which decoding", f"{decoding / seconds:.0%}"),
            ("samples per second", f"{samples / seconds:,.0f}"),
            ("tokens per second", f"{tokens / seconds:,.0f}"),
        ]
    network = [record["bytes_per_worker"] for record in steps if "bytes_per_worker" in record]
    if network:
        throughput.append(("most bytes per Ray worker and generation", f"{max(network):,}"))
    missed = [record["catch_up_bytes"] for record in steps if "catch_up_bytes" in record]
    if missed:
        throughput.append(("most bytes to tell a new Ray worker what it missed", f"{max(missed):,}"))
    facts = {"model": run.about["model"], "rewards": ", ".join(run.identity["rewards"])}
    facts |= {"searched values": run.identity["model"]["searched_values"]}
    settings = {**facts, **run.about["settings"], **run.identity["settings"]}
    environment = {"started": run.about["started"], **_flat(run.about["environment"])}
    return [
        Table("Throughput", throughput),
        Table("Settings", list(settings.items())),
        Table("Machine and versions", list(environment.items())),
    ]


def page(title: str, lead: str, numbers: Sequence[tuple[str, str]], svg: str, tables: Sequence[Table], alt: str) -> str:
    """One self-contained HTML page: heading, a sentence, the numbers that matter most, the picture, the tables."""
    drawing = svg[svg.index("<svg") :].replace(INK, "currentColor")
    drawing = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", drawing)
    headline = "".join(
        f'<div class="number"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for name, value in numbers
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f"<p>{html.escape(lead)}</p>",
            f'<div class="numbers">{headline}</div>',
            f'<figure role="img" aria-label="{html.escape(alt)}">{drawing}</figure>',
            *map(_table, tables),
            "</body></html>\n",
        ]
    )


def _headline(run: Run) -> list[tuple[str, str]]:
    evaluations = [record["evaluation"]["reward"] for record in run.records if "evaluation" in record]
    steps = [record for record in run.records if "rewards" in record]
    numbers = [("samples", f"{sum(r['samples'] for r in steps):,}")]
    numbers.append(("seconds of search", f"{sum(r['seconds'] for r in steps):,.1f}"))
    if evaluations:
        numbers = [
            ("evaluation before", f"{evaluations[0]:.3f}"),
            ("evaluation after", f"{evaluations[-1]:.3f}"),
            *numbers,
        ]
    return numbers


def _table(table: Table) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(value if isinstance(value, str) else json.dumps(value))}"
        "</td></tr>"
        for name, value in table.rows
    )
    return f"<h2>{html.escape(table.heading)}</h2><table>{rows}</table>"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
