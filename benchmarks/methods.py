"""Every parametrisation and strategy on the demo's task: accuracy, samples, seconds and peak memory.

    python -m benchmarks.methods [--seeds 0 1 2] [--methods "lora, es" ...] [--threads 1]

Every run goes through the product, from the demo's warm starts, with the strategy's own sigma and step size, which were
chosen on validation problems of seed 0. `results/methods.json` keeps the curves and peaks, `.md` the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from essa.chunks import Local, Task
from essa.config import ESSAConfig
from essa.demo import task
from essa.demo.run import MAX_NEW_TOKENS
from essa.demo.warm_start import BASE_MODEL, make_warm_start
from essa.trainer import ESSATrainer

import essa_kernels
from benchmarks.compare import resident
from benchmarks.sample_efficiency import RESULTS, first_reaching, run

CAPTION = """\
The demo's task, medians over the seeds (accuracy: and the range), {threads}. Every search runs to its end and no best mean is
picked: the accuracy is that of what the search ends with, on the 1,000 test problems. "to 0.90" is read off the accuracy
on 500 validation problems, seen every 6 generations. Members x prompts make a generation; with "a completion" every one of
the members is a completion with a perturbation of its own. Seconds are those of the search, evaluations aside. The peak is the
resident memory of the whole process, libraries included, at the height of one generation with 8 and with 512 members that
answer 32 prompts each, 256 rows at a time: the median of {processes} processes each.
"""
GENERATION = {"population_size": 32, "prompts_per_generation": 16, "generations": 108, "eval_steps": 6}
COMPLETION = {
    **GENERATION,
    "population_size": 512,
    "prompts_per_generation": 32,
    "perturbation": "completion",
    "reward_shaping": "per-prompt",
}
METHODS: dict[str, dict[str, Any]] = {
    "svd, zo-grpo 8 x 4": {
        "strategy": "zo-grpo", "population_size": 32, "prompts_per_generation": 8, "generations": 96, "eval_steps": 6,
    },
    "svd, cma": {**GENERATION, "strategy": "cma"},
    "svd, cma-diagonal": {**GENERATION, "strategy": "cma-diagonal"},
    "svd, es": {**GENERATION, "strategy": "es"},
    "svd, es, a completion": {**COMPLETION, "strategy": "es"},
    "lora, es": {**GENERATION, "parametrization": "lora"},
    "lora, es with Adam": {**GENERATION, "parametrization": "lora", "optimizer": "adam"},
    "lowrank (EGGROLL), es": {**GENERATION, "parametrization": "lowrank"},
    "lowrank (EGGROLL), es, Rademacher": {**GENERATION, "parametrization": "lowrank", "noise": "rademacher"},
    "lowrank (EGGROLL), es, a completion": {**COMPLETION, "parametrization": "lowrank"},
    "full (ES at Scale), es": {**GENERATION, "parametrization": "full"},
}  # fmt: skip
MEMBERS, PROMPTS = (8, 512), 32
PROCESSES = 5  # what the allocator keeps differs by 1 % from one to the next


def peak_of_a_generation(trainer: ESSATrainer) -> tuple[int, int]:
    """Bytes resident before a generation, and how many more it took at its height. Linux only."""
    args = trainer.args
    work = Task(
        trainer.model,
        trainer.processing_class,
        trainer.train_prompts,
        None,
        trainer.rewards,
        args.max_new_tokens,
        args.seed,
        args.row_budget,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    chosen = list(range(args.prompts_per_generation))
    rewards = Local(work, trainer.search).evaluate(0, chosen).rewards
    trainer.search.tell(0, torch.tensor(rewards).reshape(args.population_size, -1).double().numpy(), _no_score)
    return before, resident("VmHWM") - before


def _no_score(*arguments: Any) -> Any:
    raise NotImplementedError("scoring is not part of this measurement")


def measure_peak(method: str, members: int, folder: Path) -> tuple[int, int]:
    """`peak_of_a_generation` of one method, in this process, after a small one that warms everything up."""
    warm_start = folder / "warm_start"
    make_warm_start(warm_start, 0)
    settings = {name: value for name, value in METHODS[method].items() if name != "perturbation"}
    settings |= {"prompts_per_generation": PROMPTS, "max_new_tokens": MAX_NEW_TOKENS, "progress": False}
    peaks = []
    for population in (8, members):
        args = ESSAConfig(output_dir=str(folder / "run"), **{**settings, "population_size": population})
        rows = task.rows(task.split("train"))
        trainer = ESSATrainer(str(BASE_MODEL), "exact_match", args, rows, adapter=str(warm_start))
        peaks.append(peak_of_a_generation(trainer))
    return peaks[-1]


def measured_apart(method: str, members: int) -> tuple[int, int]:
    """`measure_peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.methods", "--peak", method, str(members)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = json.loads(child.stdout.splitlines()[-1])
    return before, peak


def table(results: list[dict[str, Any]], peaks: dict[str, list[list[tuple[int, int]]]], threads: int, note: str) -> str:
    columns = [
        "method",
        "members x prompts",
        "seeds",
        "accuracy before",
        "accuracy after",
        "samples to 0.90",
        "samples",
        "seconds",
        *(f"peak of {members} members, MiB" for members in MEMBERS),
    ]
    caption = CAPTION.format(processes=PROCESSES, threads="one thread" if threads == 1 else f"{threads} threads")
    report = essa_kernels.env_report()
    machine = f"{report['cpu']['model']} ({report['compiled_module'].get('cpu_isa', 'no compiled kernels')})"
    versions = f"essa-kernels {essa_kernels.__version__}, torch {torch.__version__}, {machine}"
    lines = [
        caption,
        f"{versions}: `python -m benchmarks.methods --peaks`. {note}".rstrip() + "\n",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for method, settings in METHODS.items():
        runs = [result for result in results if result["method"] == method]
        if not runs:
            continue
        after = sorted(result["test"] for result in runs)
        reached = statistics.median_high([first_reaching(result, "samples", 0.90) for result in runs])
        cells = [
            method,
            f"{settings['population_size']} x {settings['prompts_per_generation']}",
            str(len(runs)),
            f"{statistics.median(result['validation'][0] for result in runs):.3f}",
            f"{statistics.median(after):.3f} ({after[0]:.3f} .. {after[-1]:.3f})",
            "not reached" if reached == float("inf") else f"{reached:,}",
            f"{runs[0]['samples'][-1]:,}",
            f"{statistics.median(result['seconds'][-1] for result in runs):.1f}",
            *(f"{statistics.median(map(sum, measured)) / 2**20:.0f}" for measured in peaks.get(method, [])),
        ]
        cells += [""] * (len(columns) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "methods.json")
    parser.add_argument("--note", default="", help="a remark for the table, such as what else the machine did")
    parser.add_argument("--peaks", action="store_true", help="measure peak memory too")
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "MEMBERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure_peak(options.peak[0], int(options.peak[1]), Path(folder))))
        return
    kept: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    results, peaks = kept.get("results", []), kept.get("peaks", {})
    for method in options.methods:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                fresh = run(method, seed, Path(folder), METHODS[method])
            results = [r for r in results if (r["method"], r["seed"]) != (method, seed)] + [fresh]
            print(f"{method}, seed {seed}: test {fresh['test']:.3f}", flush=True)
            _write(options.output, results, peaks, options.threads, options.note)
        if options.peaks and METHODS[method].get("strategy") != "zo-grpo":
            peaks[method] = [[measured_apart(method, members) for _ in range(PROCESSES)] for members in MEMBERS]
            _write(options.output, results, peaks, options.threads, options.note)
    print(table(results, peaks, options.threads, options.note))


def _write(output: Path, results: list[dict[str, Any]], peaks: dict[str, Any], threads: int, note: str) -> None:
    output.write_text(json.dumps({"results": results, "peaks": peaks}) + "\n")
    output.with_suffix(".md").write_text(table(results, peaks, threads, note))


if __name__ == "__main__":
    main()
