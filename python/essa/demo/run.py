"""`essa demo`: a warm start that answers mostly wrong, aligned by ESSA, beside its honest control."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from essa.checkpoint import write_atomically
from essa.config import ESSAConfig, InputError
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL, make_warm_start
from essa.evaluate import check_prompts, evaluate
from essa.models import load_adapter, load_base
from essa.report import Curve, Table, write_report
from essa.trainer import ESSATrainer
from essa_kernels.nn import SVDLoRA

MAX_NEW_TOKENS = task.ANSWER_LENGTH + 1
SEARCH: dict[str, Any] = {
    "population_size": 32,
    "prompts_per_generation": 8,
    "generations": 45,
    "eval_steps": 3,
    "load_best_model_at_end": True,
}
SEARCH_OF_WEIGHTS: dict[str, Any] = {**SEARCH, "prompts_per_generation": 16, "generations": 60, "eval_steps": 4}
SEARCHED = {
    "svd": "singular values of the LoRA",
    "lora": "weights of the LoRA",
    "lowrank": "weights",
    "full": "weights",
}
CONTROL_SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
"""Factors on all singular values, of A and of B: the LoRA's delta grows with their square."""


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    parametrization: str = "svd",
    compare: str | None = None,
    say: Any = print,
    **settings: Any,
) -> dict[str, Any]:
    """Warm start, search, control, report.

    Args:
        output_dir: a folder that is not there yet, or empty.
        seed: of the warm start and of the search.
        parametrization: what is searched, as in `ESSAConfig`.
        compare: "grpo" also runs TRL's GRPOTrainer from the same warm start on the same prompts.
        say: prints a line.
        settings: `ESSAConfig` fields that replace the demo's own.

    Returns:
        What `output_dir/summary.json` holds.

    Raises:
        InputError: an argument cannot be used.
    """
    folder = Path(output_dir).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output_dir {str(output_dir)!r} is there already and not empty; choose another")
    if compare not in (None, "grpo"):
        raise InputError(f"compare must be 'grpo' or None, got {compare!r}")
    if compare:
        from essa.demo.grpo import check_trl, run_grpo

        check_trl()
    args = ESSAConfig(
        output_dir=str(folder / "essa"),
        seed=seed,
        max_new_tokens=MAX_NEW_TOKENS,
        run_name="ESSA demo",
        **{**(SEARCH if parametrization == "svd" else SEARCH_OF_WEIGHTS), **settings},
        parametrization=parametrization,
    )
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in task.SPLIT_SIZES}
    for name, path in files.items():
        task.write_jsonl(path, task.rows(task.split(name)))
    warm_start = folder / "warm_start"
    say("Warm start: a LoRA trained on flawed demonstrations of addition ...")
    make_warm_start(warm_start, seed)

    trainer = ESSATrainer(
        str(BASE_MODEL),
        "exact_match",
        args,
        train_dataset=task.rows(task.split("train")),
        eval_dataset=task.rows(task.split("validation")),
        adapter=str(warm_start),
    )
    before = test_accuracy(trainer)
    say(f"Search: {trainer.search.dim:,} {SEARCHED[args.parametrization]} ...")
    search, output = trainer.train(), trainer.search.space.output
    after = test_accuracy(trainer)
    scale, control = uniform_scale_control(trainer, warm_start)
    summary = {
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_control": control,
        "control_scale": scale,
        "samples": search["samples"],
        "seconds": search["seconds"],
        "seed": seed,
        "base_model": str(BASE_MODEL.resolve()),
        "warm_start": str(warm_start),
        "train_file": str(files["train"]),
        "validation_file": str(files["validation"]),
        "test_file": str(files["test"]),
        output: str(folder / "essa" / output),
        "report": str(folder / "essa" / "report.html"),
    }
    curves = [Curve("best uniform scale (control)", [], [], [control], "level")]
    if compare:
        say("GRPO: TRL's GRPOTrainer from the same warm start ...")
        grpo = run_grpo(warm_start, args, search["samples"], seed)
        summary["grpo"] = {"accuracy_after": grpo.accuracy, "samples": grpo.samples[-1], "seconds": grpo.seconds[-1]}
        curves.append(Curve("GRPO, evaluation", grpo.samples, grpo.seconds, grpo.values))
    summary["seconds_total"] = time.perf_counter() - started
    rows = result_rows(summary)
    title = f"ESSA demo: exact match on unseen problems {before:.3f} before, {after:.3f} after"
    write_report(args.output_dir, title=title, name="ESSA", curves=curves, tables=[Table("Test problems", rows)])
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, value in rows:
        say(f"  {name:<42}{value}")
    say(f"{output + ':':<8} {summary[output]}\nreport:  {summary['report']}")
    return summary


def test_accuracy(trainer: ESSATrainer) -> float:
    """Exact match on the test problems, of the model as it is: in plain PEFT or transformers."""
    return _accuracy(trainer.model, trainer, "test")


def uniform_scale_control(trainer: ESSATrainer, warm_start: Path) -> tuple[float, float]:
    """The best that one number can do: the warm start's singular values times a factor, chosen on validation.

    Returns:
        The factor and its accuracy on the test problems.
    """
    model = load_adapter(load_base(str(BASE_MODEL))[0], str(warm_start))
    space = SVDLoRA.from_peft(model)

    def accuracy(scale: float, split: str) -> float:
        return _accuracy(model, trainer, split, space=space, values=scale * space.spectrum[None])

    best = max(CONTROL_SCALES, key=lambda scale: accuracy(scale, "validation"))
    return best, accuracy(best, "test")


def result_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("warm start", f"{summary['accuracy_before']:.3f}"),
        (f"best uniform scale of it (x {summary['control_scale']:g})", f"{summary['accuracy_control']:.3f}"),
        ("ESSA", _with_cost(summary["accuracy_after"], summary["samples"], summary["seconds"])),
    ]
    if "grpo" in summary:
        grpo = summary["grpo"]
        rows.append(("GRPO (TRL)", _with_cost(grpo["accuracy_after"], grpo["samples"], grpo["seconds"])))
    return rows


def _with_cost(accuracy: float, samples: int, seconds: float) -> str:
    return f"{accuracy:.3f}  after {samples:,} samples, {seconds:.1f} s"


def _accuracy(model: Any, trainer: ESSATrainer, split: str, **population: Any) -> float:
    rewards, tokenizer = trainer.rewards, trainer.processing_class
    rows = task.rows(task.split(split))
    prompts = check_prompts(rows, model, tokenizer, rewards, name=split, max_new_tokens=MAX_NEW_TOKENS)
    numbers = evaluate(
        model,
        tokenizer,
        prompts,
        rewards,
        max_new_tokens=MAX_NEW_TOKENS,
        row_budget=trainer.args.row_budget,
        **population,
    )
    return numbers["reward"]
