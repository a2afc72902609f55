"""residual + row_scale dropout(x W^T + b). One kernel; wider, cuBLAS and one pass for all that follows it."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from deit_fast.reference.block import SITE_LINEAR_RESIDUAL

from .common import cdiv, contiguous, dot_precision, dropout_arguments, launch, refusal, rows_per_sample
from .linear import (channels_per_step, forward_tiles, fused, linear_backward, only_needed, wide_weight_gradients,
                     zero_gradients)
from .linear_kernels import linear_residual_fwd_kernel
from .rowwise import add_branch

OP = "linear_residual"


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None) -> str | None:
    """Why this call cannot be served, or None."""
    return refusal(OP, x, dropout_p, seed)


def saved_like(*_: object) -> list[Tensor]:
    """What forward saves: nothing; the mask is drawn again."""
    return []


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, ..., F), []) of x (B, ..., C) and residual (B, ..., F)."""
    F, C = weight.shape
    rows, residual_rows = x.reshape(-1, C).contiguous(), residual.reshape(-1, F).contiguous()  # (M, C), (M, F)
    weight, bias, row_scale = contiguous(weight, bias, row_scale)
    M = rows.shape[0]
    if not fused(x, C):
        y = torch.mm(rows, weight.to(x.dtype).t())
        return add_branch(OP, y, bias, residual_rows, SITE_LINEAR_RESIDUAL, dropout_p, seed, row_scale,
                          rows_per_sample(x)).view(residual.shape), []
    out = residual.new_empty(residual.shape)
    if M:
        tiles = forward_tiles(M, C, F, x.element_size())
        launch(OP, linear_residual_fwd_kernel, cdiv(M, tiles.BLOCK_M) * cdiv(F, tiles.BLOCK_F), x, x_ptr=rows,
               weight_ptr=weight, bias_ptr=bias, residual_ptr=residual_rows, out_ptr=out, row_scale_ptr=row_scale, M=M,
               rows_per_sample=rows_per_sample(x), C=C, F=F, BLOCK_K=channels_per_step(C, x.element_size()),
               PRECISION=dot_precision(x), num_stages=2, **asdict(tiles), **dropout_arguments(dropout_p, seed))
    return out, []


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], x: Tensor, weight: Tensor, bias: Tensor | None,
             residual: None, dropout_p: float, seed: Tensor | None, row_scale: Tensor | None) -> list[Tensor]:
    """[dx, dweight, dbias] of grad (B, ..., F)."""
    F, C = weight.shape
    rows, g = x.reshape(-1, C).contiguous(), grad.reshape(-1, F)  # (M, C), (M, F)
    if rows.shape[0] == 0:
        return zero_gradients(x, needs, [x, weight, bias])
    weight, bias, row_scale = contiguous(weight, bias, row_scale)
    if not fused(x, C):
        if dropout_p > 0.0 or row_scale is not None:
            g = add_branch(OP, g, None, None, SITE_LINEAR_RESIDUAL, dropout_p, seed, row_scale, rows_per_sample(x))
        dx = torch.mm(g, weight.to(x.dtype)) if needs[0] else None
        dweight, dbias = wide_weight_gradients(g, rows, weight, bias) if any(needs[1:]) else (None, None)
    else:
        dx, _, _, dweight, dbias = linear_backward(OP, g, rows, None, None, weight, bias, 0.0, dropout_p, seed,
                                                   row_scale, rows_per_sample(x), needs[0], any(needs[1:]))
    return only_needed(x, needs, [None if dx is None else dx.view(x.shape), dweight, dbias])
