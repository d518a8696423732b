"""Small random models of many families, and preference rows over the demo tokenizer's alphabet."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from essa.trdpo import TRDPOConfig, TRDPOTrainer
from peft import LoraConfig, PeftModel, get_peft_model

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
# name -> class, settings that make its peculiarities matter at this size
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, **WINDOW}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.3, "attn_logit_softcapping": 0.5, **WINDOW}),
    "gemma3": ("Gemma3", {"head_dim": 8, **WINDOW}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", GPT2),
    "granite": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0}),
    "cohere": ("Cohere", {"logit_scale": 0.4}),
    "cohere2": ("Cohere2", {"logit_scale": 0.4, **WINDOW}),
    "olmo2": ("Olmo2", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": 7}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "ernie4_5": ("Ernie4_5", {}),
    "exaone4-window": ("Exaone4", WINDOW),
    "glm4": ("Glm4", {"head_dim": 8}),
    "ministral-window": ("Ministral", {"head_dim": 8, **WINDOW}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo3-window": ("Olmo3", WINDOW),
    "phi": ("Phi", {}),
    "qwen3_moe-window": ("Qwen3Moe", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, **MOE}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}
FAMILIES = {name: (kind, own) for name, (kind, own) in FAMILIES.items() if hasattr(transformers, f"{kind}Config")}


def make_model(family="llama", **settings):
    """A small random causal language model in float32, its weights large enough for attention to matter."""
    kind, own = FAMILIES.get(family, (family, {}))
    name = {"Gemma3": "Gemma3Text"}.get(kind, kind)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **own, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float()


@pytest.fixture
def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)


@pytest.fixture
def peft_model(lora):
    """A LoRA whose B is not zero, so that it matters."""
    model = get_peft_model(make_model(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def make_pairs(count, seed=0, longest=10):
    """Text pairs of the demo tokenizer's alphabet, of many lengths."""
    rng = random.Random(seed)

    def text(least):
        return "".join(rng.choice("0123456789+=") for _ in range(rng.randint(least, longest)))

    return [{"prompt": "?" + text(1), "chosen": text(1), "rejected": text(1)} for _ in range(count)]


def make_judged(count, seed=0):
    rng = random.Random(seed)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in make_pairs(count, seed)]
    return [{**row, "label": number % 2 == 0 or rng.random() < 0.3} for number, row in enumerate(rows)]


@pytest.fixture
def make(tokenizer, tmp_path, lora):
    """A small trainer; keyword arguments of the trainer's own are taken out, the rest are settings."""

    def make(model=None, rows=None, *, name="run", whole=False, callbacks=None, **settings):
        small = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 2}
        fixed = {"use_cpu": True, "report": False, "disable_tqdm": True, "save_strategy": "no", "beta": 0.2}
        own = {key: settings.pop(key) for key in ("eval_dataset", "ref_model") if key in settings}
        args = TRDPOConfig(str(tmp_path / name), **{**small, **fixed, "ref_model_sync_steps": 3, **settings})
        return TRDPOTrainer(
            make_model() if model is None else model,
            args=args,
            train_dataset=make_pairs(24) if rows is None else rows,
            processing_class=tokenizer,
            peft_config=None if whole or isinstance(model, PeftModel) else lora,
            callbacks=callbacks,
            **own,
        )

    return make
