"""C++ attention: a thread takes a head of an image, with K, V and a block of softmax rows in its cache.

q, k and v are read from the packed rows and staged as fp32 in per-thread workspace that grows with N, not N^2. Forward saves
one fp32 number per token and head for backward (4 H bytes per token: 32 at the report's size, beside the 768 of its fp32
qkv), from which backward recomputes the softmax; a dropout mask is drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import module

DTYPES = (torch.float32, torch.bfloat16)


def why_not(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None) -> str | None:
    """Why this call cannot be served, or None."""
    if qkv.device.type != "cpu":
        return f"qkv is on {qkv.device}, not on the CPU"
    if qkv.dtype not in DTYPES:
        return f"{str(qkv.dtype).removeprefix('torch.')} has no C++ kernel: use float32 or bfloat16"
    if dropout_p > 0.0 and seed is None:
        return "dropout without a seed is PyTorch's own, which only reference draws"
    return None


def forward(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None,
            save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, N, C), [lse (B, H, N)])."""
    B, N, C3 = qkv.shape
    out = qkv.new_empty(B, N, C3 // 3)
    saved = saved_like(qkv, num_heads, scale, dropout_p, seed) if save else []
    qkv = qkv.contiguous()
    call = _call(qkv, num_heads, scale, dropout_p, seed, saved)
    workspace = torch.empty(call.workspace(False), dtype=torch.uint8)
    call.forward(workspace.data_ptr(), out.data_ptr())
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
    call = _call(qkv, num_heads, scale, dropout_p, seed, saved)
    workspace = torch.empty(call.workspace(True), dtype=torch.uint8)
    call.backward(workspace.data_ptr(), grad.data_ptr(), dqkv.data_ptr())
    return [dqkv]


def _call(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None, saved: list[Tensor]):
    B, N, C3 = qkv.shape
    D = C3 // (3 * num_heads)
    return module.Attention(qkv.dtype == torch.bfloat16, B, N, num_heads, D, D**-0.5 if scale is None else scale, dropout_p,
                            0 if seed is None or dropout_p == 0.0 else int(seed), qkv.data_ptr(),
                            saved[0].data_ptr() if saved else 0, torch.get_num_threads())
