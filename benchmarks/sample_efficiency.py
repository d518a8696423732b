"""Samples until the demo's model is right nine times in ten: every strategy, and TRL's GRPO, from the same warm starts.

    python -m benchmarks.sample_efficiency [--seeds 0 1 2 3 4] [--methods zo-grpo ...] [--threads 1]

Every run goes through the product: the demo's warm start, `ESSATrainer`, its rollout. `CAPTION` says what is counted.
`results/sample_efficiency.json` keeps the curves, `.md` the medians over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from essa.checkpoint import Run
from essa.config import ESSAConfig
from essa.demo import task
from essa.demo.grpo import run_grpo
from essa.demo.run import MAX_NEW_TOKENS, test_accuracy
from essa.demo.warm_start import BASE_MODEL, make_warm_start
from essa.report import run_curves
from essa.trainer import ESSATrainer

RESULTS = Path(__file__).parent / "results"
VALIDATION = 500
THRESHOLDS = (0.90, 0.95)
CAPTION = """\
Medians over the seeds, {threads}. A sample is one completion that was generated and whose reward was asked for; a
reward and its decoding are the dear part where answers are long, or judged by people, models or tests. What else a
method computes is not in that count: zo-grpo scores its completions again under many perturbations, in forward passes
without decoding and without a reward ("scored" is how many such rows it took in all), and GRPO takes a backward pass
through every sample. Seconds count everything but evaluations. The thresholds are read off the accuracy on 500
validation problems; the last column is measured once, at the end, on the 1,000 test problems. GRPO trains all LoRA
weights, the others search their singular values only.
"""
METHODS: dict[str, dict[str, Any]] = {
    "CMA 24 x 64": {
        "strategy": "cma-diagonal", "sigma": 0.2, "population_size": 24, "prompts_per_generation": 64,
        "generations": 40, "eval_steps": 2,
    },
    "CMA 24 x 16": {
        "strategy": "cma-diagonal", "sigma": 0.4, "population_size": 24, "prompts_per_generation": 16,
        "generations": 120, "eval_steps": 4,
    },
    "es-per-completion 8 x 8": {
        "strategy": "es-per-completion", "population_size": 64, "prompts_per_generation": 8,
        "generations": 240, "eval_steps": 4,
    },
    "zo-grpo 8 x 4": {
        "strategy": "zo-grpo", "population_size": 32, "prompts_per_generation": 8, "generations": 96, "eval_steps": 2,
    },
    "GRPO 8 x 8": {"population_size": 64, "prompts_per_generation": 8, "generations": 24, "eval_steps": 1},
    "GRPO 8 x 4": {"population_size": 32, "prompts_per_generation": 8, "generations": 48, "eval_steps": 2},
}  # fmt: skip


def run(method: str, seed: int, folder: Path, search: dict[str, Any]) -> dict[str, Any]:
    """One method, these settings, from one warm start: its validation curve and its accuracy on test."""
    warm_start = folder / "warm_start"
    make_warm_start(warm_start, seed)
    settings = ESSAConfig(
        output_dir=str(folder / "run"), seed=seed, max_new_tokens=MAX_NEW_TOKENS, progress=False, **search
    )
    validation = task.rows(task.split("validation")[:VALIDATION])
    if method.startswith("GRPO"):
        draws = settings.population_size // settings.prompts_per_generation
        budget = settings.population_size * settings.generations
        curve = run_grpo(warm_start, settings, budget, seed, num_generations=draws, validation=validation)
        test, scored = curve.accuracy, 0
    else:
        train = task.rows(task.split("train"))
        trainer = ESSATrainer(str(BASE_MODEL), "exact_match", settings, train, validation, adapter=str(warm_start))
        trainer.train()
        test = test_accuracy(trainer)
        record = Run.read(settings.output_dir)
        curve = next(curve for curve in run_curves(record) if curve.name == "evaluation")
        scored = sum(len(rows) for line in record.records for rows in line.get("scores", []))
    return {
        "method": method,
        "seed": seed,
        "samples": list(curve.samples),
        "scored": scored,
        "seconds": [round(seconds, 3) for seconds in curve.seconds],
        "validation": list(curve.values),
        "test": test,
    }


def first_reaching(result: dict[str, Any], unit: str, threshold: float) -> float:
    """Samples or seconds until the validation accuracy is first seen at the threshold."""
    reached = (n for n, value in zip(result[unit], result["validation"], strict=True) if value >= threshold)
    return next(reached, float("inf"))


def table(results: list[dict[str, Any]], threads: int) -> str:
    columns = [
        "method (prompts x draws; CMA: members x prompts)",
        "seeds",
        *(f"{unit} to {threshold:.2f}" for unit in ("samples", "seconds") for threshold in THRESHOLDS),
        "samples in all",
        "scored in all",
        "seconds in all",
        "accuracy before (validation)",
        "accuracy after (test)",
    ]
    lines = [
        CAPTION.format(threads="one thread" if threads == 1 else f"{threads} threads"),
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for method in METHODS:
        runs = [result for result in results if result["method"] == method]
        if not runs:
            continue
        cells = [
            _median([first_reaching(result, unit, threshold) for result in runs], digits)
            for unit, digits in (("samples", 0), ("seconds", 1))
            for threshold in THRESHOLDS
        ]
        cells += [_median([r["samples"][-1] for r in runs]), _median([r["scored"] for r in runs])]
        lines.append(
            f"| {method} | {len(runs)} | {' | '.join(cells)} | "
            f"{statistics.median(r['seconds'][-1] for r in runs):.1f} | "
            f"{statistics.median(r['validation'][0] for r in runs):.3f} | "
            f"{statistics.median(r['test'] for r in runs):.3f} |"
        )
    return "\n".join(lines) + "\n"


def _median(numbers: list[float], digits: int = 0) -> str:
    median = statistics.median_high(numbers)
    return "not reached" if median == float("inf") else f"{median:,.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "sample_efficiency.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else []
    for seed in options.seeds:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                fresh = run(method, seed, Path(folder), METHODS[method])
            results = [r for r in results if (r["method"], r["seed"]) != (method, seed)] + [fresh]
            options.output.write_text(json.dumps(results, indent=None) + "\n")
            options.output.with_suffix(".md").write_text(table(results, options.threads))
            print(f"{method}, seed {seed}: test {fresh['test']:.3f}", flush=True)
    print(table(results, options.threads))


if __name__ == "__main__":
    main()
