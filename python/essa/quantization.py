"""Quantised base models: `quantization` int8 or int4, made by torchao while transformers loads the weights.

The adapter, and a population's delta, stay in the model's dtype on top of the quantised linear layers.

- int8: one scale a row of the weight. Run on CPUs, in float32 and bfloat16.
- int4: one scale and zero point a group of 32 weights, in bfloat16 alone: on CPUs, where it was run, the kernel in float32 is
  a hundred times slower. torchao's stable API has no packing for CPUs, so that the configuration there comes from its
  prototypes, packed as ATen has it.

All that was found by running torchao 0.18 on CPUs. No GPU has run it yet: int8 is the same configuration there, int4 takes
tinygemm's tiles, for which torchao's documentation knows no dtype but bfloat16.

A model that arrives quantised, by whatever library, is loaded as it is. Where an adapter is trained on int4 layers by
gradients, `essa.differentiable` gives them the backward pass that torchao's products lack.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from essa.config import QUANTIZATIONS, InputError
from essa_kernels.nn import of_routed_experts

INT4_GROUP = 32


def check_quantization(quantization: str, dtype: str) -> str:
    """The dtype to load with. Raises `InputError` where torchao is missing, or cannot quantise a model of this dtype."""
    if quantization not in QUANTIZATIONS:
        raise InputError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if quantization != "none" and importlib.util.find_spec("torchao") is None:
        raise InputError(f"quantization {quantization!r} needs torchao: pip install 'essa-kernels[quant]'")
    check_dtype(quantization, dtype)
    return "bfloat16" if quantization == "int4" else dtype


def check_dtype(quantization: str, dtype: str) -> None:
    """Raise `InputError` for a dtype that a model cannot compute in when it is quantised so."""
    if quantization == "int4" and dtype not in ("auto", "bfloat16"):
        raise InputError(f"quantization 'int4' computes in bfloat16: dtype must be auto or bfloat16, got {dtype!r}")


def quantization_config(quantization: str, device: torch.device) -> Any:
    """What `from_pretrained` takes as `quantization_config`: None for "none"."""
    if quantization == "none":
        return None
    import torchao.quantization as ao
    from transformers import TorchAoConfig

    if quantization == "int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig(set_inductor_config=False))
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP, set_inductor_config=False))
    return TorchAoConfig(
        ao.Int4WeightOnlyConfig(
            group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    )


def check_quantised(model: nn.Module, quantization: str) -> None:
    """Raise `InputError` unless all linear layers but the head were quantised, and there are no routed experts beside them:
    torchao passes over what it cannot quantise."""
    experts = sum(
        p.numel() for name, p in model.named_parameters() if of_routed_experts(name) and type(p) is nn.Parameter
    )
    if experts:
        share = f"{experts / sum(p.numel() for p in model.parameters()):.0%} of its parameters"
        raise InputError(
            f"quantization {quantization!r}: the experts of {type(model).__name__}, {share}, cannot be quantised; a model that "
            "arrives quantised is loaded as it is"
        )
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    left = [name for name, linear in linears.items() if type(linear.weight) is nn.Parameter]
    if not linears or left:
        what = (
            f"{left[0]}, {list(linears[left[0]].weight.shape)},"
            if left
            else f"{type(model).__name__}, with no nn.Linear,"
        )
        raise InputError(
            f"quantization {quantization!r}: {what} cannot be quantised"
            + (f"; int4 needs input features in multiples of {INT4_GROUP}" if quantization == "int4" and left else "")
        )


def weight_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers occupy, tied ones once, the parts of quantised ones included."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in _parts(tensor):
            seen[part.data_ptr()] = part.untyped_storage().nbytes()
    return sum(seen.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors of a tensor subclass, or the tensor itself."""
    data = tensor.data
    if not hasattr(data, "__tensor_flatten__"):
        return [data]
    return [part for name in data.__tensor_flatten__()[0] for part in _parts(getattr(data, name))]
