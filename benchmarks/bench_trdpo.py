"""Preference alignment beside TRL: seconds of an optimiser step, peak memory, and the cost of moving the reference.

Both trainers get the same model, LoRA, rows, order and settings (float32, no gradient checkpointing). Before a time counts
they take a few steps on the same pairs again and again, both references fixed: the loss must fall by 100 times what the two
curves may be apart. Ours is timed with its reference moving; TRL's cannot move with PEFT.

    python -m pytest benchmarks/bench_trdpo.py --benchmark-only --results benchmarks/results/trdpo
    python -m benchmarks.bench_trdpo ours|trl 151936     peak memory of one trainer, alone in a process
"""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from .compare import compare, resident, timed

PAIRS, STEPS, LONG, SHORT = 2, 4, 512, 64
APART, FALL = 1e-4, 1e-2
"""What the losses of a step may be apart, and how far they must fall for that to mean something."""
SHAPES = {"prompt : completion = 8 : 1": (LONG, SHORT), "prompt : completion = 1 : 8": (SHORT, LONG)}
RIVAL = "TRL DPOTrainer, PEFT"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS = {
    "per_device_train_batch_size": PAIRS,
    "max_steps": STEPS,
    "learning_rate": 3e-4,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "beta": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "max_length": LONG + SHORT + 1,
}


def make_model(vocabulary: int) -> Qwen2ForCausalLM:
    """About 20 M parameters with a vocabulary of 32 k."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"</s>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def make_rows(vocabulary: int, prompt: int, completion: int, count: int) -> list[dict[str, str]]:
    """Pairs whose lengths vary by a quarter around what is asked for."""
    rng = random.Random(0)

    def words(size: int) -> str:
        return "".join(f" w{rng.randrange(1, vocabulary)}" for _ in range(rng.randint(size * 3 // 4, size)))

    return [{"prompt": words(prompt), "chosen": words(completion), "rejected": words(completion)} for _ in range(count)]


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def make_ours(model: Any, rows: list, tokenizer: Any, folder: str, **settings: Any) -> Any:
    from essa.trdpo import TRDPOConfig, TRDPOTrainer

    own = {"ref_model_sync_steps": 2, "report": False, **settings}
    args = TRDPOConfig(folder, **{**SETTINGS, **own})
    return TRDPOTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(**LORA)
    )


def make_trl(model: Any, rows: list, tokenizer: Any, folder: str) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(folder, **{**SETTINGS, "bf16": False, "gradient_checkpointing": False})
    data = Dataset.from_list(rows)
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=LoraConfig(**LORA))


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def step_seconds(trainer: Any) -> Any:
    """Trains and returns the seconds of the fastest step."""

    def once() -> float:
        times = StepTimes()
        trainer.add_callback(times)
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        trainer.remove_callback(times)
        return min(times.seconds)

    return once


@dataclass(frozen=True)
class Curve:
    """The losses of both trainers, step by step."""

    what: str
    rival: str
    ours: list[float]
    rivals: list[float]

    @property
    def apart(self) -> float:
        return max(abs(mine - theirs) for mine, theirs in zip(self.ours, self.rivals, strict=True))

    def as_row(self) -> str:
        mine, theirs = (f"{curve[0]:.4f} -> {curve[-1]:.4f}" for curve in (self.ours, self.rivals))
        return f"| {self.what} | {mine} | {self.rival} | {theirs} | at most {self.apart:.0e} apart |"

    def as_dict(self) -> dict:
        return {**asdict(self), "apart": self.apart}


def check(curve: Curve) -> Curve:
    assert curve.ours[0] - curve.ours[-1] > FALL
    assert curve.apart < APART
    return curve


@pytest.mark.parametrize("shape", SHAPES)
def test_step_time(benchmark, record, remark, shape, tmp_path, vocabulary=32_000):
    with torch.inference_mode(False):
        base, tokenizer = make_model(vocabulary), make_tokenizer(vocabulary)
        rows = make_rows(vocabulary, *SHAPES[shape], PAIRS)
        # The reference of both is fixed where their curves are compared: TRL's cannot move.
        ours = make_ours(copy.deepcopy(base), rows, tokenizer, str(tmp_path / "same"), ref_update="none")
        theirs = make_trl(copy.deepcopy(base), rows, tokenizer, str(tmp_path / "trl"))
    step_seconds(ours)(), step_seconds(theirs)()
    record(check(Curve(f"loss of {STEPS} steps on the same pairs, {shape}", RIVAL, losses(ours), losses(theirs))))
    with torch.inference_mode(False):
        moving = make_ours(base, rows, tokenizer, str(tmp_path / "ours"))
    benchmark.pedantic(step_seconds(moving), rounds=1)
    name = f"optimiser step, LoRA, {PAIRS} pairs, {shape}, vocabulary 32 k"
    record(compare(name, step_seconds(moving), RIVAL, step_seconds(theirs), rounds=2))
    remark(
        "A Qwen2 of 20.8 M parameters (256 wide, 12 layers) in float32, LoRA r=16 on every linear layer, no gradient "
        f"checkpointing, {LONG} and {SHORT} tokens, lengths varying by a quarter. The losses are those of two fixed references, "
        "before anything is timed; then ours moves, which TRL's cannot with PEFT."
    )
    remark(
        "On CPUs TRL's fused head scores every position, on GPUs only those of completions: part of the distance is that, and "
        "these ratios say nothing of a GPU."
    )


@dataclass(frozen=True)
class Memory:
    """Megabytes of ours and of the rival, shown like a `Comparison`."""

    what: str
    rival: str
    ours_mb: float
    rival_mb: float

    def as_row(self) -> str:
        share = f"{self.ours_mb / self.rival_mb:.2f}x the memory"
        return f"| {self.what} | {self.ours_mb:,.1f} MB | {self.rival} | {self.rival_mb:,.1f} MB | {share} |"

    def as_dict(self) -> dict:
        return asdict(self)


def peak_megabytes(who: str, vocabulary: int) -> dict[str, float]:
    """Peak memory of a training run in a process of its own: all of it, and what training added to model and imports."""
    command = [sys.executable, "-m", "benchmarks.bench_trdpo", who, str(vocabulary)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_memory(benchmark, record, remark, vocabulary=151_936):
    benchmark.pedantic(lambda: None)
    ours, theirs = (peak_megabytes(who, vocabulary) for who in ("ours", "trl"))
    for key, what in (("training", "added by training"), ("total", "whole process, libraries and model included")):
        name = f"peak memory, {PAIRS} pairs, prompt : completion = 8 : 1, vocabulary 151 k, {what}"
        record(Memory(name, RIVAL, ours[key], theirs[key]))
    remark("Peaks are those of two steps in a process of its own, our reference moving; one run each.")


def test_moving_the_reference(benchmark, record, vocabulary=32_000):
    from essa.trdpo.reference import MovingReference
    from peft import get_peft_model
    from trl.trainer.callbacks import SyncRefModelCallback

    with torch.inference_mode(False):
        base = make_model(vocabulary)
        whole, target = copy.deepcopy(base), copy.deepcopy(base)
        reference = MovingReference(get_peft_model(base, LoraConfig(**LORA)))
    adapter = sum(tensor.numel() for tensor in reference.weights().values())
    model = sum(parameter.numel() for parameter in target.parameters())

    def theirs() -> None:
        SyncRefModelCallback._sync_target_model(whole, target, 0.6)

    benchmark.pedantic(lambda: reference.update(0.6, 1), rounds=3)
    rival = "TRL SyncRefModelCallback, whole model"
    ours = timed(lambda: reference.update(0.6, 1))
    record(compare("update of the reference, LoRA", ours, rival, timed(theirs), rounds=9))
    record(Memory("kept for the reference, LoRA", rival, adapter * 4 / 1e6, model * 4 / 1e6))


def main(who: str, vocabulary: int) -> None:
    import datasets  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make = {"ours": make_ours, "trl": make_trl}[who]
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(vocabulary, LONG, SHORT, PAIRS)
        trainer = make(make_model(vocabulary), rows, make_tokenizer(vocabulary), folder)
        # The second step has the optimiser's state beside everything else.
        trainer.args.max_steps = 2
        before = resident("VmRSS")
        trainer.train()
    peak = resident("VmHWM")
    print(json.dumps({"training": (peak - before) / 1e6, "total": peak / 1e6}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
