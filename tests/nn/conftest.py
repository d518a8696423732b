"""Tiny models with a random LoRA, one for each supported family."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 48
ENDS = [1, 5, 9, 13, 18, 24]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT_NEOX = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}

MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
BAMBA = {**LLAMA_LIKE, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}

# model_type -> (configuration, layers to adapt)
FAMILIES = {
    "qwen2": (LLAMA_LIKE, SEVEN),
    "qwen3": (LLAMA_LIKE, SEVEN),
    "llama": (LLAMA_LIKE, SEVEN),
    "mistral": ({**LLAMA_LIKE, "sliding_window": 5}, SEVEN),
    "gemma2": ({**LLAMA_LIKE, **ALTERNATING}, SEVEN),
    "gemma3_text": ({**LLAMA_LIKE, **ALTERNATING}, SEVEN),
    "phi3": (LLAMA_LIKE, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt_neox": (GPT_NEOX, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "gpt2": (GPT2, ["c_attn", "c_proj", "c_fc"]),
    "lfm2": (
        {**LLAMA_LIKE, "layer_types": ["conv", "full_attention"]},
        ["in_proj", "out_proj", "q_proj", "v_proj", "w1"],
    ),
    "bamba": ({**BAMBA, "mamba_n_groups": 1}, ["q_proj", "v_proj", "gate_proj"]),
    "qwen3_next": (
        {**LLAMA_LIKE, **MOE, **LINEAR_ATTENTION},
        ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GEMMA3N = {
    **ALTERNATING,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
MORE_FAMILIES = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, ["query_key_value", "dense"]),
    "cohere2": ({**LLAMA_LIKE, **ALTERNATING}, SEVEN),
    "deepseek_v3": ({**LLAMA_LIKE, **MOE, **MLA}, ["q_a_proj", "kv_b_proj", "o_proj"]),
    "ernie4_5": (LLAMA_LIKE, SEVEN),
    "exaone4": ({**LLAMA_LIKE, **ALTERNATING}, SEVEN),
    "falcon": (GPT_NEOX, ["query_key_value", "dense"]),
    "falcon_h1": ({**LLAMA_LIKE, **FALCON_H1}, ["q_proj", "v_proj", "gate_proj"]),
    "gemma3n_text": ({**LLAMA_LIKE, **GEMMA3N}, SEVEN),
    "glm4": (LLAMA_LIKE, ATTENTION),
    "gpt_oss": ({**LLAMA_LIKE, **MOE, **ALTERNATING}, ATTENTION),
    "granite": (LLAMA_LIKE, SEVEN),
    "jamba": ({**LLAMA_LIKE, **MOE, **JAMBA}, ["q_proj", "v_proj"]),
    "llama4_text": ({**LLAMA_LIKE, **MOE}, ATTENTION),
    "minimax": (
        {**LLAMA_LIKE, **MOE, "layer_types": ["linear_attention", "full_attention"]},
        ["q_proj", "v_proj", "out_proj"],
    ),
    "mixtral": ({**LLAMA_LIKE, **MOE}, ATTENTION),
    "olmo3": ({**LLAMA_LIKE, **ALTERNATING}, SEVEN),
    "opt": (OPT, ["q_proj", "v_proj", "fc1"]),
    "phi": (GPT_NEOX, ["q_proj", "v_proj", "fc1"]),
    "qwen3_moe": ({**LLAMA_LIKE, **MOE}, ATTENTION),
    "qwen3_5_text": ({**LLAMA_LIKE, **LINEAR_ATTENTION}, ["q_proj", "v_proj", "out_proj"]),
    "smollm3": (LLAMA_LIKE, SEVEN),
    "starcoder2": ({**LLAMA_LIKE, "sliding_window": 5}, ["q_proj", "v_proj", "c_fc"]),
}


def build_base(family: str, dtype: torch.dtype = torch.float32):
    settings, _ = (FAMILIES | MORE_FAMILIES)[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=ENDS,
        pad_token_id=0,
        tie_word_embeddings=False,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def build(family: str, dtype: torch.dtype = torch.float32, **options):
    """A PeftModel whose LoRA changes what it says."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": (FAMILIES | MORE_FAMILIES)[family][1], **options}
    model = get_peft_model(build_base(family, dtype), LoraConfig(**settings)).eval()
    randomise(model)
    return model


def randomise(model) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)


def perturbed(space, members: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return space.spectrum * (1 + 0.5 * torch.randn(members, space.size, generator=generator))


@pytest.fixture(scope="session")
def tokenizer():
    """Every word is a number and every number its own token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")
