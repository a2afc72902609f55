"""A linear layer that ends a residual branch: projection, bias, dropout, drop-path and the addition in one op.

Each of those steps alone reads and writes the whole residual stream; as the epilogue of the product they cost nothing.
"""

from __future__ import annotations

from torch import Tensor

from deit_fast import reference
from deit_fast.kernels.cpu import launch

from .checks import (autocast_dtype, cast, check, check_activation, check_device, check_dropout, check_parameter,
                     check_row_scale, without_autocast)
from .registration import NativeOp

NATIVE = NativeOp(
    "linear_residual", reference.linear_residual, backends=("cpu", "triton"),
    args="Tensor x, Tensor weight, Tensor? bias, Tensor residual, float dropout_p, Tensor? seed, Tensor? row_scale",
    grads=("x", "weight", "bias"), added="residual",
    out=lambda x, weight, bias, residual, *_: residual.new_empty(residual.shape),
    order=lambda x, weight, bias, residual, p, seed, scale: launch.order(x, p, seed))
OP = NATIVE.op


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout_p: float = 0.0,
                    seed: Tensor | None = None, row_scale: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """residual + row_scale * dropout(x W^T + b): (B, ..., C) and (B, ..., F) -> (B, ..., F), in the dtype of x.

    Args:
        x: (B, ..., C) the branch's activations (cast, like residual, where autocast is on).
        weight, bias: (F, C) and (F,), fp32 or of x's dtype; the bias may be None.
        residual: (B, ..., F), the stream that the branch is added to, of x's dtype.
        dropout_p: probability of dropping an element of the branch, in [0, 1).
        seed: () int64 on the device: Philox mask at site 1, equal in every backend; None: PyTorch's own dropout.
        row_scale: (B,) drop-path's factor per sample, 0 or 1 / keep probability; no gradient flows to it.
        backend: who computes it; None: see `deit_fast.use_backend`.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, BackendError for a backend that cannot
    serve the call. Drop-path: Huang et al. 2016.
    """
    _check(x, weight, bias, residual, dropout_p, seed, row_scale)
    x, residual = cast(autocast_dtype(x), x, residual)
    check(x.dtype == residual.dtype, OP.name, f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    call = (x, weight, bias, residual, dropout_p, seed, row_scale)
    with without_autocast(x):
        return NATIVE(backend, *call)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout_p: float, seed: Tensor | None,
           row_scale: Tensor | None) -> None:
    check_activation(OP.name, "x", x)
    check_activation(OP.name, "residual", residual)
    check(x.dim() >= 1 and x.shape[-1] > 0, OP.name, f"x must have shape (B, ..., C) with C > 0, got {tuple(x.shape)}")
    C = x.shape[-1]
    check(isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == C, OP.name,
          f"weight must have shape (F, {C}), got {tuple(getattr(weight, 'shape', ()))}")
    check_parameter(OP.name, "weight", weight, tuple(weight.shape), x)
    check_parameter(OP.name, "bias", bias, (weight.shape[0],), x)
    expected = (*x.shape[:-1], weight.shape[0])
    check(tuple(residual.shape) == expected, OP.name,
          f"residual must have shape {expected}, got {tuple(residual.shape)}")
    check_device(OP.name, "residual", residual, x)
    check_dropout(OP.name, dropout_p, seed, x)
    check_row_scale(OP.name, row_scale, x)
