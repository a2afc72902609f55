"""The kernels of layernorm_linear and linear_residual for widths C <= 256; shapes in comments.

h is LN(x) or x (M, C), W (F, C), g the gradient behind bias, dropout and drop-path (M, F):

    y = h W^T + b        dh = g W        dW = g^T h        db = sum_rows g

Forward tiles rows and features; the LayerNorm of a tile is redone per feature block from rows in cache. Backward is one
launch whose programs take one of two roles, independent of each other: row tiles of dx, and (feature block, split of
the rows) pieces of dW, which `reduction` adds up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.reference.block import SITE_LINEAR_RESIDUAL

from .tiles import affine, branch, layer_norm_gradient, load, load_vector, normalise, row_statistics, store

SITE = tl.constexpr(SITE_LINEAR_RESIDUAL)


@triton.jit
def _hidden(x_ptr, rows, cols, mean, rstd, ln_weight_ptr, ln_bias_ptr, M, C: tl.constexpr, LAYERNORM: tl.constexpr):
    """h (BM, BLOCK) in the dtype of x: LN(x), or x itself."""
    if LAYERNORM:
        h = affine(normalise(x_ptr, rows, cols, mean, rstd, M, C), ln_weight_ptr, ln_bias_ptr, cols, C)
        return h.to(x_ptr.dtype.element_ty)
    return load(x_ptr, rows, cols, M, C)


@triton.jit
def _product(x_ptr, rows, cols, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, M, eps, C: tl.constexpr,
             F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
             BLOCK_K: tl.constexpr, LAYERNORM: tl.constexpr, PRECISION: tl.constexpr):
    """h W^T + b for one tile (BM, BLOCK_F), in fp32."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = mean
    if LAYERNORM:
        mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
    y = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = _hidden(x_ptr, rows, k, mean, rstd, ln_weight_ptr, ln_bias_ptr, M, C, LAYERNORM)  # (BM, BLOCK_K)
        w = load(weight_ptr, cols, k, F, C).to(h.dtype)  # (BLOCK_F, BLOCK_K)
        y = tl.dot(h, tl.trans(w), y, input_precision=PRECISION)
    return y + load_vector(bias_ptr, cols, F)[None, :]


@triton.jit(do_not_specialize=["M"])
def layernorm_linear_fwd_kernel(x_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, out_ptr, M, eps,
                                C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
                                BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """out (M, F) = LN(x) W^T + b; one program per (rows, features) tile."""
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    y = _product(x_ptr, rows, cols, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, M, eps, C, F, BLOCK_M, BLOCK_F,
                 BLOCK_C, BLOCK_K, True, PRECISION)
    store(out_ptr, rows, cols, y, M, F)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def linear_residual_fwd_kernel(x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, seed_ptr, row_scale_ptr, M,
                               rows_per_sample, C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
                               BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
                               THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """out (M, F) = residual + row_scale dropout(x W^T + b); one program per (rows, features) tile."""
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid % blocks * BLOCK_F
    cols = first + tl.arange(0, BLOCK_F)
    y = _product(x_ptr, rows, cols, None, None, weight_ptr, bias_ptr, M, 0.0, C, F, BLOCK_M, BLOCK_F, BLOCK_C, BLOCK_K,
                 False, PRECISION)
    y = branch(y, seed_ptr, row_scale_ptr, rows, rows_per_sample, first, M, F, BLOCK_F, SITE, THRESHOLD, KEEP_SCALE)
    store(out_ptr, rows, cols, load(residual_ptr, rows, cols, M, F).to(tl.float32) + y, M, F)


@triton.jit
def _gradient(grad_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, first, M, F: tl.constexpr,
              BLOCK_F: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """g (BM, BLOCK_F), fp32: the output's gradient through drop-path and dropout."""
    g = load(grad_ptr, rows, first + tl.arange(0, BLOCK_F), M, F).to(tl.float32)
    return branch(g, seed_ptr, row_scale_ptr, rows, rows_per_sample, first, M, F, BLOCK_F, SITE, THRESHOLD, KEEP_SCALE)


@triton.jit
def linear_dx(x_ptr, grad_ptr, ln_weight_ptr, weight_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, M, eps,
              C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
              LAYERNORM: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """(dx (BM, BLOCK_C), and summed over these rows LayerNorm's dweight and dbias (BLOCK_C,)), fp32."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_C)
    dh = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, F, BLOCK_F):
        g = _gradient(grad_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, first, M, F, BLOCK_F, THRESHOLD,
                      KEEP_SCALE)  # (BM, BLOCK_F)
        w = load(weight_ptr, first + tl.arange(0, BLOCK_F), cols, F, C).to(dtype)  # (BLOCK_F, BLOCK_C)
        dh = tl.dot(g.to(dtype), w, dh, input_precision=PRECISION)
    dln_weight = tl.zeros((BLOCK_C,), tl.float32)
    dln_bias = dln_weight
    if LAYERNORM:
        mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
        xhat = normalise(x_ptr, rows, cols, mean, rstd, M, C)
        dln_weight = tl.sum(dh * xhat, 0)
        dln_bias = tl.sum(dh, 0)
        dh = layer_norm_gradient(dh, xhat, rstd, ln_weight_ptr, cols, C)
    return dh, dln_weight, dln_bias


@triton.jit
def _dx_tiles(x_ptr, grad_ptr, ln_weight_ptr, weight_ptr, dx_ptr, vector_ptr, seed_ptr, row_scale_ptr, pid, programs, M,
              rows_per_sample, eps, C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
              BLOCK_C: tl.constexpr, LAYERNORM: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
              PRECISION: tl.constexpr):
    """dx of row tiles pid, pid + programs, ...; vector[pid] = sums of LayerNorm's (dweight, dbias)."""
    cols = tl.arange(0, BLOCK_C)
    dln_weight = tl.zeros((BLOCK_C,), tl.float32)
    dln_bias = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(pid, tl.cdiv(M, BLOCK_M), programs):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        dx, of_ln_weight, of_ln_bias = linear_dx(
            x_ptr, grad_ptr, ln_weight_ptr, weight_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, M, eps, C, F,
            BLOCK_M, BLOCK_F, BLOCK_C, LAYERNORM, THRESHOLD, KEEP_SCALE, PRECISION)
        dln_weight += of_ln_weight
        dln_bias += of_ln_bias
        store(dx_ptr, rows, cols, dx, M, C)
    if LAYERNORM:
        tl.store(vector_ptr + pid * 2 * C + cols, dln_weight, mask=cols < C)
        tl.store(vector_ptr + pid * 2 * C + C + cols, dln_bias, mask=cols < C)


@triton.jit
def linear_dw(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, matrix_ptr, seed_ptr, row_scale_ptr, piece, rows_per_split,
              M, rows_per_sample, eps, C: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, LAYERNORM: tl.constexpr, BIAS: tl.constexpr,
              THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """matrix[split, :F C + F] = (dW, db) of one block of features over one split; matrix (splits, WIDTH)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    split = (piece // blocks).to(tl.int64)
    first = piece % blocks * BLOCK_F
    features = first + tl.arange(0, BLOCK_F)
    cols = tl.arange(0, BLOCK_C)
    dw = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_F,), tl.float32)
    for start in range(0, rows_per_split, BLOCK_M):
        rows = split * rows_per_split + start + tl.arange(0, BLOCK_M)
        mean = tl.zeros((BLOCK_M,), tl.float32)
        rstd = mean
        if LAYERNORM:
            mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
        h = _hidden(x_ptr, rows, cols, mean, rstd, ln_weight_ptr, ln_bias_ptr, M, C, LAYERNORM)  # (BM, BLOCK_C)
        g = _gradient(grad_ptr, seed_ptr, row_scale_ptr, rows, rows_per_sample, first, M, F, BLOCK_F, THRESHOLD,
                      KEEP_SCALE)
        dw = tl.dot(tl.trans(g.to(dtype)), h, dw, input_precision=PRECISION)
        db += tl.sum(g, 0)
    matrix_ptr += split * WIDTH
    store(matrix_ptr, features, cols, dw, F, C)
    if BIAS:
        tl.store(matrix_ptr + F * C + features, db, mask=features < F)


@triton.jit(do_not_specialize=["M", "rows_per_sample", "dx_programs", "rows_per_split"])
def linear_bwd_kernel(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, dx_ptr, vector_ptr, matrix_ptr, seed_ptr,
                      row_scale_ptr, M, rows_per_sample, eps, dx_programs, rows_per_split, C: tl.constexpr,
                      F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
                      LAYERNORM: tl.constexpr, BIAS: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
                      PRECISION: tl.constexpr):
    """dx (M, C) by the first `dx_programs` programs, pieces of dW and db by the others."""
    pid = tl.program_id(0)
    if dx_ptr is not None:  # a role that nobody needs has no pointers, so its code must not be compiled
        if pid < dx_programs:
            _dx_tiles(x_ptr, grad_ptr, ln_weight_ptr, weight_ptr, dx_ptr, vector_ptr, seed_ptr, row_scale_ptr, pid,
                      dx_programs, M, rows_per_sample, eps, C, F, BLOCK_M, BLOCK_F, BLOCK_C, LAYERNORM, THRESHOLD,
                      KEEP_SCALE, PRECISION)
    if matrix_ptr is not None:
        if pid >= dx_programs:
            WIDTH: tl.constexpr = F * C + (F if BIAS else 0)
            linear_dw(x_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, matrix_ptr, seed_ptr, row_scale_ptr,
                      pid - dx_programs, rows_per_split, M, rows_per_sample, eps, C, F, WIDTH, BLOCK_M, BLOCK_F,
                      BLOCK_C, LAYERNORM, BIAS, THRESHOLD, KEEP_SCALE, PRECISION)
