"""Peak memory of an ESSA generation and of a step of TRL's GRPO, on the same model, prompts and completions.

    python -m benchmarks.memory [--cases "libraries alone" weights "ESSA full, population 8" ...] [--threads 1]

Every measurement is a process of its own, whose allocator keeps nothing that is freed. It makes its model and its trainer, and
only then does the kernel's mark of its largest resident size start. The model has the shapes of a 0.5 B Qwen2, in bfloat16
with random weights; 16 completions to a batch. ESSA searches every parametrisation with populations of 8 and 512: what does
not grow with them must come out the same. GRPO trains the same LoRA, or all weights.
`results/memory.json` keeps the numbers, `.md` the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from essa.config import PARAMETRIZATIONS

from benchmarks.compare import give_back_freed, resident

RESULTS = Path(__file__).parent / "results" / "memory"
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROWS, PROMPT_WORDS, NEW_TOKENS = 16, 64, 16
POPULATIONS = (8, 512)
# Left to adapt, glibc keeps what is freed: with it the same generation came out up to 120 MiB apart.
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build() -> tuple[Any, Any]:
    """A random 0.5 B model in bfloat16 and a tokenizer."""
    from essa.demo.warm_start import BASE_MODEL
    from essa.models import load_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPE))
    torch.set_default_dtype(torch.float32)
    return model, load_tokenizer(str(BASE_MODEL))


def with_lora(model: Any, target_modules: list[str] = TARGETS, std: float = 0.01) -> Any:
    """A random adapter of rank 8 that changes what the model computes."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=target_modules))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return adapted


def prompts() -> list[dict[str, str]]:
    return [{"prompt": f"{number % 10}" * PROMPT_WORDS} for number in range(ROWS)]


def no_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def any_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Of members that all fared alike nothing would be learnt."""
    return [random.random() for _ in completions]


# A case prepares its work, which is what is measured.
Work = Callable[[], object]


def libraries(folder: str) -> Work:
    from essa import ESSATrainer

    return lambda: ESSATrainer


def weights(folder: str) -> Work:
    model, _ = build()
    return lambda: model


def essa(parametrization: str, population: int, folder: str) -> Work:
    """A generation, but for what is written of it, after a small one that warms everything up. A member answers two prompts,
    so that eight fill a batch."""
    from essa import ESSAConfig, ESSATrainer

    from benchmarks.methods import peak_of_a_generation

    model, tokenizer = build()
    model = with_lora(model) if parametrization in ("svd", "lora") else model

    def search(members: int) -> Any:
        args = ESSAConfig(
            folder,
            parametrization=parametrization,
            strategy="cma-diagonal" if parametrization == "svd" else "es",
            population_size=members,
            prompts_per_generation=2,
            generations=1,
            max_new_tokens=NEW_TOKENS,
            row_budget=ROWS,
            progress=False,
        )
        return ESSATrainer(model, any_reward, args, prompts(), processing_class=tokenizer)

    peak_of_a_generation(search(min(POPULATIONS)))
    gc.collect()
    return partial(peak_of_a_generation, search(population))


def grpo(lora: bool, folder: str) -> Work:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = build()
    model = with_lora(model) if lora else model
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=ROWS,
        num_generations=8,
        max_completion_length=NEW_TOKENS,
        beta=0.0,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(prompts())
    return GRPOTrainer(model, any_reward, config, train_dataset=rows, processing_class=tokenizer).train


CASES: dict[str, Callable[[str], Work]] = {
    "libraries alone": libraries,
    "weights": weights,
    **{
        f"ESSA {parametrization}, population {population}": partial(essa, parametrization, population)
        for parametrization in PARAMETRIZATIONS
        for population in POPULATIONS
    },
    "GRPO, the same LoRA": partial(grpo, True),
    "GRPO, all weights": partial(grpo, False),
}


def peak(case: str) -> int:
    """Bytes of this process, which does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        work = CASES[case](folder)
        give_back_freed()
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
        work()
        return resident("VmHWM")


def measured_apart(case: str, threads: int) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", case, "--threads", str(threads)]
    done = subprocess.run(command, env=os.environ | KEEP_NOTHING, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return int(done.stdout.strip().splitlines()[-1])


def predicted() -> dict[str, float]:
    """Bytes of weights and of the rows of a chunk, as `essa plan` reckons."""
    from essa.plan import Job, Shape, row_bytes, weight_bytes
    from transformers import AutoConfig

    shape = Shape.of(AutoConfig.for_model("qwen2", **SHAPE))
    job = Job(ROWS, 1, PROMPT_WORDS, NEW_TOKENS)
    return {"weights": weight_bytes(shape, job), "rows": ROWS * row_bytes(shape, job)}


def table(results: dict[str, Any]) -> str:
    peaks, plan = results["peaks"], results["plan"]
    base, loaded = peaks["libraries alone"], peaks["weights"]
    lines = [
        (
            "Largest resident size of a process, from when its trainer is ready (an ESSA's, after a first generation), random "
            f"Qwen2 0.5 B in bfloat16, CPU; one generation or step of {ROWS} completions to a batch, prompts of {PROMPT_WORDS} tokens, {NEW_TOKENS} new ones. "
            "A member of a population answers two prompts; singular values are searched by cma-diagonal, all else by es; of full "
            "weights one member is computed at a time. "
            "GRPO: TRL's trainer without a reference model (beta 0) and without gradient checkpointing. LoRA of rank 8 on all "
            "linear layers where there is one."
        ),
        "",
        "Command: `python -m benchmarks.memory`",
        "",
        "| process | MiB | beyond the libraries | beyond libraries and weights |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        if case in peaks:
            beyond = f"{(peaks[case] - loaded) / 2**20:,.0f}" if peaks[case] > loaded else ""
            lines.append(f"| {case} | {peaks[case] / 2**20:,.0f} | {(peaks[case] - base) / 2**20:,.0f} | {beyond} |")
    lines += [
        "",
        f"`essa plan` reckons {plan['weights'] / 2**20:,.0f} MiB of weights and {plan['rows'] / 2**20:,.0f} MiB for the rows.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="the others' numbers stay")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS.with_suffix(".json"))
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(peak(options.case))
        return
    kept = json.loads(options.output.read_text())["peaks"] if options.output.exists() else {}
    results: dict[str, Any] = {"peaks": {case: kept[case] for case in CASES if case in kept}, "plan": predicted()}
    for case in options.cases:
        results["peaks"][case] = measured_apart(case, options.threads)
        print(f"{case}: {results['peaks'][case] / 2**20:,.0f} MiB", flush=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
