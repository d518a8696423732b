"""Ray workers: throughput of one and two, the driver's share, bytes on the network, and what `essa plan` said.

    python -m benchmarks.workers

A random model of 0.5 B shapes in bfloat16, a thread to a worker; CMA-ES with a chunk of sequences for each of several
rounds. Runs without workers, of one and of two take turns, so that whatever else the machine does slows all of them. The
first generation of a run is left out: workers load and kernels get warm in it. The driver's share is its own processor time
during the other generations against their duration. The plan is that of `essa plan --gpu measure`, run before.

Bytes do not depend on the model, for nothing of it crosses the network: those of a run of ESSA's size, 96 members x 100
prompts, are measured on the demo's model, with rewards of 0 and 1 and with random ones, which no two completions share; and
those of the strategy that asks for scores besides, 96 completions of 12 prompts. Each run is resumed once, for the bytes
that a new worker is sent for each generation it has missed.
`results/workers.json` keeps the numbers, `.md` the table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from essa import ESSAConfig, ESSATrainer
from essa.checkpoint import Run
from essa.demo.warm_start import BASE_MODEL
from essa.models import ModelSource, load_base
from transformers import TrainerCallback

from benchmarks.memory import build, no_reward, with_lora

RESULTS = Path(__file__).parent / "results" / "workers"
MEMBERS, PROMPTS, ROWS, WORDS, NEW_TOKENS, GENERATIONS = 8, 4, 8, 32, 8, 4
TURNS = 3


class Clock(TrainerCallback):
    """The driver's processor seconds in each generation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.started)


def prompts() -> list[dict[str, str]]:
    return [{"prompt": f"{number % 10}" * WORDS} for number in range(16)]


def measure(folder: Path, workers: int, turn: int) -> dict[str, Any]:
    clock = Clock()
    args = ESSAConfig(
        str(folder / f"run{workers}_{turn}"),
        strategy="cma-diagonal",
        population_size=MEMBERS,
        prompts_per_generation=PROMPTS,
        generations=GENERATIONS,
        max_new_tokens=NEW_TOKENS,
        row_budget=ROWS,
        num_workers=workers,
        progress=False,
    )
    source = ModelSource(str(folder / "model"), str(folder / "adapter"), device="cpu")
    ESSATrainer(source, no_reward, args, prompts(), callbacks=[clock]).train()
    steps = [record for record in Run.read(args.output_dir).records if "rewards" in record][1:]
    seconds = [record["seconds"] for record in steps]
    return {
        "workers": workers,
        "seconds": seconds,
        "driver_seconds": sum(clock.seconds[1:]),
        "bytes_per_worker": max(record.get("bytes_per_worker", 0) for record in steps),
        "adapter": (Path(args.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes().hex()[-64:],
    }


def measure_in_turns(folder: Path) -> list[dict[str, Any]]:
    """What was measured with no, one and two workers, over all turns."""
    turns = [[measure(folder, workers, turn) for workers in (0, 1, 2)] for turn in range(TURNS)]
    return [
        {
            "workers": runs[0]["workers"],
            "seconds": [seconds for run in runs for seconds in run["seconds"]],
            "driver_share": sum(run["driver_seconds"] for run in runs) / sum(sum(run["seconds"]) for run in runs),
            "bytes_per_worker": max(run["bytes_per_worker"] for run in runs),
            "adapters": sorted({run["adapter"] for run in runs}),
        }
        for runs in zip(*turns, strict=True)
    ]


def right_or_wrong(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(zlib.crc32(str(completion).encode()) % 2) for completion in completions]


def random_digits(completions: list[Any], **kwargs: Any) -> list[float]:
    return [random.random() for _ in completions]


TRAFFIC = (
    (right_or_wrong, {"strategy": "cma", "prompts_per_generation": 100}),
    (random_digits, {"strategy": "cma", "prompts_per_generation": 100}),
    (random_digits, {"strategy": "cma", "prompts_per_generation": 100, "row_budget": 32}),
    (random_digits, {"strategy": "zo-grpo", "prompts_per_generation": 12, "row_budget": 16}),
)


def traffic(folder: Path) -> list[dict[str, Any]]:
    base = load_base(str(BASE_MODEL))[0]
    with_lora(base).save_pretrained(folder / "small_adapter")
    source = ModelSource(str(BASE_MODEL), str(folder / "small_adapter"), device="cpu")
    problems = [{"prompt": f"?{first}+{second}="} for first in range(10, 30) for second in range(10, 30)]
    results = []
    for number, (reward, settings) in enumerate(TRAFFIC):
        args = ESSAConfig(
            str(folder / f"traffic{number}"),
            population_size=96,
            generations=GENERATIONS,
            max_new_tokens=4,
            num_workers=2,
            progress=False,
            **settings,  # type: ignore[arg-type]
        )
        ESSATrainer(source, reward, args, problems).train()
        args.generations += 1
        ESSATrainer(source, reward, args, problems).train(resume_from_checkpoint=True)
        steps = [record for record in Run.read(args.output_dir).records if "rewards" in record]
        results.append(
            {
                "rewards": reward.__name__.replace("_", " "),
                "strategy": args.strategy,
                "prompts": args.prompts_per_generation,
                "row_budget": args.row_budget,
                "bytes": max(record["bytes_per_worker"] for record in steps),
                # The last generation before is no more than news to it.
                "missed": round(steps[-1]["catch_up_bytes"] / (GENERATIONS - 1)),
            }
        )
    return results


def plan(folder: Path) -> dict[str, Any]:
    """What the command says, from rates it measures itself."""
    options = {
        "model_name_or_path": folder / "model",
        "adapter": folder / "adapter",
        "gpu": "measure",
        "gpus": 2,
        "population_size": MEMBERS,
        "prompts_per_generation": PROMPTS,
        "prompt_tokens": WORDS,
        "max_new_tokens": NEW_TOKENS,
        "row_budget": ROWS,
    }
    command = [sys.executable, "-m", "essa.cli", "plan"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    seconds_on = {line["workers"]: line["seconds"] for line in results["plan"]["scaling"]}
    alone = statistics.median(results["runs"][1]["seconds"])
    lines = [
        (
            f"A random Qwen2 of 0.5 B shapes in bfloat16 on a CPU with two cores, one thread to a worker, {MEMBERS} members x "
            f"{PROMPTS} prompts of {WORDS} tokens, {NEW_TOKENS} new tokens, {ROWS} sequences to a chunk; medians of "
            f"{TURNS * (GENERATIONS - 1)} generations, with the smallest and the largest, in {TURNS} runs that took turns. "
            "Speed-up is against one worker."
        ),
        "",
        "Command: `python -m benchmarks.workers`",
        "",
        "| workers | seconds a generation | speed-up | `essa plan` | plan / measured | driver's share | bytes per worker |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        median = statistics.median(run["seconds"])
        planned = seconds_on[max(1, run["workers"])]
        name = str(run["workers"] or "0 (in this process)")
        network = f"{run['driver_share']:.2%} | {run['bytes_per_worker']:,} |" if run["workers"] else "| |"
        lines.append(
            f"| {name} | {median:.2f} ({min(run['seconds']):.2f} - {max(run['seconds']):.2f}) | {alone / median:.2f}x "
            f"| {planned:.2f} s | {planned / median:.2f} | {network}"
        )
    same = len({adapter for run in results["runs"] for adapter in run["adapters"]}) == 1
    lines += ["", f"All runs ended in the same adapter, bit for bit: {'yes' if same else 'NO'}."]
    lines += [
        "",
        (
            "The most bytes of a worker in a generation, two workers; they do not depend on the model. Right or wrong are rewards "
            "of 0 and 1, random digits are different for every completion. A new worker is sent the last column for each "
            "generation before the last:"
        ),
        "",
        "| strategy | members x prompts | sequences to a chunk | rewards | bytes per worker | bytes of a missed generation |",
        "|---|---|---|---|---|---|",
        *(
            f"| {run['strategy']} | 96 x {run['prompts']} | {run['row_budget']} | {run['rewards']} | {run['bytes']:,} "
            f"| {run['missed']:,} |"
            for run in results["traffic"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, tokenizer = build()
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        with_lora(model).save_pretrained(folder / "adapter")
        del model
        results: dict[str, Any] = {"plan": plan(folder), "runs": measure_in_turns(folder)}
        results["traffic"] = traffic(folder)
        text = table(results)
    RESULTS.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
