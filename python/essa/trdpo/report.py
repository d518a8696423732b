"""The report of a preference run: `report.html` and `report.png`, from what the trainer has logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from essa import report
from essa.checkpoint import write_atomically
from essa.report import COLOURS, Table

LEAD = "Preference alignment: the policy against a reference that {how}."
MOVES = {
    "soft": "moves towards it every {steps} steps, by {alpha:g} of the way",
    "hard": "becomes it every {steps} steps",
    "none": "stays where it started",
}
# One panel each: its title, and the logged metrics it shows.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "eval_loss")),
    ("rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("log-probabilities", ("logps/chosen", "logps/rejected")),
    ("KL per token, nats", ("kl/policy_reference", "kl/policy_initial")),
    ("distance of the reference from its start", ("reference/distance",)),
)
MOST_LINES = 40


def write_report(trainer: Any) -> Path:
    """Write both files into the trainer's output_dir and return the path of the page."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    records = trainer.state.log_history
    last = trainer.reference.last_update
    first = last - (trainer.reference.updates - 1) * args.ref_model_sync_steps
    syncs = list(range(first, last + 1, args.ref_model_sync_steps)) if trainer.reference.updates else []
    title = args.run_name or folder.resolve().name
    png, svg = report.picture(lambda figure: draw(figure, records, syncs), title, (9, 5.5))
    how = MOVES[args.ref_update].format(steps=args.ref_model_sync_steps, alpha=args.alpha)
    numbers = [("optimiser steps", f"{trainer.state.global_step:,}"), ("updates of the reference", str(len(syncs)))]
    for name, metric in (("accuracy", "rewards/accuracies"), ("evaluation accuracy", "eval_rewards/accuracies")):
        values = [record[metric] for record in records if metric in record]
        numbers += [(name, f"{values[-1]:.3f}")] if values else []
    tables = [
        Table("Run", trainer.report_rows()),
        Table("Updates of the reference, at step", [(str(number + 1), step) for number, step in enumerate(syncs)]),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.png").write_bytes(png)
    path = folder / "report.html"
    write_atomically(
        path, report.page(title, LEAD.format(how=how), numbers, svg, tables[: 1 + bool(syncs)], "training curves")
    )
    return path


def draw(figure: Any, records: Sequence[dict[str, Any]], syncs: Sequence[int]) -> None:
    """The panels over the optimiser steps; vertical lines where the reference moved, if they can be told apart."""
    for axes, (title, metrics) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
        for step in syncs if len(syncs) <= MOST_LINES else ():
            axes.axvline(step, color=COLOURS[-1], linewidth=0.6, alpha=0.4)
        for colour, metric in zip(COLOURS, metrics, strict=False):
            points = [(record["step"], record[metric]) for record in records if metric in record]
            if points:
                label = metric.replace("rewards/", "").replace("logps/", "").replace("kl/", "").replace("_", " ")
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
        axes.set_title(title, fontsize=9)
        if len(metrics) > 1 and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    for axes in figure.axes[3:]:
        axes.set_xlabel("step")
