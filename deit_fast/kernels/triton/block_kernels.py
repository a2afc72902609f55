"""The whole encoder block forward in one kernel, for widths C <= 128. It has not run on a GPU. Shapes in comments.

    qkv = LN1(x) W_qkv^T + b                                              all N rows of an image
    h   = x + attn_row_scale dropout(softmax(Q K^T scale) V W_proj^T + b)  a tile of rows, all heads at once
    out = h + mlp_row_scale dropout(W2 dropout(gelu(W1 LN2(h))))           the same tile

An image is the work of one or more programs. Only attention looks at other rows, and only at their K and V: so each
program makes the qkv of its whole image and then takes its share of the row tiles from Q to `out`, h and the heads'
outputs staying on chip. K and V go through memory, which training keeps for backward anyway: what a program's threads
have stored, all of them see behind the barrier (loads are never the non-coherent kind, which `test_triton_block.py`
reads from the assembly). Programs that share an image store the same bits to the same places.

Heads are the batch of a batched product, so that every warp has heads of its own and a row of softmax stays in a warp.
Their outputs lie side by side as (BM, BLOCK_H * BLOCK_V) with gaps where H or D is no power of two; W_proj's columns
are loaded with the same gaps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.reference.block import SITE_LINEAR_RESIDUAL

from .attention_kernels import softmax_step
from .mlp_kernels import mlp
from .tiles import branch, layer_norm, load, load_vector, store

SITE = tl.constexpr(SITE_LINEAR_RESIDUAL)


@triton.jit
def _heads(ptr, heads, tokens, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Q, K or V (BLOCK_H, BN, BLOCK_D) of one image; zero beyond head H, token N and channel D."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    head, token = heads[:, None, None], tokens[None, :, None]
    return tl.load(ptr + token * (3 * H * D) + head * D + d, mask=(head < H) & (token < N) & (d < D), other=0.0)


@triton.jit
def _qkv(x_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, qkv_ptr, tokens, eps, N: tl.constexpr,
         C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """Stores LN(x) W^T + b of one tile of an image's tokens."""
    cols = tl.arange(0, BLOCK_C)
    h = layer_norm(load(x_ptr, tokens, cols, N, C).to(tl.float32), ln_weight_ptr, ln_bias_ptr, cols, eps, C)
    h = h.to(x_ptr.dtype.element_ty)  # (BLOCK_R, BLOCK_C)
    for first in range(0, 3 * C, BLOCK_F):
        features = first + tl.arange(0, BLOCK_F)
        w = load(weight_ptr, features, cols, 3 * C, C).to(h.dtype)  # (BLOCK_F, BLOCK_C)
        y = tl.dot(h, tl.trans(w), input_precision=PRECISION) + load_vector(bias_ptr, features, 3 * C)[None, :]
        store(qkv_ptr, tokens, features, y, N, 3 * C)


@triton.jit
def _attention(qkv_ptr, lse_ptr, seed_ptr, image, heads, tokens, scale, N: tl.constexpr, H: tl.constexpr,
               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr,
               BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, THRESHOLD: tl.constexpr,
               KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """The output (BLOCK_H, BM, BLOCK_V) of some heads for a tile of queries, fp32; log-sum-exp where it is kept.

    qkv_ptr: of the image; lse_ptr: of the batch.
    """
    k_ptr = qkv_ptr + H * D
    v_ptr = k_ptr + H * D
    rows = ((image * H + heads) * N)[:, None] + tokens[None, :]  # (BLOCK_H, BM) of P as (B H N, N)
    flat = tl.reshape(rows, (BLOCK_H * BLOCK_M,))
    q = _heads(qkv_ptr, heads, tokens, N, H, D, BLOCK_D)  # (BLOCK_H, BM, BLOCK_D)
    best = tl.full((BLOCK_H, BLOCK_M), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_M, BLOCK_V), tl.float32)
    for first in range(0, FULL, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = _heads(k_ptr, heads, keys, N, H, D, BLOCK_D)  # (BLOCK_H, BLOCK_N, BLOCK_D)
        v = _heads(v_ptr, heads, keys, N, H, D, BLOCK_V)
        best, total, acc = softmax_step(q, k, v, best, total, acc, scale, seed_ptr, flat, first, N, False, THRESHOLD,
                                        KEEP_SCALE, PRECISION)
    if TAIL > 0:
        keys = FULL + tl.arange(0, TAIL)
        k = _heads(k_ptr, heads, keys, N, H, D, BLOCK_D)  # (BLOCK_H, TAIL, BLOCK_D)
        v = _heads(v_ptr, heads, keys, N, H, D, BLOCK_V)
        best, total, acc = softmax_step(q, k, v, best, total, acc, scale, seed_ptr, flat, FULL, N, True, THRESHOLD,
                                        KEEP_SCALE, PRECISION)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, best + tl.log2(total), mask=(heads < H)[:, None] & (tokens < N)[None, :])
    return acc / total[:, :, None]


@triton.jit(do_not_specialize=["shares"])
def encoder_block_fwd_kernel(x_ptr, ln1_weight_ptr, ln1_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr,
                             proj_bias_ptr, ln2_weight_ptr, ln2_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr,
                             fc2_bias_ptr, out_ptr, qkv_ptr, y_ptr, h_ptr, lse_ptr, seed_ptr, attn_row_scale_ptr,
                             mlp_row_scale_ptr, shares, scale, eps, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                             F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             FULL: tl.constexpr, TAIL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                             BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
                             ATTN_THRESHOLD: tl.constexpr, ATTN_KEEP_SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
                             KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """out (B, N, C), qkv (B, N, 3, H, D) and, for backward, y and h (B, N, C) and lse (B, H, N).

    One program per (image, share): row tiles share, share + shares, ...
    """
    C: tl.constexpr = H * D
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    image = (tl.program_id(0) // shares).to(tl.int64)
    share = tl.program_id(0) % shares
    end = (image + 1) * N  # among the rows of the batch, which row_scale and dropout count
    x_ptr += image * N * C  # from here on tokens of this image are counted, in 32 bits
    out_ptr += image * N * C
    qkv_ptr += image * N * 3 * C
    for start in range(0, N, BLOCK_R):
        _qkv(x_ptr, ln1_weight_ptr, ln1_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, qkv_ptr, start + tl.arange(0, BLOCK_R),
             eps, N, C, BLOCK_F, BLOCK_C, PRECISION)
    tl.debug_barrier()  # qkv of the whole image, stored by these threads, is there for all of them
    cols = tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_H * BLOCK_V)  # of the heads' outputs side by side
    for tile in tl.range(share, tl.cdiv(N, BLOCK_M), shares, disable_licm=True):
        tokens = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = image * N + tokens
        h = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, H, BLOCK_H):
            y = _attention(qkv_ptr, lse_ptr, seed_ptr, image, first + tl.arange(0, BLOCK_H), tokens, scale, N, H, D,
                           BLOCK_M, BLOCK_N, FULL, TAIL, BLOCK_H, BLOCK_D, BLOCK_V, ATTN_THRESHOLD, ATTN_KEEP_SCALE,
                           PRECISION)
            y = tl.reshape(tl.trans(y.to(dtype), 1, 0, 2), (BLOCK_M, BLOCK_H * BLOCK_V))
            head, d = first + column // BLOCK_V, column % BLOCK_V
            inside = ((head < H) & (d < D))[None, :]
            channel = (head * D + d)[None, :]
            if y_ptr is not None:
                tl.store(y_ptr + image * N * C + tokens[:, None] * C + channel, y, mask=(tokens < N)[:, None] & inside)
            w = tl.load(proj_weight_ptr + cols[:, None] * C + channel, mask=(cols < C)[:, None] & inside, other=0.0)
            h = tl.dot(y, tl.trans(w.to(dtype)), h, input_precision=PRECISION)
        h += load_vector(proj_bias_ptr, cols, C)[None, :]
        h = branch(h, seed_ptr, attn_row_scale_ptr, rows, N, 0, end, C, BLOCK_C, SITE, THRESHOLD, KEEP_SCALE)
        h = (load(x_ptr, tokens, cols, N, C).to(tl.float32) + h).to(dtype)  # (BM, BLOCK_C)
        if h_ptr is not None:
            store(h_ptr + image * N * C, tokens, cols, h, N, C)
        h = h.to(tl.float32)
        y = mlp(layer_norm(h, ln2_weight_ptr, ln2_bias_ptr, cols, eps, C).to(dtype), fc1_weight_ptr, fc1_bias_ptr,
                fc2_weight_ptr, fc2_bias_ptr, seed_ptr, mlp_row_scale_ptr, rows, N, end, C, F, BLOCK_M, BLOCK_F,
                BLOCK_C, THRESHOLD, KEEP_SCALE, PRECISION)
        store(out_ptr, tokens, cols, h + y, N, C)
