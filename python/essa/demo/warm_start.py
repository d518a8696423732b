"""The demo's warm start: a LoRA fine-tuned on flawed demonstrations, so it answers right about four times in ten."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from essa.demo import task
from essa.demo.make_base_model import encode

BASE_MODEL = Path(__file__).parent / "base_model"
STEPS, BATCH, LEARNING_RATE = 120, 64, 2e-3
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_warm_start(output_dir: Path, seed: int) -> None:
    """Writes a rank-8 PEFT adapter of the demo's base model to `output_dir`. Deterministic in `seed`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGET_MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE_MODEL), config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    problems, rng = task.split("train"), random.Random(seed)
    for _ in range(STEPS):
        input_ids, labels = encode(tokenizer, task.demonstrations(problems, BATCH, task.DEMONSTRATION_MIXTURE, rng))
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(str(output_dir))
