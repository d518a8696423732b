"""Log-probabilities of completions from a causal language model, its logits never materialised.

`install` teaches the model's own forward to answer a batch with them, so that whatever wraps the model - PEFT, DDP,
autocast - is passed through as ever. Only the positions of completions reach the LM head.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from essa.config import InputError
from essa.models import bare
from essa.trdpo.shared_prompt import Branches
from essa_kernels import linear_logprob

PROBE_TOKENS = 5


def head_settings(config: Any) -> dict[str, Any]:
    """What the model does to its logits, as arguments of `linear_logprob`: Gemma 2's, Cohere's and Granite's ways."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / config.logits_scaling
    return {
        "logit_scale": 1.0 if scale is None else float(scale),
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def install(model: nn.Module) -> None:
    """Let the model's forward take `completions=(index, labels)` and return the labels' log-probabilities [N], float32.

    Without it, forward is as before.

    Raises:
        InputError: the model does something to its logits that we do not know of.
    """
    base = bare(model)
    settings, before = head_settings(base.config), vars(base).get("forward")

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, completions: tuple[Tensor, Tensor] | None = None, **kwargs: Any) -> Any:
        if completions is None:
            return type(self).forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)
        index, labels = completions
        # A text model cut out of a larger one, such as Llama 4's, does not know its own base.
        decoder = self.model if self.base_model is self else self.base_model
        hidden = decoder(*args, use_cache=False, **kwargs).last_hidden_state
        head = self.get_output_embeddings()
        rows = hidden.reshape(-1, hidden.shape[-1])[index].to(head.weight.dtype)
        return linear_logprob(rows, head.weight, labels, getattr(head, "bias", None), **settings)

    # Bound, so that a copy of the model runs the copy.
    base.forward = types.MethodType(forward, base)
    _check_head(base)


@torch.no_grad()
def _check_head(base: Any) -> None:
    """Compare a few log-probabilities with those of the model's own logits."""
    device = base.get_output_embeddings().weight.device
    size = base.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(1, PROBE_TOKENS + 1, device=device) * 7919) % size
    mode = base.training
    base.eval()
    logits = base(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    found = base(input_ids=ids[None], completions=(torch.arange(PROBE_TOKENS - 1, device=device), ids[1:]))
    base.train(mode)
    tolerance = 1e-3 if logits.dtype == base.dtype else 0.1
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise InputError(
            f"{type(base).__name__} changes its logits in a way that is not known here: log-probabilities are "
            f"{expected.tolist()}, from its hidden states {found.tolist()}"
        )


def token_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities [N] of a batch's labels; see `Collator` for the batch."""
    given: dict[str, Any] = {"input_ids": batch["input_ids"], "completions": (batch["index"], batch["labels"])}
    if "branches" in batch:
        given |= {"position_ids": batch["position_ids"], "branches": Branches(batch["branches"].tolist())}
    return model(**given)


def sequence_sums(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Sums [B, 2] of `values` [N] over the completions, in float64: a long completion's would lose digits in float32."""
    rows = len(batch["rows"])
    sums = values.new_zeros(2 * rows, dtype=torch.float64).index_add(0, batch["sequence"], values.double())
    return sums.view(rows, 2)
