"""Attention of one token a row by `essa_kernels.decode_attention`, in models of transformers.

Importing this registers it under the name "essa": a model loaded with ``attn_implementation="essa"`` has it in ``generate``.
It is for models that "sdpa" is for and that do nothing else with its name; others are refused when they run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from essa_kernels import decode_attention, env_report

NAME = "essa"
KERNELS = {"cpu": "cpu", "cuda": "triton"}
# What "sdpa" is asked for beyond scale and mask; and what it would leave out of the result without a word.
MORE = ("dropout", "softcap", "position_bias", "cache", "output_attentions")
LEFT_OUT = ("s_aux", "sparse_indices")


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: `decode_attention` for one token a row, else what "sdpa" is.

    Args:
        module: the attention layer.
        query: [rows, heads, tokens, d]; key and value: [rows, kv_heads, length, d].
        attention_mask: [rows or 1, 1, tokens, length], bool, as transformers makes it for "sdpa", or None.
        options: transformers' own, such as ``scaling``.

    Returns:
        [rows, tokens, heads, d], and None for the weights.

    Raises:
        ValueError: "sdpa" is not what the layer needs, or what it does depends on the name.
    """
    if any(options.get(name) is not None for name in LEFT_OUT) or not _is_for(module):
        raise ValueError(
            f'attn_implementation "{NAME}" does what "sdpa" does; {type(module).__name__} needs more or asks for that '
            "name, load its model with another"
        )
    if not _fits(query, key, value, attention_mask, options):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(len(query), -1)
    return decode_attention(query[:, :, 0], key, value, mask, scale=options.get("scaling"))[:, None], None


def _is_for(module: nn.Module) -> bool:
    # The compiler cannot look at source code; what it compiles has usually run before.
    return torch.compiler.is_compiling() or _only_looks_up(frozenset({type(module).__module__}))


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether `decode_attention` computes it, and a kernel does that."""
    device = query.device.type
    # The compiler, which cannot look the kernel up, is told that there is one: the op warns where there is none.
    if query.shape[2] != 1 or device not in KERNELS or not (torch.compiler.is_compiling() or _has_kernel(device)):
        return False
    if any(isinstance(option, Tensor) or option for option in map(options.get, MORE)):
        return False
    tensors, scaling = (query, key, value), options.get("scaling")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if isinstance(scaling, Tensor) or any(len(tensor) != len(query) for tensor in tensors):
        return False
    if any(tensor.dtype != query.dtype or tensor.stride(-1) != 1 for tensor in tensors):
        return False
    if mask is None:
        return True
    seen = (1, 1, key.shape[2])
    return mask.dtype is torch.bool and len(mask) in (1, len(query)) and mask.shape[1:] == seen and mask.stride(-1) == 1


@functools.cache
def _has_kernel(device_type: str) -> bool:
    return env_report()["backends"][device_type][KERNELS[device_type]] == "available"


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def kernel_attention(model: nn.Module) -> Iterator[None]:
    """While inside, what attends by "sdpa" in a transformers model on the CPU attends by `attend`.

    Left as they are: models on GPUs, where `decode_attention` has not been timed against torch's kernels; layers that do
    not take their attention from transformers' interface; and those whose code asks whether it is called "sdpa".
    """
    switched = []
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        switched = [config for config, files in _attending_by_sdpa(model) if _only_looks_up(files)]
    for config in switched:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config in switched:
            config._attn_implementation_internal = "sdpa"


def _attending_by_sdpa(model: nn.Module) -> list[tuple[Any, frozenset[str]]]:
    """The configurations that ask for "sdpa", and the Python modules of the layers that have them."""
    found: dict[int, tuple[Any, set[str]]] = {}
    for layer in model.modules():
        config = getattr(layer, "config", None)
        if getattr(config, "_attn_implementation_internal", None) == "sdpa":
            found.setdefault(id(config), (config, set()))[1].add(type(layer).__module__)
    return [(config, frozenset(files)) for config, files in found.values()]


@functools.cache
def _only_looks_up(files: frozenset[str]) -> bool:
    """Whether their code looks an attention up in transformers' interface and does nothing else with its name."""
    try:
        sources = [inspect.getsource(sys.modules[file]) for file in files]
    except (KeyError, OSError, TypeError):
        return False
    asks = re.compile(r"(==|!=|\bin\b).*[\"']sdpa[\"']")
    return any("ALL_ATTENTION_FUNCTIONS" in source for source in sources) and not any(map(asks.search, sources))
