"""Which of a model's weights are what."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def named_text_weights(model: Any) -> list[tuple[str, Tensor]]:
    """The weights that text goes through, sorted by name. No reward would tell of a multimodal model's others: they would
    drift."""
    parameters = sorted(model.named_parameters())
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None:
        return parameters
    head = model.get_output_embeddings()
    of_text = {id(weight) for part in (decoder, head) if part is not None for weight in part.parameters()}
    return [(name, weight) for name, weight in parameters if id(weight) in of_text]


def of_routed_experts(name: str) -> bool:
    """Whether a module or parameter of this dotted name belongs to routed experts, each of which sees rows of its own."""
    return "experts" in name.split(".")


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a tensor as torch makes it, not one that stands for quantised numbers."""
    return type(weight.data) is Tensor


def check_floating(name: str, weight: Tensor) -> None:
    """Raise unless a weight is a plain floating-point tensor, which noise can be added to."""
    if not is_plain(weight) or not weight.is_floating_point():
        kind = str(weight.dtype) if is_plain(weight) else type(weight.data).__name__
        raise ValueError(f"{name}: its weight must be a plain floating-point tensor, got {kind} (quantised?)")


def check_bare(model: Any) -> None:
    """Raise if the model carries an adapter, whose share these weights do not hold."""
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"model must carry no adapter, {type(model).__name__} has {', '.join(map(repr, model.peft_config))}; "
            f"merge it first: model.merge_and_unload()"
        )
