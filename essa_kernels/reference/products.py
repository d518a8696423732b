"""Matrix products that no setting of the process makes less exact."""

from __future__ import annotations

from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32. Summed in float64, which TF32, `torch.set_float32_matmul_precision` and autocast leave alone."""
    return (a.double() @ b.double()).float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias, float32."""
    sums = product(x, weight.T)
    return sums if bias is None else sums + bias.float()
