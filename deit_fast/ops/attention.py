"""Multi-head self-attention on the packed output of the QKV projection.

q, k and v are read where the projection wrote them, (B, N, 3, H, D) as timm lays them out, and the output is written where
the next projection reads it: no permute, no copy. For the sequences of small ViTs (66 or 198 tokens) all of K and V of a head
fits on chip, so nothing of size N x N is ever written.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from deit_fast import reference
from deit_fast.kernels import cpu

from .checks import autocast_dtype, cast, check, check_activation, check_dropout, check_number, without_autocast
from .registration import NativeOp


def _order(qkv: Tensor, num_heads: int, *_: object) -> tuple[str, ...]:
    """The native backends to try for a call, best first.

    `cpu` computes in fp32. On a processor with AMX, bf16 inference of 198 tokens at head_dim 64 runs 1.3 x as fast in
    PyTorch, which multiplies bf16 tiles there; at 66 tokens, or with a backward pass, `cpu` is 1.1 to 4 x as fast as PyTorch.
    """
    wide = qkv.shape[1] > 128 and qkv.shape[2] >= 3 * 64 * num_heads
    tiles = wide and cpu.isa == "amx" and qkv.dtype == torch.bfloat16
    trained = torch.is_grad_enabled() and qkv.requires_grad
    return ("triton",) if tiles and not trained else ("cpu", "triton")


NATIVE = NativeOp(
    "attention", reference.attention, backends=("cpu", "triton"),
    args="Tensor qkv, int num_heads, float? scale, float dropout_p, Tensor? seed",
    grads=("qkv",),
    out=lambda qkv, *_: qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)), order=_order)
OP = NATIVE.op


def attention(qkv: Tensor, num_heads: int, scale: float | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
              *, backend: str | None = None) -> Tensor:
    """softmax(Q K^T scale) V per head: packed (B, N, 3C) -> (B, N, C), in the dtype of qkv (autocast's where it is on).

    Args:
        qkv: (B, N, 3C), each row laid out (3, H, D): q, k, v, then heads, then D = C / H channels.
        num_heads: H.
        scale: factor on the logits; None: D ** -0.5.
        dropout_p: probability of dropping a softmax weight, in [0, 1).
        seed: () int64 on the device: Philox mask at site 0, equal in every backend; None: PyTorch's own dropout.
        backend: who computes it; None: see `deit_fast.use_backend`.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, BackendError for a backend that cannot
    serve the call. Vaswani et al. 2017, section 3.2.
    """
    _check(qkv, num_heads, scale, dropout_p, seed)
    (qkv,) = cast(autocast_dtype(qkv), qkv)
    call = (qkv, num_heads, scale, dropout_p, seed)
    with without_autocast(qkv):
        return NATIVE(backend, *call)


def _check(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None) -> None:
    check_activation(OP.name, "qkv", qkv)
    if not isinstance(num_heads, (int, numbers.Integral)):
        raise TypeError(f"{OP.name}: num_heads must be an integer, got {type(num_heads).__name__}.")
    check(num_heads >= 1, OP.name, f"num_heads must be at least 1, got {num_heads}")
    if scale is not None:
        check_number(OP.name, "scale", scale)
    check(qkv.dim() == 3 and qkv.shape[1] > 0 and qkv.shape[2] > 0 and qkv.shape[2] % (3 * num_heads) == 0, OP.name,
          f"qkv must have shape (B, N, 3*C) with C divisible by num_heads={num_heads}, got {tuple(qkv.shape)}")
    check_dropout(OP.name, dropout_p, seed, qkv)
