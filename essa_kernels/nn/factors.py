"""The singular value decomposition of a LoRA layer's two factors."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Factors:
    """A = u_a diag(s_a) v_a and B = u_b diag(s_b) v_b, economical, all float32 on the CPU.

    k_a = min(r, d_in) and k_b = min(r, d_out) are the lengths of the spectra, which descend.
    """

    u_a: Tensor  # [r, k_a]
    s_a: Tensor  # [k_a]
    v_a: Tensor  # [k_a, d_in]
    u_b: Tensor  # [d_out, k_b]
    s_b: Tensor  # [k_b]
    v_b: Tensor  # [k_b, r]
    core: Tensor  # [k_b, k_a] = v_b u_a

    @classmethod
    def decompose(cls, a: Tensor, b: Tensor) -> Factors:
        """The factors of ``a`` [r, d_in] and ``b`` [d_out, r], computed in float64."""
        u_a, s_a, v_a = _svd(a)
        v_b, s_b, u_b = _svd(b.mT)
        parts = u_a, s_a, v_a, u_b.mT, s_b, v_b.mT, v_b.mT @ u_a
        return cls(*(part.float().contiguous() for part in parts))

    def compose(self, s_a: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r] with these singular values, float64."""
        a = self.u_a.double() * s_a.double() @ self.v_a.double()
        b = self.u_b.double() * s_b.double() @ self.v_b.double()
        return a, b


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u [r, k], s [k], v [k, d] of a wide ``matrix`` [r, d]. Singular vectors are unique up to their sign only: here the
    largest element of each column of u is positive."""
    u, s, v = torch.linalg.svd(matrix.detach().to("cpu", torch.float64), full_matrices=False)
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * sign, s, v * sign.mT
