"""The losses of preference alignment, from the log-probabilities of whole completions.

Every loss sees the policy only through its log-ratios to the reference, log pi(y | x) - log pi_ref(y | x).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log sigma(beta (chosen - rejected)), arXiv 2305.18290, eq. 7; the log-ratios and the result are [B].

    With label smoothing e, (1 - e) times that plus e times the loss of the pair the other way round (cDPO).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(chosen: Tensor, rejected: Tensor, beta: float, lengths: Tensor) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2, arXiv 2310.12036, eq. 17; the result is [B].

    h is the difference of the log-ratios, each per token of its completion (`lengths` [B, 2]), as TRL has it on the
    advice of IPO's authors: sums would weigh long completions by the square of their length.
    """
    chosen_length, rejected_length = lengths.unbind(1)
    return (chosen / chosen_length - rejected / rejected_length - 1 / (2 * beta)) ** 2


def kto(
    logratio: Tensor, kl: Tensor, desirable: Tensor, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO, arXiv 2402.01306, eq. 7 and 8: weight (1 - sigma(beta (r - kl))) where desirable, else with kl - r; [B].

    Args:
        logratio: r, [B].
        kl: the reference point, a constant >= 0.
        desirable: bool [B].
    """
    sign, weight = (
        torch.where(desirable, logratio.new_tensor(good), logratio.new_tensor(bad))
        for good, bad in ((1.0, -1.0), (desirable_weight, undesirable_weight))
    )
    return weight * (1 - torch.sigmoid(beta * sign * (logratio - kl)))
