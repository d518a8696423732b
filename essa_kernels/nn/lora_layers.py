"""The LoRA layers of a model, if their adapter is one that singular values alone describe.

A population replaces what a LoRA layer computes, ``base(x) + scaling * B A x``. Whatever else an adapter may hold, a
bias, a magnitude, a whole retrained module, would be lost without a word, so it is refused by name here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .model_weights import named_text_weights, of_routed_experts

MAKE_ONE = "make one with peft.get_peft_model(model, peft.LoraConfig(...)) and train it, or with `essa sft`"

# LoraConfig field -> what it adds to a layer
REFUSED_OPTIONS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trainable token embeddings",
    "target_parameters": "LoRA on bare parameters",
    "use_qalora": "QA-LoRA's pooled input",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron's parallel layers",
}


def find_lora_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, Any]]:
    """The layers adapted by ``adapter_name`` with their names in the base model, sorted by name.

    Raises:
        ValueError: there is no such LoRA adapter, it is not the one active adapter, it is merged or disabled, or it
            uses an option that singular values cannot carry.
    """
    from peft.tuners.lora import LoraLayer

    _check_config(model, adapter_name)
    found: list[tuple[str, Any]] = []
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    of_text = {id(weight) for _, weight in named_text_weights(base)}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")
            check_active(name, module, adapter_name)
            if adapter_name in module._get_available_adapters():
                _check_layer(name, module, adapter_name)
                if id(module.lora_A[adapter_name].weight) not in of_text:
                    raise ValueError(f"{name}: LoRA on what text does not go through is not supported")
                found.append((name, module))
    if not found:
        raise ValueError(
            f"model: no layer carries the LoRA adapter {adapter_name!r}, looked for PEFT's LoRA layers among the "
            f"modules of {type(model).__name__}; {MAKE_ONE}"
        )
    return sorted(found, key=lambda item: item[0])


def check_active(name: str, module: Any, adapter_name: str) -> None:
    """Raise unless ``adapter_name`` alone decides what the layer computes."""
    if list(module.active_adapters) != [adapter_name]:
        raise ValueError(
            f"{name}: the only active adapter must be {adapter_name!r}, active are {list(module.active_adapters)}; "
            f"call set_adapter({adapter_name!r})"
        )
    if module.merged:
        raise ValueError(f"{name}: adapters {module.merged_adapters} are merged into the base weight; unmerge them")
    if module.disable_adapters:
        raise ValueError(f"{name}: its adapters are disabled; enable them")


def _check_config(model: nn.Module, adapter_name: str) -> None:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        raise ValueError(
            f"model must carry a PEFT LoRA adapter, looked for peft_config on {type(model).__name__}; {MAKE_ONE}"
        )
    if adapter_name not in configs:
        raise ValueError(f"adapter_name must be one of {sorted(configs)}, got {adapter_name!r}")
    config = configs[adapter_name]
    peft_type = getattr(config.peft_type, "value", config.peft_type)
    if peft_type != "LORA":
        raise ValueError(f"adapter {adapter_name!r} must be a LoRA, got {peft_type}; {MAKE_ONE}")
    for option, meaning in REFUSED_OPTIONS.items():
        value = getattr(config, option, None)
        if value:
            raise ValueError(f"adapter {adapter_name!r}: {option}={value!r} is not supported ({meaning})")
    if config.bias != "none":
        raise ValueError(f"adapter {adapter_name!r}: bias={config.bias!r} is not supported, only bias='none'")


def _check_layer(name: str, module: Any, adapter_name: str) -> None:
    base = module.get_base_layer()
    if adapter_name in module.lora_embedding_A or isinstance(base, nn.Embedding):
        raise ValueError(f"{name}: LoRA on an embedding is not supported, only on linear layers")
    if of_routed_experts(name):
        raise ValueError(f"{name}: LoRA on routed experts is not supported, their rows cannot be told apart by member")
    variant = getattr(module, "lora_variant", {}).get(adapter_name)
    if variant is not None:
        raise ValueError(f"{name}: the LoRA variant {type(variant).__name__} is not supported")
    factors = module.lora_A[adapter_name], module.lora_B[adapter_name]
    kind = type(base).__name__
    if isinstance(base, nn.MultiheadAttention) or not all(type(factor) is nn.Linear for factor in factors):
        raise ValueError(f"{name}: LoRA on a {kind} is not supported, only on linear layers")
    if any(factor.bias is not None for factor in factors):
        raise ValueError(f"{name}: a bias in lora_A or lora_B (lora_bias) is not supported")
    if getattr(module, "fan_in_fan_out", False) and kind != "Conv1D":
        raise ValueError(f"{name}: fan_in_fan_out=True is supported on Conv1D only, got {kind}")
    for factor, part in zip(factors, ("lora_A", "lora_B"), strict=True):
        if factor.weight.is_meta:
            raise ValueError(f"{name}: {part} has no data (it is on the meta device)")
        if not torch.isfinite(factor.weight).all():
            raise ValueError(f"{name}: {part} holds NaN or infinity")
