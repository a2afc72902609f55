"""C++ attention: a thread takes a head of an image, with K, V and a block of softmax rows in its cache.

q, k and v are read from the packed rows and staged as fp32 in per-thread workspace that grows with N, not N^2. Forward
saves one fp32 number per token and head for backward (4 H bytes per token: 32 at the report's size, beside the 768 of its
fp32 qkv), from which backward recomputes the softmax; a dropout mask is drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, module


def why_not(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None) -> str | None:
    """Why this call cannot be served, or None."""
    return launch.why_not(qkv, qkv.shape[2], dropout_p, seed)


def forward(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None,
            save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, N, C), [lse (B, H, N)])."""
    B, N, C3 = qkv.shape
    out = qkv.new_empty(B, N, C3 // 3)
    saved = saved_like(qkv, num_heads, scale, dropout_p, seed) if save else []
    qkv = qkv.contiguous()
    launch.run(_call(qkv, num_heads, scale, dropout_p, seed, saved), False, out.data_ptr())
    return out, saved


def saved_like(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """[lse (B, H, N) fp32]: log2 of the rows' sums of 2^(logit log2 e)."""
    return [qkv.new_empty(qkv.shape[0], num_heads, qkv.shape[1], dtype=torch.float32)]


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], qkv: Tensor, num_heads: int, scale: float | None,
             dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """[dqkv (B, N, 3C)]."""
    if not needs[0]:
        return [grad.new_empty(0)]
    qkv = qkv.contiguous()
    dqkv = qkv.new_empty(qkv.shape)
    launch.run(_call(qkv, num_heads, scale, dropout_p, seed, saved), True, grad.data_ptr(), dqkv.data_ptr())
    return [dqkv]


def _call(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None, saved: list[Tensor]):
    B, N, C3 = qkv.shape
    D = C3 // (3 * num_heads)
    return module.Attention(qkv.dtype == torch.bfloat16, B, N, num_heads, D, D**-0.5 if scale is None else scale,
                            dropout_p, launch.seed_value(seed, dropout_p), qkv.data_ptr(),
                            launch.pointer(saved[0] if saved else None), launch.threads(4 * B * num_heads * N * N * D))
