"""Attention's forward kernel. S = Q K^T scale log2(e), P = 2^(S - lse), O = (P keep) V; shapes in comments.

D is head_dim, BLOCK_D the same padded for tl.dot (BLOCK_V where no product sums over it), BM queries and BN keys of a
tile. qkv is (B, N, 3, H, D), out (B, N, H, D), lse, the log-sum-exp of S, (B, H, N).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.reference.block import SITE_ATTENTION

from .philox import keep_tile

SITE = tl.constexpr(SITE_ATTENTION)


@triton.jit
def load_heads(ptr, rows, ROW: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
               MASKED: tl.constexpr, HEADS: tl.constexpr = 1):
    """Rows of HEADS neighbouring heads ([HEADS,] BM, BLOCK_D); zero beyond token N (where MASKED) and channel D."""
    column = tl.arange(0, HEADS * BLOCK_D)  # of the heads side by side, as they lie in memory but for padding
    d = column % BLOCK_D
    pointers = ptr + rows[:, None] * ROW + (column // BLOCK_D * D + d)[None, :]
    if MASKED:
        x = tl.load(pointers, mask=(rows < N)[:, None] & (d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    if HEADS > 1:
        x = tl.trans(tl.reshape(x, (rows.shape[0], HEADS, BLOCK_D)), 1, 0, 2)
    return x


@triton.jit
def store_heads(ptr, rows, value, ROW: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                HEADS: tl.constexpr = 1):
    """Writes value ([HEADS,] BM, BLOCK_D) to the rows of HEADS neighbouring heads."""
    column = tl.arange(0, HEADS * BLOCK_D)
    d = column % BLOCK_D
    value = value.to(ptr.dtype.element_ty)
    if HEADS > 1:
        value = tl.reshape(tl.trans(value, 1, 0, 2), (rows.shape[0], HEADS * BLOCK_D))
    tl.store(ptr + rows[:, None] * ROW + (column // BLOCK_D * D + d)[None, :], value,
             mask=(rows < N)[:, None] & (d < D)[None, :])


@triton.jit
def keep_factors(seed_ptr, rows, first, N: tl.constexpr, BN: tl.constexpr, THRESHOLD: tl.constexpr,
                 KEEP_SCALE: tl.constexpr):
    """Dropout's factors of a tile of P (BM, BN), 0 or KEEP_SCALE; rows: (BM,) of P as (B H N, N)."""
    keep = keep_tile(seed_ptr, rows, first, N, BN, SITE, THRESHOLD)
    return tl.where(keep, KEEP_SCALE, 0.0)


@triton.jit
def softmax_step(q, k, v, best, total, acc, scale, seed_ptr, rows, first, N: tl.constexpr, MASKED: tl.constexpr,
                 THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax's (best, total, acc) after the BN keys from `first`; of one head, or of several at once.

    q: ([heads,] BM, BLOCK_D); k: ([heads,] BN, BLOCK_D); v: ([heads,] BN, BLOCK_V); best, total: ([heads,] BM);
    acc: ([heads,] BM, BLOCK_V); the last three None before any key; rows: ([heads *] BM,) rows of P as (B H N, N).
    """
    BN: tl.constexpr = k.shape[-2]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # ([heads,] BM, BN)
    if MASKED:
        s = tl.where(first + tl.arange(0, BN) < N, s, float("-inf"))
    highest = tl.max(s, -1)
    if best is not None:
        highest = tl.maximum(best, highest)
    p = tl.exp2(s - tl.expand_dims(highest, -1))
    sums = tl.sum(p, -1)
    if THRESHOLD > 0:
        p *= tl.reshape(keep_factors(seed_ptr, rows, first, N, BN, THRESHOLD, KEEP_SCALE), p.shape)
    if best is None:
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    else:
        shrink = tl.exp2(best - highest)
        sums += total * shrink
        acc = tl.dot(p.to(v.dtype), v, acc * tl.expand_dims(shrink, -1), input_precision=PRECISION)
    return highest, sums, acc


@triton.jit
def _keys(k_ptr, v_ptr, first, ROW: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
          BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr):
    """(K ([HEADS,] BN, BLOCK_D), V ([HEADS,] BN, BLOCK_V)) of the BN keys from `first`."""
    keys = first + tl.arange(0, BN)
    return (load_heads(k_ptr, keys, ROW, N, D, BLOCK_D, MASKED, HEADS),
            load_heads(v_ptr, keys, ROW, N, D, BLOCK_V, MASKED, HEADS))


@triton.jit(do_not_specialize=["shares"])
def attention_fwd_kernel(qkv_ptr, out_ptr, lse_ptr, seed_ptr, shares, scale, N: tl.constexpr, H: tl.constexpr,
                         D: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         FULL: tl.constexpr, TAIL: tl.constexpr, HELD: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_V: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
                         PRECISION: tl.constexpr):
    """out (B, N, H, D) and lse (B, H, N); one program per (b, HEADS heads, share).

    It takes query blocks share, share + shares, ... Where HELD, it reads K and V once for all of them; elsewhere again
    for each, but for the tail.
    """
    ROW: tl.constexpr = 3 * H * D
    head = (tl.program_id(0) // shares).to(tl.int64) * HEADS  # b H + h, the first of HEADS
    q_ptr = qkv_ptr + head // H * N * ROW + head % H * D
    k_ptr = q_ptr + H * D
    v_ptr = k_ptr + H * D
    out_ptr += head // H * N * H * D + head % H * D
    held = ()  # (K, V) of each full block
    if HELD:
        for first in tl.static_range(0, FULL, BLOCK_N):
            held += (_keys(k_ptr, v_ptr, first, ROW, N, D, BLOCK_N, BLOCK_D, BLOCK_V, False, HEADS),)
    if TAIL > 0:
        k_t, v_t = _keys(k_ptr, v_ptr, FULL, ROW, N, D, TAIL, BLOCK_D, BLOCK_V, True, HEADS)
    for block in tl.range(tl.program_id(0) % shares, tl.cdiv(N, BLOCK_M), shares):
        start = block * BLOCK_M
        tokens = start + tl.arange(0, BLOCK_M)
        i = tl.arange(0, HEADS * BLOCK_M)
        token = start + i % BLOCK_M
        rows = (head + i // BLOCK_M) * N + token  # (HEADS * BM,) of P as (B H N, N)
        q = load_heads(q_ptr, tokens, ROW, N, D, BLOCK_D, True, HEADS)  # ([HEADS,] BM, BLOCK_D)
        if HELD:
            best, total, acc = None, None, None  # before the first key
            for piece in tl.static_range(FULL // BLOCK_N):
                best, total, acc = softmax_step(q, held[piece][0], held[piece][1], best, total, acc, scale, seed_ptr,
                                                rows, piece * BLOCK_N, N, False, THRESHOLD, KEEP_SCALE, PRECISION)
        else:
            best = tl.full(q.shape[:-1], float("-inf"), tl.float32)
            total = tl.zeros(q.shape[:-1], tl.float32)
            acc = tl.zeros(q.shape[:-1] + (BLOCK_V,), tl.float32)
            for first in range(0, FULL, BLOCK_N):
                k, v = _keys(k_ptr, v_ptr, first, ROW, N, D, BLOCK_N, BLOCK_D, BLOCK_V, False, HEADS)
                best, total, acc = softmax_step(q, k, v, best, total, acc, scale, seed_ptr, rows, first, N, False,
                                                THRESHOLD, KEEP_SCALE, PRECISION)
        if TAIL > 0:
            best, total, acc = softmax_step(q, k_t, v_t, best, total, acc, scale, seed_ptr, rows, FULL, N, True,
                                            THRESHOLD, KEEP_SCALE, PRECISION)
        store_heads(out_ptr, tokens, acc / tl.expand_dims(total, -1), H * D, N, D, BLOCK_V, HEADS)
        if lse_ptr is not None:
            tl.store(lse_ptr + rows, tl.reshape(best + tl.log2(total), rows.shape), mask=token < N)
