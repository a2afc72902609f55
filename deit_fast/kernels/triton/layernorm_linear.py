"""LN(x) W^T + b. For C <= 256 one kernel forward, one and a sum backward; wider, LayerNorm's kernels around cuBLAS.

Nothing is saved: the row statistics cost two sums over a row that backward reads anyway.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from .common import cdiv, contiguous, dot_precision, launch, refusal
from .linear import (channels_per_step, forward_tiles, fused, linear_backward, only_needed, wide_weight_gradients,
                     zero_gradients)
from .linear_kernels import layernorm_linear_fwd_kernel
from .reduction import reduce
from .rowwise import layer_norm, layer_norm_backward

OP = "layernorm_linear"


def why_not(x: Tensor, *_: object) -> str | None:
    """Why this call cannot be served, or None."""
    return refusal(OP, x)


def saved_like(*_: object) -> list[Tensor]:
    """What forward saves: nothing."""
    return []


def forward(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
            save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (..., F), []) of x (..., C)."""
    F, C = weight.shape
    rows = x.reshape(-1, C).contiguous()  # (M, C)
    ln_weight, ln_bias, weight, bias = contiguous(ln_weight, ln_bias, weight, bias)
    M = rows.shape[0]
    if not fused(x, C):
        h = layer_norm(OP, rows, ln_weight, ln_bias, eps)
        out = torch.nn.functional.linear(h, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return out.view(*x.shape[:-1], F), []
    out = x.new_empty((*x.shape[:-1], F))
    if M:
        tiles = forward_tiles(M, C, F, x.element_size())
        launch(OP, layernorm_linear_fwd_kernel, cdiv(M, tiles.BLOCK_M) * cdiv(F, tiles.BLOCK_F), x, x_ptr=rows,
               ln_weight_ptr=ln_weight, ln_bias_ptr=ln_bias, weight_ptr=weight, bias_ptr=bias, out_ptr=out, M=M,
               eps=eps, C=C, F=F, BLOCK_K=channels_per_step(C, x.element_size()), PRECISION=dot_precision(x),
               num_stages=2, **asdict(tiles))
    return out, []


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None,
             weight: Tensor, bias: Tensor | None, eps: float) -> list[Tensor]:
    """[dx, dln_weight, dln_bias, dweight, dbias] of grad (..., F)."""
    F, C = weight.shape
    rows, g = x.reshape(-1, C).contiguous(), grad.reshape(-1, F)  # (M, C), (M, F)
    if rows.shape[0] == 0:
        return zero_gradients(x, needs, [x, ln_weight, ln_bias, weight, bias])
    ln_weight, ln_bias, weight, bias = contiguous(ln_weight, ln_bias, weight, bias)
    dx_needed, dw_needed = any(needs[:3]), any(needs[3:])
    if not fused(x, C):
        dx = dln_weight = dln_bias = dweight = dbias = None
        if dx_needed:
            dx, vector = layer_norm_backward(OP, torch.mm(g, weight.to(x.dtype)), rows, ln_weight, ln_bias, None, eps)
            reduce(OP, x, None, vector)
            dln_weight, dln_bias = vector.grads
        if dw_needed:
            dweight, dbias = wide_weight_gradients(g, layer_norm(OP, rows, ln_weight, ln_bias, eps), weight, bias)
        grads = [dx, dln_weight, dln_bias, dweight, dbias]
    else:
        grads = linear_backward(OP, g, rows, ln_weight, ln_bias, weight, bias, eps, 0.0, None, None, 1, dx_needed,
                                dw_needed)
    grads[0] = None if grads[0] is None else grads[0].view(x.shape)
    return only_needed(x, needs, grads)
