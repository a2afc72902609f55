"""The fused LN-MLP for widths C <= 256: the hidden activations (M, F) never leave the chip. Shapes in comments.

    h = LN(x)   z = h W1^T + b1   a = dropout2 gelu(z)   y = a W2^T + b2   out = x + row_scale dropout3 y

Backward keeps nothing from forward: z and a of a tile are two products away from x. With gy = row_scale dropout3 g,

    da = gy W2        dz = da dropout2 gelu'(z)    dh = dz W1
    dW1 = dz^T h      dW2 = gy^T a                 db1 = sum dz      db2 = sum gy

in one launch of two independent roles: tiles of rows walk over F for dx, db2 and LayerNorm's gradients; (block of F,
split of rows) pieces walk over rows for dW1, dW2 and db1. z and da are computed in both (7 products for 5), which is
meant to cost less than writing and reading dz and a: 8 C F flops per row against 8 F bytes (not measured yet).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.reference.block import SITE_MLP_HIDDEN, SITE_MLP_OUTPUT

from .tiles import (affine, branch, gelu, gelu_gradient, layer_norm_gradient, load, load_vector, normalise,
                    row_statistics, store)

HIDDEN = tl.constexpr(SITE_MLP_HIDDEN)
OUTPUT = tl.constexpr(SITE_MLP_OUTPUT)


@triton.jit
def mlp(h, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample,
        M, C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
        THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """row_scale dropout3 y (BM, BLOCK_C) in fp32 of h (BM, BLOCK_C): the branch that the residual is added to."""
    cols = tl.arange(0, BLOCK_C)
    y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, F, BLOCK_F):
        features = first + tl.arange(0, BLOCK_F)
        w1 = load(fc1_weight_ptr, features, cols, F, C).to(h.dtype)  # (BLOCK_F, BLOCK_C)
        z = tl.dot(h, tl.trans(w1), input_precision=PRECISION) + load_vector(fc1_bias_ptr, features, F)[None, :]
        a = branch(gelu(z), seed_ptr, None, rows, 1, first, M, F, BLOCK_F, HIDDEN, THRESHOLD, KEEP_SCALE)
        w2 = load(fc2_weight_ptr, cols, features, C, F).to(h.dtype)  # (BLOCK_C, BLOCK_F)
        y = tl.dot(a.to(h.dtype), tl.trans(w2), y, input_precision=PRECISION)
    y += load_vector(fc2_bias_ptr, cols, C)[None, :]
    return branch(y, seed_ptr, row_scale_ptr, rows, rows_per_sample, 0, M, C, BLOCK_C, OUTPUT, THRESHOLD, KEEP_SCALE)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def layernorm_mlp_fwd_kernel(x_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
                             fc2_bias_ptr, out_ptr, seed_ptr, row_scale_ptr, M, rows_per_sample, eps, C: tl.constexpr,
                             F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
                             THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """out (M, C); one program per BLOCK_M rows, which walks over F."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
    h = affine(normalise(x_ptr, rows, cols, mean, rstd, M, C), ln_weight_ptr, ln_bias_ptr, cols, C)
    y = mlp(h.to(x_ptr.dtype.element_ty), fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, seed_ptr,
            row_scale_ptr, rows, rows_per_sample, M, C, F, BLOCK_M, BLOCK_F, BLOCK_C, THRESHOLD, KEEP_SCALE, PRECISION)
    store(out_ptr, rows, cols, load(x_ptr, rows, cols, M, C).to(tl.float32) + y, M, C)


@triton.jit
def _hidden_gradient(h, gy, w1, w2, b1, seed_ptr, rows, first, M, F: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_F: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """(z, dropout2's factors, dz) (BM, BLOCK_F), fp32; h, gy (BM, BLOCK_C), w1 and w2^T (BLOCK_F, BLOCK_C)."""
    z = tl.dot(h, tl.trans(w1), input_precision=PRECISION) + b1[None, :]
    kept = branch(tl.full((BLOCK_M, BLOCK_F), 1.0, tl.float32), seed_ptr, None, rows, 1, first, M, F, BLOCK_F, HIDDEN,
                  THRESHOLD, KEEP_SCALE)
    dz = tl.dot(gy, w2, input_precision=PRECISION) * kept * gelu_gradient(z)
    return z, kept, dz


@triton.jit
def _output_gradient(grad_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, M, C: tl.constexpr,
                     BLOCK_C: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """(g, gy) (BM, BLOCK_C) in fp32: the gradient as it came, and behind drop-path and dropout."""
    g = load(grad_ptr, rows, tl.arange(0, BLOCK_C), M, C).to(tl.float32)
    return g, branch(g, seed_ptr, row_scale_ptr, rows, rows_per_sample, 0, M, C, BLOCK_C, OUTPUT, THRESHOLD, KEEP_SCALE)


@triton.jit
def mlp_dx(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, seed_ptr,
           row_scale_ptr, rows, rows_per_sample, M, eps, C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
           PRECISION: tl.constexpr):
    """(dx (BM, BLOCK_C), and summed over these rows dln_weight, dln_bias and db2 (BLOCK_C,)), fp32."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_C)
    mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
    h = affine(normalise(x_ptr, rows, cols, mean, rstd, M, C), ln_weight_ptr, ln_bias_ptr, cols, C).to(dtype)
    g, gy = _output_gradient(grad_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, M, C, BLOCK_C, THRESHOLD,
                             KEEP_SCALE)
    db2 = tl.sum(gy, 0)
    gy = gy.to(dtype)
    dh = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, F, BLOCK_F):
        features = first + tl.arange(0, BLOCK_F)
        w1 = load(fc1_weight_ptr, features, cols, F, C).to(dtype)
        w2 = load(fc2_weight_ptr, cols, features, C, F).to(dtype)
        z, kept, dz = _hidden_gradient(h, gy, w1, w2, load_vector(fc1_bias_ptr, features, F), seed_ptr, rows, first, M,
                                       F, BLOCK_M, BLOCK_F, THRESHOLD, KEEP_SCALE, PRECISION)
        dh = tl.dot(dz.to(dtype), w1, dh, input_precision=PRECISION)
    xhat = normalise(x_ptr, rows, cols, mean, rstd, M, C)
    g = load(grad_ptr, rows, cols, M, C).to(tl.float32)
    dx = g + layer_norm_gradient(dh, xhat, rstd, ln_weight_ptr, cols, C)
    return dx, tl.sum(dh * xhat, 0), tl.sum(dh, 0), db2


@triton.jit
def _dx_tiles(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, dx_ptr,
              vector_ptr, seed_ptr, row_scale_ptr, pid, programs, M, rows_per_sample, eps, C: tl.constexpr,
              F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
              THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """dx of row tiles pid, pid + programs, ...; and their sums: vector[pid] = (dln_weight, dln_bias, db2)."""
    cols = tl.arange(0, BLOCK_C)
    dln_weight = tl.zeros((BLOCK_C,), tl.float32)
    dln_bias = tl.zeros((BLOCK_C,), tl.float32)
    db2 = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(pid, tl.cdiv(M, BLOCK_M), programs):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        dx, of_ln_weight, of_ln_bias, of_b2 = mlp_dx(
            x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, seed_ptr,
            row_scale_ptr, rows, rows_per_sample, M, eps, C, F, BLOCK_M, BLOCK_F, BLOCK_C, THRESHOLD, KEEP_SCALE,
            PRECISION)
        dln_weight += of_ln_weight
        dln_bias += of_ln_bias
        db2 += of_b2
        store(dx_ptr, rows, cols, dx, M, C)
    vector_ptr += pid * 3 * C + cols
    tl.store(vector_ptr, dln_weight, mask=cols < C)
    tl.store(vector_ptr + C, dln_bias, mask=cols < C)
    tl.store(vector_ptr + 2 * C, db2, mask=cols < C)


@triton.jit
def mlp_dw(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, matrix_ptr,
           seed_ptr, row_scale_ptr, piece, rows_per_split, M, rows_per_sample, eps, C: tl.constexpr, F: tl.constexpr,
           WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
           THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """matrix[split, :2 F C + F] = (dW1, dW2, db1) of one block of features over one split; matrix (splits, WIDTH)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    split = (piece // blocks).to(tl.int64)
    first = piece % blocks * BLOCK_F
    features = first + tl.arange(0, BLOCK_F)
    cols = tl.arange(0, BLOCK_C)
    w1 = load(fc1_weight_ptr, features, cols, F, C).to(dtype)  # (BLOCK_F, BLOCK_C)
    w2 = load(fc2_weight_ptr, cols, features, C, F).to(dtype)  # (BLOCK_C, BLOCK_F)
    b1 = load_vector(fc1_bias_ptr, features, F)
    dw1 = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    dw2 = tl.zeros((BLOCK_C, BLOCK_F), tl.float32)
    db1 = tl.zeros((BLOCK_F,), tl.float32)
    for start in range(0, rows_per_split, BLOCK_M):
        rows = split * rows_per_split + start + tl.arange(0, BLOCK_M)
        mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
        h = affine(normalise(x_ptr, rows, cols, mean, rstd, M, C), ln_weight_ptr, ln_bias_ptr, cols, C).to(dtype)
        _, gy = _output_gradient(grad_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, M, C, BLOCK_C, THRESHOLD,
                                 KEEP_SCALE)
        gy = gy.to(dtype)  # zero beyond the last row, and dz and dW with it
        z, kept, dz = _hidden_gradient(h, gy, w1, w2, b1, seed_ptr, rows, first, M, F, BLOCK_M, BLOCK_F, THRESHOLD,
                                       KEEP_SCALE, PRECISION)
        dw1 = tl.dot(tl.trans(dz.to(dtype)), h, dw1, input_precision=PRECISION)
        dw2 = tl.dot(tl.trans(gy), (gelu(z) * kept).to(dtype), dw2, input_precision=PRECISION)
        db1 += tl.sum(dz, 0)
    matrix_ptr += split * WIDTH
    store(matrix_ptr, features, cols, dw1, F, C)
    store(matrix_ptr + F * C, cols, features, dw2, C, F)
    tl.store(matrix_ptr + 2 * F * C + features, db1, mask=features < F)


@triton.jit(do_not_specialize=["M", "rows_per_sample", "dx_programs", "rows_per_split"])
def layernorm_mlp_bwd_kernel(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
                             dx_ptr, vector_ptr, matrix_ptr, seed_ptr, row_scale_ptr, M, rows_per_sample, eps,
                             dx_programs, rows_per_split, C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
                             BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, THRESHOLD: tl.constexpr,
                             KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """dx (M, C) by the first `dx_programs` programs, pieces of dW1, dW2 and db1 by the others."""
    pid = tl.program_id(0)
    if dx_ptr is not None:  # a role that nobody needs has no pointers, so its code must not be compiled
        if pid < dx_programs:
            _dx_tiles(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, dx_ptr,
                      vector_ptr, seed_ptr, row_scale_ptr, pid, dx_programs, M, rows_per_sample, eps, C, F, BLOCK_M,
                      BLOCK_F, BLOCK_C, THRESHOLD, KEEP_SCALE, PRECISION)
    if matrix_ptr is not None:
        if pid >= dx_programs:
            mlp_dw(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
                   matrix_ptr, seed_ptr, row_scale_ptr, pid - dx_programs, rows_per_split, M, rows_per_sample, eps, C,
                   F, 2 * F * C + F, BLOCK_M, BLOCK_F, BLOCK_C, THRESHOLD, KEEP_SCALE, PRECISION)
