"""Peak memory of an ESSA generation and of a step of TRL's GRPO, on the same model, prompts and completions.

    python -m benchmarks.memory

Every measurement is a process of its own, whose largest resident size the kernel reports. The model has the shapes of a
0.5 B Qwen2, in bfloat16 with random weights; 16 completions to a batch. ESSA runs with populations of 8, 32 and 128: what
does not grow with them must come out the same. GRPO trains the same LoRA, or all weights.
`results/memory.json` keeps the numbers, `.md` the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare import resident

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
POPULATIONS = (8, 32, 128)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build() -> tuple[Any, Any]:
    """A random 0.5 B model in bfloat16 and a tokenizer."""
    import torch
    from essa.demo.warm_start import BASE_MODEL
    from essa.models import load_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SHAPE))
    torch.set_default_dtype(torch.float32)
    return model, load_tokenizer(str(BASE_MODEL))


def with_lora(model: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return adapted


def prompts() -> list[dict[str, str]]:
    return [{"prompt": f"{number % 10}" * PROMPT_WORDS} for number in range(ROWS)]


def no_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


def nothing() -> None:
    """The libraries alone."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401


def weights() -> None:
    build()


def essa(population: int) -> None:
    from essa import ESSAConfig, ESSATrainer

    model, tokenizer = build()
    with tempfile.TemporaryDirectory() as folder:
        args = ESSAConfig(
            str(Path(folder, "run")),
            strategy="cma-diagonal",
            population_size=population,
            prompts_per_generation=1,
            generations=1,
            max_new_tokens=NEW_TOKENS,
            row_budget=ROWS,
            progress=False,
        )
        ESSATrainer(with_lora(model), no_reward, args, prompts(), processing_class=tokenizer).train()


def grpo(lora: bool) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = build()
    model = with_lora(model) if lora else model
    with tempfile.TemporaryDirectory() as folder:
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
        GRPOTrainer(
            model, no_reward, config, train_dataset=Dataset.from_list(prompts()), processing_class=tokenizer
        ).train()


CASES: dict[str, Any] = {
    "libraries alone": nothing,
    "weights": weights,
    **{f"ESSA, population {population}": lambda population=population: essa(population) for population in POPULATIONS},
    "GRPO, the same LoRA": lambda: grpo(True),
    "GRPO, all weights": lambda: grpo(False),
}


def peak_of(case: str) -> int:
    """Bytes, of a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    base, essa_peak = peaks["libraries alone"], peaks[f"ESSA, population {POPULATIONS[-1]}"]
    lines = [
        (
            "Largest resident size of a process, random Qwen2 0.5 B in bfloat16, CPU; one generation or step of "
            f"{ROWS} completions to a batch, prompts of {PROMPT_WORDS} tokens, {NEW_TOKENS} new ones. GRPO: TRL's trainer without "
            "a reference model (beta 0) and without gradient checkpointing, LoRA of rank 8 on all linear layers, or all "
            "weights."
        ),
        "",
        "Command: `python -m benchmarks.memory`",
        "",
        "| process | MiB | beyond the libraries | ratio to ESSA's beyond them |",
        "|---|---|---|---|",
    ]
    for case, peak in peaks.items():
        lines.append(
            f"| {case} | {peak / 2**20:,.0f} | {(peak - base) / 2**20:,.0f} | {(peak - base) / (essa_peak - base):.2f} |"
        )
    lines += [
        "",
        f"`essa plan` reckons {plan['weights'] / 2**20:,.0f} MiB of weights and {plan['rows'] / 2**20:,.0f} MiB for the rows.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    if options.case:
        CASES[options.case]()
        print(resident("VmHWM"))
        return
    results: dict[str, Any] = {"peaks": {}, "plan": predicted()}
    for case in CASES:
        results["peaks"][case] = peak_of(case)
        print(f"{case}: {results['peaks'][case] / 2**20:,.0f} MiB", flush=True)
    RESULTS.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
