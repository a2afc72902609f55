"""x + row_scale dropout(W2 dropout(gelu(W1 LN(x)))): one kernel, or row kernels around cuBLAS.

Fused (C <= 256 in 16 bits, C <= 64 in fp32): the hidden activations stay on chip, backward keeps nothing and
recomputes. Wide: LN kernel, cuBLAS, GELU kernel, cuBLAS, residual kernel; z (M, F) is saved, LN(x) and gelu(z) are
computed again.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as functional
from torch import Tensor

from deit_fast.reference.block import SITE_MLP_HIDDEN, SITE_MLP_OUTPUT

from .common import (HOPPER, architecture, cdiv, contiguous, dot_precision, dropout_arguments, empty, launch,
                     power_of_two, refusal, rows_per_sample)
from .linear import PROGRAMS, Tiles, fused, only_needed, row_splits, wide_weight_gradients, zero_gradients
from .mlp_kernels import layernorm_mlp_bwd_kernel, layernorm_mlp_fwd_kernel
from .reduction import Partials, reduce
from .rowwise import add_branch, gelu_dropout, gelu_dropout_backward, layer_norm, layer_norm_backward

OP = "layernorm_mlp"


def forward_tiles(M: int, C: int, F: int, itemsize: int, mixed: bool = False, arch: int = HOPPER) -> Tiles:
    """Tiles of the fused forward kernel; mixed: fp32 parameters to round, with which 4 warps of 256 columns spill.

    So do 4 warps of 64 rows on Blackwell.
    """
    BLOCK_C = power_of_two(C)
    if itemsize == 4:
        return Tiles(min(32, power_of_two(M)), min(32, power_of_two(F)), BLOCK_C)
    BLOCK_M = 32 if M <= 64 * PROGRAMS or BLOCK_C > 128 else 64  # 64 rows of 256 columns spill
    return Tiles(min(BLOCK_M, power_of_two(M)), min(64 if BLOCK_C <= 128 else 32, power_of_two(F)), BLOCK_C,
                 8 if mixed and BLOCK_C > 128 or BLOCK_M == 64 and arch > HOPPER else 4)


def backward_tiles(M: int, C: int, F: int, itemsize: int, arch: int = HOPPER) -> Tiles:
    """Tiles of the backward kernel, both roles; 64 rows spill at the report's width, 64 features before Hopper."""
    BLOCK_C = power_of_two(C)
    if itemsize == 4:
        return Tiles(16, min(32, power_of_two(F)), BLOCK_C, 8)
    BLOCK_F = 64 if BLOCK_C <= 128 and arch >= HOPPER else 32
    return Tiles(min(32, power_of_two(M)), min(BLOCK_F, power_of_two(F)), BLOCK_C, 8)


def why_not(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor | None,
            fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None) -> str | None:
    """Why this call cannot be served, or None."""
    return refusal(OP, x, dropout_p, seed)


def saved_like(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, *_: object) -> list[Tensor]:
    """What forward saves, uninitialised: nothing where it is fused, else [z (M, F)]."""
    F, C = fc1_weight.shape
    return [] if fused(x, C) else [x.new_empty((x.numel() // C, F))]


def forward(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor | None,
            fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, ..., C), saved) of x (B, ..., C)."""
    F, C = fc1_weight.shape
    rows = x.reshape(-1, C).contiguous()  # (M, C)
    M = rows.shape[0]
    ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, row_scale = contiguous(
        ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, row_scale)
    if not fused(x, C):
        h = layer_norm(OP, rows, ln_weight, ln_bias, eps)
        z = functional.linear(h, fc1_weight.to(x.dtype), None if fc1_bias is None else fc1_bias.to(x.dtype))
        a = gelu_dropout(OP, z, SITE_MLP_HIDDEN, dropout_p, seed)
        out = add_branch(OP, torch.mm(a, fc2_weight.to(x.dtype).t()), fc2_bias, rows, SITE_MLP_OUTPUT, dropout_p, seed,
                         row_scale, rows_per_sample(x))
        return out.view(x.shape), [z] if save else []
    out = x.new_empty(x.shape)
    if M:
        tiles = forward_tiles(M, C, F, x.element_size(), fc1_weight.dtype != x.dtype, architecture(x))
        launch(OP, layernorm_mlp_fwd_kernel, cdiv(M, tiles.BLOCK_M), x, x_ptr=rows, ln_weight_ptr=ln_weight,
               ln_bias_ptr=ln_bias, fc1_weight_ptr=fc1_weight, fc1_bias_ptr=fc1_bias, fc2_weight_ptr=fc2_weight,
               fc2_bias_ptr=fc2_bias, out_ptr=out, row_scale_ptr=row_scale, M=M, rows_per_sample=rows_per_sample(x),
               eps=eps, C=C, F=F, PRECISION=dot_precision(x), num_stages=2, **asdict(tiles),
               **dropout_arguments(dropout_p, seed))
    return out, []


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None,
             fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float,
             dropout_p: float, seed: Tensor | None, row_scale: Tensor | None) -> list[Tensor]:
    """[dx, dln_weight, dln_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias] of grad (B, ..., C)."""
    parameters = [ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias]
    if x.numel() == 0:
        return zero_gradients(x, needs, [x, *parameters])
    *parameters, row_scale = contiguous(*parameters, row_scale)
    C = x.shape[-1]
    rows, g = x.reshape(-1, C).contiguous(), grad.reshape(-1, C)  # (M, C)
    if fused(x, C):
        grads = _fused_backward(g, rows, *parameters, eps, dropout_p, seed, row_scale, rows_per_sample(x),
                                any(needs[:3]) or needs[6], any(needs[3:6]))
    else:
        grads = _wide_backward(g, saved[0], rows, *parameters, eps, dropout_p, seed, row_scale, rows_per_sample(x))
    grads[0] = None if grads[0] is None else grads[0].view(x.shape)
    return only_needed(x, needs, grads)


def _fused_backward(g: Tensor, x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor,
                    fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float, dropout_p: float,
                    seed: Tensor | None, row_scale: Tensor | None, sample_rows: int, dx_needed: bool,
                    dw_needed: bool) -> list[Tensor | None]:
    """All gradients of rows g, x (M, C) by one launch and one sum; None where a role was not needed."""
    (M, C), F = x.shape, fc1_weight.shape[0]
    tiles = backward_tiles(M, C, F, x.element_size(), architecture(x))
    dx_programs = min(cdiv(M, tiles.BLOCK_M), PROGRAMS) if dx_needed else 0
    blocks = cdiv(F, tiles.BLOCK_F)
    splits, rows_per_split = row_splits(M, blocks, tiles.BLOCK_M) if dw_needed else (0, 0)
    dx = x.new_empty(x.shape) if dx_needed else None
    vector = matrix = None
    if dx_needed:  # the kernel writes every column; gradients of absent biases are summed and dropped
        vector = Partials.empty(x, dx_programs, (empty(ln_weight), empty(ln_weight if ln_bias is None else ln_bias),
                                                 empty(ln_weight if fc2_bias is None else fc2_bias)))
    if dw_needed:
        matrix = Partials.empty(x, splits, (empty(fc1_weight), empty(fc2_weight),
                                            fc1_weight.new_empty(F) if fc1_bias is None else empty(fc1_bias)))
    launch(OP, layernorm_mlp_bwd_kernel, dx_programs + blocks * splits, x, x_ptr=x, grad_ptr=g, ln_weight_ptr=ln_weight,
           ln_bias_ptr=ln_bias, fc1_weight_ptr=fc1_weight, fc1_bias_ptr=fc1_bias, fc2_weight_ptr=fc2_weight, dx_ptr=dx,
           vector_ptr=vector and vector.workspace, matrix_ptr=matrix and matrix.workspace, row_scale_ptr=row_scale, M=M,
           rows_per_sample=sample_rows, eps=eps, dx_programs=dx_programs, rows_per_split=rows_per_split, C=C, F=F,
           PRECISION=dot_precision(x), num_stages=2, **asdict(tiles), **dropout_arguments(dropout_p, seed))
    reduce(OP, x, matrix, vector)
    dln_weight, dln_bias, dfc2_bias = vector.grads if vector else (None, None, None)
    dfc1_weight, dfc2_weight, dfc1_bias = matrix.grads if matrix else (None, None, None)
    return [dx, dln_weight, dln_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias]


def _wide_backward(g: Tensor, z: Tensor, x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor,
                   fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float, dropout_p: float,
                   seed: Tensor | None, row_scale: Tensor | None, sample_rows: int) -> list[Tensor | None]:
    """All gradients of rows g, x (M, C), z (M, F): four products by cuBLAS."""
    gy = g
    if dropout_p > 0.0 or row_scale is not None:
        gy = add_branch(OP, g, None, None, SITE_MLP_OUTPUT, dropout_p, seed, row_scale, sample_rows)
    dz = torch.mm(gy, fc2_weight.to(x.dtype))  # da, until the GELU kernel turns it into dz
    a = gelu_dropout_backward(OP, z, dz, SITE_MLP_HIDDEN, dropout_p, seed)
    dfc2_weight, dfc2_bias = wide_weight_gradients(gy, a, fc2_weight, fc2_bias)
    dfc1_weight, dfc1_bias = wide_weight_gradients(dz, layer_norm(OP, x, ln_weight, ln_bias, eps), fc1_weight, fc1_bias)
    dx, vector = layer_norm_backward(OP, torch.mm(dz, fc1_weight.to(x.dtype)), x, ln_weight, ln_bias, g, eps)
    reduce(OP, x, None, vector)
    return [dx, *vector.grads, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias]
