"""The encoder block backward around attention's own, for widths C <= 128: two kernels and a sum. Shapes in comments.

With dout the gradient of the block's output, h and y what forward kept, and dropout, drop-path where written:

    dh = MLP and LN2 (dout)    dy = (attn_row_scale dropout dh) W_proj          rows alone: one kernel
    dqkv = attention (dy)                                                       all rows of an image: attention's kernel
    dx = LN1 (dqkv W_qkv) + dh                                                  rows alone: one kernel

The weights' gradients are sums over all rows: dW1 and dW2 of the MLP lie beside the first kernel's rows, dW_qkv and
dW_proj beside the second's, as further programs. All partial sums go into one workspace for matrices and one for
vectors, in the order of MATRICES and VECTORS in `encoder_block.py`, and are added up by one last launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.reference.block import SITE_LINEAR_RESIDUAL

from .linear_kernels import linear_dw, linear_dx
from .mlp_kernels import mlp_dw, mlp_dx
from .tiles import branch, load, store

SITE = tl.constexpr(SITE_LINEAR_RESIDUAL)


@triton.jit
def _dh_tiles(h_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
              proj_weight_ptr, dh_ptr, dy_ptr, vector_ptr, seed_ptr, attn_row_scale_ptr, mlp_row_scale_ptr, pid,
              programs, M, rows_per_sample, eps, C: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
              PRECISION: tl.constexpr):
    """dh and dy of row tiles pid, pid + programs, ...; vector[pid, 2 C:] = sums of (dln2_weight, dln2_bias, db2)."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_C)
    dln_weight = tl.zeros((BLOCK_C,), tl.float32)
    dln_bias = tl.zeros((BLOCK_C,), tl.float32)
    db2 = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(pid, tl.cdiv(M, BLOCK_M), programs):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        dh, of_ln_weight, of_ln_bias, of_b2 = mlp_dx(
            h_ptr, grad_ptr, ln_weight_ptr, ln_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, seed_ptr,
            mlp_row_scale_ptr, rows, rows_per_sample, M, eps, C, F, BLOCK_M, BLOCK_F, BLOCK_C, THRESHOLD, KEEP_SCALE,
            PRECISION)
        dln_weight += of_ln_weight
        dln_bias += of_ln_bias
        db2 += of_b2
        dh = dh.to(dtype)  # (BM, BLOCK_C), rounded as the second kernel reads it
        store(dh_ptr, rows, cols, dh, M, C)
        g = branch(dh.to(tl.float32), seed_ptr, attn_row_scale_ptr, rows, rows_per_sample, 0, M, C, BLOCK_C, SITE,
                   THRESHOLD, KEEP_SCALE)
        w = load(proj_weight_ptr, cols, cols, C, C).to(dtype)  # (BLOCK_C, BLOCK_C)
        store(dy_ptr, rows, cols, tl.dot(g.to(dtype), w, input_precision=PRECISION), M, C)
    vector_ptr += pid * 5 * C + 2 * C + cols
    tl.store(vector_ptr, dln_weight, mask=cols < C)
    tl.store(vector_ptr + C, dln_bias, mask=cols < C)
    tl.store(vector_ptr + 2 * C, db2, mask=cols < C)


@triton.jit(do_not_specialize=["programs", "rows_per_split", "M", "rows_per_sample"])
def encoder_block_bwd_mlp_kernel(h_ptr, grad_ptr, ln2_weight_ptr, ln2_bias_ptr, fc1_weight_ptr, fc1_bias_ptr,
                                 fc2_weight_ptr, proj_weight_ptr, dh_ptr, dy_ptr, vector_ptr, matrix_ptr, seed_ptr,
                                 attn_row_scale_ptr, mlp_row_scale_ptr, programs, rows_per_split, M, rows_per_sample,
                                 eps, C: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
                                 BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, THRESHOLD: tl.constexpr,
                                 KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """dh and dy (M, C) by the first `programs` programs, pieces of dW1, dW2 and db1 by the others."""
    pid = tl.program_id(0)
    if pid < programs:
        _dh_tiles(h_ptr, grad_ptr, ln2_weight_ptr, ln2_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
                  proj_weight_ptr, dh_ptr, dy_ptr, vector_ptr, seed_ptr, attn_row_scale_ptr, mlp_row_scale_ptr, pid,
                  programs, M, rows_per_sample, eps, C, F, BLOCK_M, BLOCK_F, BLOCK_C, THRESHOLD, KEEP_SCALE, PRECISION)
    else:
        mlp_dw(h_ptr, grad_ptr, ln2_weight_ptr, ln2_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, matrix_ptr,
               seed_ptr, mlp_row_scale_ptr, pid - programs, rows_per_split, M, rows_per_sample, eps, C, F, WIDTH,
               BLOCK_M, BLOCK_F, BLOCK_C, THRESHOLD, KEEP_SCALE, PRECISION)


@triton.jit
def _dx_tiles(x_ptr, dqkv_ptr, dh_ptr, ln_weight_ptr, qkv_weight_ptr, dx_ptr, vector_ptr, pid, programs, M, eps,
              C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
              PRECISION: tl.constexpr):
    """dx of row tiles pid, pid + programs, ...; vector[pid, :2 C] = sums of (dln1_weight, dln1_bias)."""
    cols = tl.arange(0, BLOCK_C)
    dln_weight = tl.zeros((BLOCK_C,), tl.float32)
    dln_bias = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(pid, tl.cdiv(M, BLOCK_M), programs):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        dx, of_ln_weight, of_ln_bias = linear_dx(x_ptr, dqkv_ptr, ln_weight_ptr, qkv_weight_ptr, None, None, rows, 1, M,
                                                 eps, C, 3 * C, BLOCK_M, BLOCK_F, BLOCK_C, True, 0, 1.0, PRECISION)
        dln_weight += of_ln_weight
        dln_bias += of_ln_bias
        store(dx_ptr, rows, cols, dx + load(dh_ptr, rows, cols, M, C).to(tl.float32), M, C)
    tl.store(vector_ptr + pid * 5 * C + cols, dln_weight, mask=cols < C)
    tl.store(vector_ptr + pid * 5 * C + C + cols, dln_bias, mask=cols < C)


@triton.jit(do_not_specialize=["programs", "splits", "rows_per_split", "M", "rows_per_sample"])
def encoder_block_bwd_qkv_kernel(x_ptr, y_ptr, dqkv_ptr, dh_ptr, ln1_weight_ptr, ln1_bias_ptr, qkv_weight_ptr, dx_ptr,
                                 vector_ptr, matrix_ptr, seed_ptr, attn_row_scale_ptr, programs, splits, rows_per_split,
                                 M, rows_per_sample, eps, C: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
                                 BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
                                 THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """dx (M, C) by the first `programs` programs; pieces of dW_qkv and its bias, then of dW_proj and its, by the rest.

    F: hidden features, whose gradients come first in a row of matrix (splits, WIDTH).
    """
    pid = tl.program_id(0)
    qkv_pieces = splits * tl.cdiv(3 * C, BLOCK_F)
    matrix_ptr += 2 * F * C + F
    if pid < programs:
        _dx_tiles(x_ptr, dqkv_ptr, dh_ptr, ln1_weight_ptr, qkv_weight_ptr, dx_ptr, vector_ptr, pid, programs, M, eps, C,
                  BLOCK_M, BLOCK_F, BLOCK_C, PRECISION)
    elif pid < programs + qkv_pieces:
        linear_dw(x_ptr, dqkv_ptr, ln1_weight_ptr, ln1_bias_ptr, matrix_ptr, None, None, pid - programs, rows_per_split,
                  M, 1, eps, C, 3 * C, WIDTH, BLOCK_M, BLOCK_F, BLOCK_C, True, True, 0, 1.0, PRECISION)
    else:
        linear_dw(y_ptr, dh_ptr, None, None, matrix_ptr + 3 * C * C + 3 * C, seed_ptr, attn_row_scale_ptr,
                  pid - programs - qkv_pieces, rows_per_split, M, rows_per_sample, eps, C, C, WIDTH, BLOCK_M, BLOCK_F,
                  BLOCK_C, False, True, THRESHOLD, KEEP_SCALE, PRECISION)
