"""LayerNorm and the linear layer behind it (QKV projection, heads): LN(x) W^T + b in one op.

Fusing saves writing and reading LN(x), which at C = 64 is as much traffic as x itself; backward needs only x, the
row statistics and the weights.
"""

from __future__ import annotations

from torch import Tensor

from deit_fast import reference
from deit_fast.kernels.cpu import launch

from .checks import autocast_dtype, cast, check, check_activation, check_number, check_parameter, without_autocast
from .registration import NativeOp

NATIVE = NativeOp(
    "layernorm_linear", reference.layernorm_linear, backends=("cpu", "triton"),
    args="Tensor x, Tensor ln_weight, Tensor? ln_bias, Tensor weight, Tensor? bias, float eps",
    grads=("x", "ln_weight", "ln_bias", "weight", "bias"),
    out=lambda x, ln_weight, ln_bias, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    order=lambda x, *_: launch.order(x))
OP = NATIVE.op


def layernorm_linear(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
                     eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """LN(x) W^T + b over the last dimension: (..., C) -> (..., F), in the dtype of x (autocast's where it is on).

    Args:
        x: (..., C) activations.
        ln_weight, ln_bias: (C,) LayerNorm's affine; the bias may be None.
        weight, bias: (F, C) and (F,); the bias may be None. Parameters are fp32 or of x's dtype.
        eps: added to the variance; 1e-6 as in ViT (torch's own default is 1e-5).
        backend: who computes it; None: see `deit_fast.use_backend`.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, BackendError for a backend that cannot
    serve the call. Ba et al. 2016 (LayerNorm); the name is TransformerEngine's.
    """
    _check(x, ln_weight, ln_bias, weight, bias, eps)
    (x,) = cast(autocast_dtype(x), x)
    call = (x, ln_weight, ln_bias, weight, bias, eps)
    with without_autocast(x):
        return NATIVE(backend, *call)


def _check(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
           eps: float) -> None:
    check_activation(OP.name, "x", x)
    check_number(OP.name, "eps", eps)
    check(x.dim() >= 1 and x.shape[-1] > 0, OP.name, f"x must have shape (..., C) with C > 0, got {tuple(x.shape)}")
    C = x.shape[-1]
    check(isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == C, OP.name,
          f"weight must have shape (F, {C}), got {tuple(getattr(weight, 'shape', ()))}")
    check_parameter(OP.name, "ln_weight", ln_weight, (C,), x)
    check_parameter(OP.name, "ln_bias", ln_bias, (C,), x)
    check_parameter(OP.name, "weight", weight, tuple(weight.shape), x)
    check_parameter(OP.name, "bias", bias, (weight.shape[0],), x)
