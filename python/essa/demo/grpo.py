"""The rival: TRL's GRPOTrainer on the demo's warm start, with its curve against samples and seconds."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from essa.config import ESSAConfig, InputError
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL
from essa.evaluate import check_prompts, evaluate
from essa.models import load_tokenizer
from essa.rewards import Rewards, exact_match

LEARNING_RATE = 3e-3


@dataclass
class GRPORun:
    """A learning curve on the validation problems (evaluation is not in `seconds`) and the accuracy on test."""

    samples: list[int]
    seconds: list[float]
    values: list[float]
    accuracy: float


def check_trl() -> None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise InputError("compare='grpo' needs TRL: pip install 'essa-kernels[compare]'") from error


def run_grpo(
    warm_start: Path,
    args: ESSAConfig,
    samples: int,
    seed: int,
    num_generations: int = 8,
    validation: list[dict[str, str]] | None = None,
) -> GRPORun:
    """Train for about `samples` completions, as many per step as a generation of ESSA's draws.

    Args:
        warm_start: the adapter to start from; all its LoRA weights are trained.
        args: ESSA's settings, for what both share.
        samples: the budget of completions.
        seed: of the prompts' order and of the sampling.
        num_generations: completions per prompt.
        validation: the rows of the curve; None takes all validation problems.
    """
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = load_tokenizer(str(BASE_MODEL))
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    model = PeftModel.from_pretrained(base, str(warm_start), is_trainable=True)
    rewards = Rewards("exact_match", None)

    watched = validation or task.rows(task.split("validation"))

    def accuracy(rows: list[dict[str, str]]) -> float:
        prompts = check_prompts(rows, model, tokenizer, rewards, name="rows", max_new_tokens=args.max_new_tokens)
        return evaluate(
            model, tokenizer, prompts, rewards, max_new_tokens=args.max_new_tokens, row_budget=args.row_budget
        )["reward"]

    per_step = args.prompts_per_generation * num_generations
    steps = max(1, samples // per_step)
    every = args.eval_steps or steps
    reward: Any = exact_match  # TRL's type is of lists that may hold None, and list is invariant
    run = GRPORun([0], [0.0], [accuracy(watched)], 0.0)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()
            self.seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds += time.perf_counter() - self.started
            if state.global_step % every == 0 or state.global_step == steps:
                run.samples.append(state.global_step * per_step)
                run.seconds.append(self.seconds)
                run.values.append(accuracy(watched))
            self.started = time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            per_device_train_batch_size=per_step,
            num_generations=num_generations,
            max_completion_length=args.max_new_tokens,
            temperature=1.0,
            beta=0.0,
            max_steps=steps,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model,
            reward,
            config,
            train_dataset=Dataset.from_list(task.rows(task.split("train"))),
            processing_class=tokenizer,
            callbacks=[Watch()],
        ).train()
    run.accuracy = accuracy(task.rows(task.split("test")))
    return run
