"""What a generation takes does not grow with its population: rows are evaluated chunk by chunk, noise is never stored."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from essa.config import PARAMETRIZATIONS
from essa.demo.warm_start import TARGET_MODULES
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.compare import give_back_freed
from benchmarks.methods import peak_of_a_generation

BOUND = 8 * 2**20  # runs took 5 MiB at most: activations, answers, a chunk's singular values
# Their noise, if it were kept, would be 28 MiB, 512, 64 and 144, or half of that if pairs shared it.
POPULATIONS = {"svd": 2048, "lora": 256, "lowrank": 2048, "full": 64}


def toy_model(parametrization: str) -> torch.nn.Module:
    """A member has much noise and little to compute."""
    config = Qwen2Config(
        vocab_size=20,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).eval()
    if parametrization in ("svd", "lora"):
        model = get_peft_model(model, LoraConfig(r=64, target_modules=TARGET_MODULES, init_lora_weights=False))
    return model


def any_reward(completions: list[str], **columns: object) -> list[float]:
    """Members that all fared alike would leave the noise unused."""
    return [random.random() for _ in completions]


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_a_generation_keeps_no_noise(make_trainer, tokenizer, one_thread, parametrization, seed):
    try:
        Path("/proc/self/clear_refs").write_text("5")
        give_back_freed()
    except (OSError, AttributeError) as error:
        pytest.skip(f"needs Linux and glibc: {error}")
    for members in (32, POPULATIONS[parametrization]):  # the first warms everything up
        trainer = make_trainer(
            model=toy_model(parametrization),
            reward_funcs=any_reward,
            adapter=None,
            processing_class=tokenizer,
            parametrization=parametrization,
            strategy="es",
            population_size=members,
            prompts_per_generation=1,
            row_budget=16,
            eval_dataset=None,
        )
        start = trainer.search.space.parameters[0].clone()
        give_back_freed()
        _, taken = peak_of_a_generation(trainer)
        assert not torch.equal(trainer.search.space.parameters[0], start)
    assert taken < BOUND
