"""A whole encoder block as one call: the four ops of `models/vit.py` behind one door.

The arithmetic is that of the four ops, kernel by kernel, but for Triton, which has one forward kernel for narrow blocks
(`kernels/triton/encoder_block.py`). What one call saves is their price beside it: checks, the choice of a backend, the
dispatcher and a node of autograd for each. That price is the same for one image and for a thousand, so small batches of
small models are where it counts.

Somebody who names a backend for one of the four ops gets it: the block is then the composition of the four, as it is
wherever no backend serves the whole.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

from torch import Tensor

from deit_fast.kernels.encoder_block import Arguments

from .attention import OP as ATTENTION
from .attention import attention
from .checks import (autocast_dtype, autocast_is_on, cast, check, check_activation, check_dropout, check_number,
                     check_parameter, check_row_scale, without_autocast)
from .layernorm_linear import OP as LAYERNORM_LINEAR
from .layernorm_linear import layernorm_linear
from .layernorm_mlp import OP as LAYERNORM_MLP
from .layernorm_mlp import layernorm_mlp
from .linear_residual import OP as LINEAR_RESIDUAL
from .linear_residual import linear_residual
from .registration import NativeOp

PARTS = (LAYERNORM_LINEAR, ATTENTION, LINEAR_RESIDUAL, LAYERNORM_MLP)
PARAMETERS = Arguments._fields[1:13]
WIDEST, LONGEST = 128, 128  # C and N up to which all four ops are fastest in C++, whatever the dtype and the processor


def _composed(*call: object, backend: str | None = None) -> Tensor:
    """The block from the four public ops, each with its own choice of a backend."""
    a = Arguments(*call)
    qkv = layernorm_linear(*a.layernorm_linear(), backend=backend)
    y = attention(*a.attention(qkv), backend=backend)
    h = linear_residual(*a.linear_residual(y, a.x), backend=backend)
    return layernorm_mlp(*a.layernorm_mlp(h), backend=backend)


def _order(*call: object) -> tuple[str, ...]:
    a = Arguments(*call)
    drawn = a.seed is None and (a.dropout_p > 0.0 or a.attn_dropout_p > 0.0)  # PyTorch's own dropout
    return ("cpu",) if is_small(a.x) and not drawn else ()


NATIVE = NativeOp(
    "encoder_block", _composed, backends=("cpu", "triton"),
    args="Tensor x, Tensor ln1_weight, Tensor? ln1_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, "
         "Tensor? proj_bias, Tensor ln2_weight, Tensor? ln2_bias, Tensor fc1_weight, Tensor? fc1_bias, "
         "Tensor fc2_weight, Tensor? fc2_bias, int num_heads, float eps, float dropout_p, float attn_dropout_p, "
         "Tensor? seed, Tensor? attn_row_scale, Tensor? mlp_row_scale",
    grads=("x", *PARAMETERS), out=lambda x, *_: x.new_empty(x.shape), order=_order,
    parts=tuple(op.name for op in PARTS))
OP = NATIVE.op


def encoder_block(x: Tensor, ln1_weight: Tensor, ln1_bias: Tensor | None, qkv_weight: Tensor, qkv_bias: Tensor | None,
                  proj_weight: Tensor, proj_bias: Tensor | None, ln2_weight: Tensor, ln2_bias: Tensor | None,
                  fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
                  num_heads: int, eps: float = 1e-6, dropout_p: float = 0.0, attn_dropout_p: float = 0.0,
                  seed: Tensor | None = None, attn_row_scale: Tensor | None = None,
                  mlp_row_scale: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """A pre-norm Transformer encoder block: (B, N, C) -> (B, N, C), in the dtype of x (autocast's where it is on).

        h   = x + attn_row_scale * dropout(attention(LN1(x) W_qkv^T + b) W_proj^T + b)
        out = h + mlp_row_scale * dropout(W2 dropout(gelu(W1 LN2(h))))

    Args:
        x: (B, N, C) the residual stream.
        ln1_weight, ln1_bias, ln2_weight, ln2_bias: (C,) the LayerNorms' affines.
        qkv_weight, qkv_bias: (3C, C) and (3C,), laid out (3, H, D) as timm's.
        proj_weight, proj_bias: (C, C) and (C,).
        fc1_weight, fc1_bias: (F, C) and (F,); fc2_weight, fc2_bias: (C, F) and (C,). Biases may be None; parameters are
            fp32 or of x's dtype.
        num_heads: H, which divides C.
        eps: added to the variances.
        dropout_p: probability of dropping an element behind the projection and behind both MLP layers, in [0, 1).
        attn_dropout_p: probability of dropping a softmax weight, in [0, 1).
        seed: () int64 on the device: Philox masks at sites 0 to 3, equal in every backend; None: PyTorch's own dropout.
        attn_row_scale, mlp_row_scale: (B,) drop-path's factors of the two halves; no gradient flows to them.
        backend: who computes it; None: see `deit_fast.use_backend`. A backend named for one of the four ops counts.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, BackendError for a backend that cannot
    serve the call. Dosovitskiy et al. 2020, equations 2 and 3.
    """
    a = Arguments(x, ln1_weight, ln1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, ln2_weight, ln2_bias,
                  fc1_weight, fc1_bias, fc2_weight, fc2_bias, num_heads, eps, dropout_p, attn_dropout_p, seed,
                  attn_row_scale, mlp_row_scale)
    _check(a)
    if not autocast_is_on(x):
        return _serve(backend, a)
    (x,) = cast(autocast_dtype(x), x)
    with without_autocast(x):
        return _serve(backend, (x, *a[1:]))


def _serve(backend: str | None, call: tuple) -> Tensor:
    return NATIVE(backend, *call) if _is_whole(backend, call) else _composed(*call, backend=backend)


def _is_whole(backend: str | None, call: tuple) -> bool:
    """Whether one backend is to serve all of the block, as far as choices go."""
    name = OP.asked(backend)
    if name == "reference" or any(op.asked(backend) not in (None, name) for op in PARTS):
        return False
    return name is not None or bool(OP.order(*call))


def is_small(x: Tensor) -> bool:
    """Whether all four ops are fastest in C++ for a stream x (B, N, C)."""
    return x.shape[2] <= WIDEST and x.shape[1] <= LONGEST


def _check(a: Arguments) -> None:
    check_stream(OP.name, a.x, a.num_heads, a.eps)
    check_parameters(OP.name, a.x, a[1:13])
    check_dropout(OP.name, a.dropout_p, a.seed, a.x)
    check_dropout(OP.name, a.attn_dropout_p, None, a.x, "attn_dropout_p")
    check_row_scale(OP.name, a.attn_row_scale, a.x, "attn_row_scale")
    check_row_scale(OP.name, a.mlp_row_scale, a.x, "mlp_row_scale")


def check_stream(op: str, x: Tensor, num_heads: int, eps: float) -> None:
    """x is (B, N, C) with C divisible by num_heads, and eps a number."""
    check_activation(op, "x", x)
    check_number(op, "eps", eps)
    if not isinstance(num_heads, (int, numbers.Integral)):
        raise TypeError(f"{op}: num_heads must be an integer, got {type(num_heads).__name__}.")
    shape = tuple(x.shape)
    check(num_heads >= 1, op, f"num_heads must be at least 1, got {num_heads}")
    check(len(shape) == 3 and shape[1] > 0 and shape[2] > 0 and shape[2] % num_heads == 0, op,
          f"x must have shape (B, N, C) with C divisible by num_heads={num_heads}, got {shape}")


def check_parameters(op: str, x: Tensor, parameters: Sequence[Tensor | None]) -> None:
    """The twelve parameters of a block fit x (B, N, C) and one another."""
    C, fc1_weight = x.shape[2], parameters[8]
    check(isinstance(fc1_weight, Tensor) and fc1_weight.dim() == 2, op,
          f"fc1_weight must have shape (F, {C}), got {tuple(getattr(fc1_weight, 'shape', ()))}")
    F = fc1_weight.shape[0]
    shapes = ((C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (F, C), (F,), (C, F), (C,))
    for name, parameter, shape in zip(PARAMETERS, parameters, shapes):
        check_parameter(op, name, parameter, shape, x)
