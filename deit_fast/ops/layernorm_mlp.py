"""The MLP half of a transformer block: LayerNorm, two linear layers with GELU between, dropout, drop-path, residual.

The hidden activations are four times as wide as the stream; an op that keeps a tile of them on chip never writes them, and
backward recomputes what is cheaper to compute than to read.
"""

from __future__ import annotations

from torch import Tensor

from deit_fast import reference
from deit_fast.kernels.cpu import launch

from .checks import (autocast_dtype, cast, check, check_activation, check_dropout, check_number, check_parameter,
                     check_row_scale, without_autocast)
from .registration import NativeOp

NATIVE = NativeOp(
    "layernorm_mlp", reference.layernorm_mlp, backends=("cpu", "triton"),
    args="Tensor x, Tensor ln_weight, Tensor? ln_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
         "Tensor? fc2_bias, float eps, float dropout_p, Tensor? seed, Tensor? row_scale",
    grads=("x", "ln_weight", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
    out=lambda x, *_: x.new_empty(x.shape),
    order=lambda x, *rest: launch.order(x, *rest[-3:-1]))
OP = NATIVE.op


def layernorm_mlp(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor | None,
                  fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float = 1e-6, dropout_p: float = 0.0,
                  seed: Tensor | None = None, row_scale: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x + row_scale * dropout(W2 dropout(gelu(W1 LN(x)))): (B, ..., C) -> (B, ..., C), in the dtype of x.

    Args:
        x: (B, ..., C) the residual stream (cast where autocast is on).
        ln_weight, ln_bias: (C,) LayerNorm's affine.
        fc1_weight, fc1_bias: (F, C) and (F,); fc2_weight, fc2_bias: (C, F) and (C,). Biases may be None; parameters are
            fp32 or of x's dtype.
        eps: added to the variance.
        dropout_p: probability of dropping a hidden and, separately, an output element, in [0, 1).
        seed: () int64 on the device: Philox masks at sites 2 (hidden) and 3 (output), equal in every backend; None:
            PyTorch's own dropout.
        row_scale: (B,) drop-path's factor per sample, 0 or 1 / keep probability; no gradient flows to it.
        backend: who computes it; None: see `deit_fast.use_backend`.

    GELU is the exact one, x Phi(x) (Hendrycks & Gimpel 2016), as in ViT; the op's name is TransformerEngine's. Raises
    ValueError or TypeError for shapes, dtypes or devices that do not fit, BackendError for a backend that cannot serve it.
    """
    _check(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, dropout_p, seed, row_scale)
    (x,) = cast(autocast_dtype(x), x)
    call = (x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, dropout_p, seed, row_scale)
    with without_autocast(x):
        return NATIVE(backend, *call)


def _check(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor | None,
           fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float, dropout_p: float,
           seed: Tensor | None, row_scale: Tensor | None) -> None:
    check_activation(OP.name, "x", x)
    check_number(OP.name, "eps", eps)
    check(x.dim() >= 1 and x.shape[-1] > 0, OP.name, f"x must have shape (B, ..., C) with C > 0, got {tuple(x.shape)}")
    C = x.shape[-1]
    check(isinstance(fc1_weight, Tensor) and fc1_weight.dim() == 2 and fc1_weight.shape[1] == C, OP.name,
          f"fc1_weight must have shape (F, {C}), got {tuple(getattr(fc1_weight, 'shape', ()))}")
    F = fc1_weight.shape[0]
    for name, parameter, shape in (("ln_weight", ln_weight, (C,)), ("ln_bias", ln_bias, (C,)),
                                   ("fc1_weight", fc1_weight, (F, C)), ("fc1_bias", fc1_bias, (F,)),
                                   ("fc2_weight", fc2_weight, (C, F)), ("fc2_bias", fc2_bias, (C,))):
        check_parameter(OP.name, name, parameter, shape, x)
    check_dropout(OP.name, dropout_p, seed, x)
    check_row_scale(OP.name, row_scale, x)
