"""Loading a base model, its tokenizer and its LoRA adapter, in one place.

Weights are read from safetensors only, and code that comes with a model is run only when asked for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners import lora
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from essa.config import DTYPES, InputError
from essa.devices import check_spread, cross_between_blocks, pick_device
from essa.hub import offline_note, reach_hub
from essa.quantization import check_quantised, check_quantization, quantization_config
from essa_kernels.nn import named_text_weights

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MERGED_ROWS = 256
"""Rows of a weight that the CPU merges at a time: they and their products stay in its cache."""
PROBED = 256
"""About how many elements of a tensor go into a digest that must be cheap."""
MAKE_ADAPTER = "make one with `essa sft --model_name_or_path MODEL --dataset_name DATA --output_dir DIR`"


@dataclass(frozen=True)
class ModelSource:
    """Where a model and its warm start come from: what it takes to load the same in any process."""

    name: str
    adapter: str | None
    dtype: str = "auto"
    quantization: str = "none"
    device: str = "auto"
    trust_remote_code: bool = False

    def load(self, *, of_weights: bool = False) -> tuple[Any, PreTrainedTokenizerBase]:
        """The model `with_adapter`, and its tokenizer.

        Raises:
            InputError: one of them cannot be loaded.
        """
        base, tokenizer = load_base(
            self.name,
            dtype=self.dtype,
            quantization=self.quantization,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        return with_adapter(base, self.adapter, of_weights=of_weights), tokenizer


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    quantization: str = "none",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer, from a local folder or the hub.

    `quantization` int8 or int4 quantises its linear layers while they are loaded; a model that arrives quantised stays
    as it is. `device` "balanced" spreads the layers over all GPUs. `attn_implementation` is transformers' name of the
    attention, or None for its choice.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    dtype = check_quantization(quantization, dtype)
    target = pick_device(device)
    config = quantization_config(quantization, target)
    reach_hub(name)
    try:
        if attn_implementation is None:
            _check_attention(name)
        if config is not None and _arrives_quantised(name, trust_remote_code):
            raise InputError(f"model_name_or_path {name!r} is quantised already: leave quantization at none")
        model: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            device_map=device if device == "balanced" else {"": target},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **({"quantization_config": config} if config else {}),
            **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
        )
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model_name_or_path {name!r} cannot be loaded: {error}{offline_note()}") from error
    if config is not None:
        check_quantised(model, quantization)
    if device == "balanced":
        check_spread(model, name)
        cross_between_blocks(model)
    return model.eval(), tokenizer


def _check_attention(name: str) -> None:
    """Raise if the model's own configuration names an attention kernel on the hub, whose code would run."""
    parts = [PretrainedConfig.get_config_dict(name)[0]]
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif key.endswith("attn_implementation") and "/" in str(value):
                raise InputError(
                    f"model_name_or_path {name!r}: its config.json brings in a kernel from the hub, {key} {value!r}; name an "
                    "attn_implementation yourself"
                )


def _arrives_quantised(name: str, trust_remote_code: bool) -> bool:
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return getattr(config, "quantization_config", None) is not None


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    # transformers makes an empty one for many a folder that has none.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer knows special tokens alone; are the tokenizer's files missing?")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_model(model: Any) -> None:
    """Raise `InputError` for an object that is no model."""
    if not hasattr(model, "config"):
        raise InputError(f"model must be a name, a PeftModel or a transformers model, got {type(model).__name__}")


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that lies where a model was loaded from.

    Raises:
        InputError: there is none, so that processing_class must be given.
    """
    name = bare(model).config._name_or_path
    if not name:
        raise InputError("processing_class must be given: the model was not loaded from where its tokenizer might be")
    try:
        return load_tokenizer(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"processing_class must be given: there is no tokenizer at {name!r}, where the model was loaded from: "
            f"{error}{offline_note()}"
        ) from error


def lora_config(model: Any, rank: int, alpha: int, target_modules: str) -> LoraConfig:
    """A model's new adapter's configuration; `target_modules` are names separated by commas, or all-linear. It adapts what
    text goes through alone."""
    targets: str | list[str] = target_modules
    if target_modules != "all-linear":
        targets = [target.strip() for target in target_modules.split(",")]
    of_text = {name.rpartition(".")[0] for name, _ in named_text_weights(model)}
    other = sorted({name.rpartition(".")[0] for name, _ in model.named_parameters()} - of_text)
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, exclude_modules=other or None, task_type="CAUSAL_LM"
    )


def load_adapter(model: Any, adapter: str | None) -> PeftModel:
    """`model` with the LoRA adapter from a local folder or the hub.

    Raises:
        InputError: there is no adapter, it is not a LoRA, or it was made for another model.
    """
    if adapter is None:
        raise InputError(f"the model carries no LoRA adapter and none was given (--adapter): {MAKE_ADAPTER}")
    folder = _adapter_folder(adapter)
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise InputError(f"adapter {adapter!r} is not a PEFT adapter folder: it has no {file}; {MAKE_ADAPTER}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            saved = set(weights.keys())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"adapter {adapter!r} cannot be read: {error}") from error
    if config.peft_type != "LORA":
        raise InputError(f"adapter {adapter!r} must be a LoRA adapter, got {config.peft_type}")
    try:
        with warnings.catch_warnings():
            # PEFT only warns of missing weights; the comparison below refuses them.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            peft_model = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:
        raise InputError(f"adapter {adapter!r} does not fit this model: {error}") from error
    differing = sorted(saved ^ get_peft_model_state_dict(peft_model).keys())
    if differing:
        holder = "the adapter" if differing[0] in saved else "the model"
        raise InputError(f"adapter {adapter!r} does not fit this model: only {holder} has {differing[0]}")
    return peft_model.eval()


def merge_adapter(model: Any) -> Any:
    """The transformers model inside a PeftModel, with the one active LoRA adapter added to its weights."""
    if not isinstance(model, PeftModel):
        raise InputError(f"to merge its adapter, the model must be a PeftModel, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, lora.Linear):
            vars(module)["get_delta_weight"] = functools.partial(_delta_weight, module)
    return model.merge_and_unload(adapter_names=[adapter_name(model)])


def _delta_weight(layer: Any, adapter: str) -> torch.Tensor:
    """scaling B A of a linear layer, with the same bits on every device: a driver and its workers merge on their own, and
    compare."""
    a, b = (part[adapter].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
    delta = b.new_zeros(len(b), a.shape[1])
    at_once = MERGED_ROWS if b.is_cpu else len(b)
    for rows, of_b in zip(delta.split(at_once), b.split(at_once), strict=True):
        for row, column in zip(a, of_b.mT, strict=True):
            rows += column[:, None] * row
    delta *= layer.scaling[adapter]
    return delta.mT if layer.fan_in_fan_out else delta


def with_adapter(model: Any, adapter: str | None, *, of_weights: bool) -> Any:
    """The model as a search takes it: carrying its LoRA adapter; where it is `of_weights`, that is merged, if there is one.

    Raises:
        InputError: there is no adapter though one is needed, or it does not fit.
    """
    if not has_lora(model) and not (of_weights and adapter is None):
        model = load_adapter(model, adapter)
    return merge_adapter(model) if of_weights and has_lora(model) else model


def _adapter_folder(adapter: str) -> Path:
    folder = Path(adapter)
    if folder.is_dir():
        return folder
    if folder.exists() or adapter.startswith((".", "/")):
        raise InputError(f"adapter {adapter!r} is not a folder; {MAKE_ADAPTER}")
    reach_hub(adapter)
    try:
        return Path(snapshot_download(adapter, allow_patterns=list(ADAPTER_FILES)))
    except (OSError, ValueError) as error:
        raise InputError(
            f"adapter {adapter!r} is neither a folder nor on the hub: {error}{offline_note()}; {MAKE_ADAPTER}"
        ) from error


def bare(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself. It keeps its LoRA layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def whole_head_input(model: Any) -> Iterator[None]:
    """Inside, the model's output head is given its input in one piece.

    A model asked for its last logits only hands the head a view of its hidden states. Where the head's weight is frozen,
    `torch.nn.functional.linear` multiplies such a view sequence by sequence, and in bfloat16 on the CPU it makes a copy
    of the weight for each: gigabytes, for nothing.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


def has_lora(model: Any) -> bool:
    return any(config.peft_type == "LORA" for config in getattr(model, "peft_config", {}).values())


def adapter_name(model: Any) -> str:
    """The name of a model's one active LoRA adapter."""
    active = model.active_adapters
    active = active() if callable(active) else active
    if len(active) != 1:
        raise InputError(f"exactly one LoRA adapter must be active, got {', '.join(map(repr, active)) or 'none'}")
    return active[0]


def context_length(model: Any) -> int | None:
    """The most positions the model can attend to, or None where its configuration sets no limit."""
    return context_of(model.config)


def context_of(config: Any) -> int | None:
    """`context_length` of a model with this configuration."""
    config = config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None) or 0
    if trained < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor") or 1
    if kind in ("linear", "dynamic"):
        return int(factor * trained)
    # Some give the length before YaRN, some that with it.
    return (
        max(trained, int(factor * rope.get("original_max_position_embeddings", trained))) if kind == "yarn" else trained
    )


def fingerprint(model: Any) -> dict[str, str]:
    """What identifies a model in a checkpoint: digests of the base configuration and of its weights."""
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    described = json.dumps(config, sort_keys=True, default=str).encode()
    weights = weight_digests(model) if has_lora(model) else {"weights": _digest(_parameters(model), _as_float32)}
    return {"base_config": hashlib.sha256(described).hexdigest(), **weights}


def weight_digests(model: Any) -> dict[str, str]:
    """Cheap digests: of a probe of the weights but for quantised ones, which every kind of device packs in its own way;
    and of an adapter's weights."""
    base = {
        name: tensor
        for name, tensor in _parameters(model).items()
        if "lora_" not in name and type(tensor) is torch.Tensor and tensor.is_floating_point() and not tensor.is_meta
    }
    digests = {"base_weights": _digest(base, probe)}
    if has_lora(model):
        adapter = get_peft_model_state_dict(model, adapter_name=adapter_name(model))
        digests["adapter"] = _digest(adapter, _as_float32)
    return digests


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in bare(model).named_parameters()}


def probe(tensor: torch.Tensor) -> bytes:
    """A few of a tensor's elements, from all over it, as float32."""
    # An odd stride meets every column of a matrix whose width is a power of two.
    return _as_float32(tensor.reshape(-1)[:: tensor.numel() // PROBED | 1])


def _as_float32(tensor: torch.Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def _digest(tensors: dict[str, torch.Tensor], content: Callable[[torch.Tensor], bytes]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(content(tensor))
    return digest.hexdigest()
