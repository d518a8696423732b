"""Log-probabilities of labels from hidden states and LM head in torch, logits and all."""

from __future__ import annotations

import torch
from torch import Tensor

from .products import product


def linear_logprob(
    logprob: Tensor,
    logsumexp: Tensor,
    slope: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """logprob, the logits' logsumexp and slope = d logprob / d hidden of every row; ignored labels: 0, 0, undefined."""
    kept = labels != ignore_index
    logits, derivative = _logits(hidden[kept], weight, bias, logit_scale, softcap, temperature)
    chosen = labels[kept, None]
    logprob.zero_()[kept] = logits.log_softmax(1).gather(1, chosen)[:, 0]
    logsumexp.zero_()[kept] = logits.logsumexp(1)
    if slope is not None:
        minus_p = -logits.softmax(1)
        gradient = minus_p.scatter_add(1, chosen, torch.ones_like(minus_p)) * derivative
        slope.zero_()[kept] = (product(gradient, weight)).to(slope.dtype)


def linear_logprob_backward(
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    grad: Tensor,
    slope: Tensor | None,
    logprob: Tensor,
    logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """The gradients that are not None, from grad = d loss / d logprob and what `linear_logprob` left."""
    kept = labels != ignore_index
    if d_hidden is not None and slope is not None:
        d_hidden.zero_()[kept] = (grad[kept, None] * slope[kept]).to(d_hidden.dtype)
    if d_weight is None and d_bias is None:
        return
    logits, derivative = _logits(hidden[kept], weight, bias, logit_scale, softcap, temperature)
    minus_p = -(logits - logsumexp[kept, None]).exp()
    gradient = minus_p.scatter_add(1, labels[kept, None], torch.ones_like(minus_p)) * derivative * grad[kept, None]
    if d_weight is not None:
        d_weight.copy_(product(gradient.T, hidden[kept]))
    if d_bias is not None:
        d_bias.copy_(gradient.sum(0))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor | float]:
    """Logits [rows, V] and their derivative by what hidden and weight alone give."""
    raw = product(hidden, weight.T)
    if bias is not None:
        raw = raw + bias.float()
    if softcap is None:
        return raw * (logit_scale / temperature), logit_scale / temperature
    bent = torch.tanh(raw * (logit_scale / softcap))
    return bent * (softcap / temperature), (1 - bent * bent) * (logit_scale / temperature)
