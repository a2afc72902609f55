"""Attention's backward kernels, in the names of `attention_kernels`; grad is dO (B, N, H, D), delta (B, H, N).

    dV = (P keep)^T dO    dP = (dO V^T) keep    dS = P (dP - sum_j P dP)    dQ = dS K scale    dK = dS^T Q scale
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import keep_factors, load_heads, store_heads


@triton.jit
def _probabilities(q, do, k, v, lse, scale, seed_ptr, head, rows, first, N: tl.constexpr, BN: tl.constexpr,
                   MASKED: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """(P, P keep, dP) of a tile (BM, BN), dP being zero where dropout was."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where((first + tl.arange(0, BN) < N)[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    kept = p
    if THRESHOLD > 0:
        keep = keep_factors(seed_ptr, head * N + rows, first, N, BN, THRESHOLD, KEEP_SCALE)
        kept = p * keep
        dp *= keep
    return p, kept, dp


@triton.jit
def attention_bwd_kernel(qkv_ptr, grad_ptr, lse_ptr, dqkv_ptr, seed_ptr, scale, N: tl.constexpr, H: tl.constexpr,
                         D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FULL: tl.constexpr,
                         TAIL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, THRESHOLD: tl.constexpr,
                         KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """All of dqkv (B, N, 3, H, D); one program per (b, h). The keys are [0, FULL) and [FULL, FULL + TAIL).

    BLOCK_V pads D where no product sums over it: of 8 channels, q, k and dO are read in both widths.
    """
    LOGIT: tl.constexpr = 0.6931471805599453  # ln 2: `scale` carries log2(e), gradients do not
    ROW: tl.constexpr = 3 * H * D
    head = tl.program_id(0).to(tl.int64)  # b H + h
    offset = head // H * N * ROW + head % H * D
    q_ptr = qkv_ptr + offset
    k_ptr = q_ptr + H * D
    v_ptr = k_ptr + H * D
    dq_ptr = dqkv_ptr + offset
    dk_ptr = dq_ptr + H * D
    dv_ptr = dk_ptr + H * D
    do_ptr = grad_ptr + head // H * N * H * D + head % H * D
    keys = tl.arange(0, FULL)
    EXACT: tl.constexpr = FULL <= N
    k = load_heads(k_ptr, keys, ROW, N, D, BLOCK_D, not EXACT)  # (FULL, BLOCK_D)
    v = load_heads(v_ptr, keys, ROW, N, D, BLOCK_D, not EXACT)
    k_v = k if BLOCK_V == BLOCK_D else load_heads(k_ptr, keys, ROW, N, D, BLOCK_V, not EXACT)
    dk = tl.zeros((FULL, BLOCK_V), tl.float32)
    dv = tl.zeros((FULL, BLOCK_V), tl.float32)
    if TAIL > 0:
        tail_keys = FULL + tl.arange(0, TAIL)
        k_t = load_heads(k_ptr, tail_keys, ROW, N, D, BLOCK_D, True)  # (TAIL, BLOCK_D)
        v_t = load_heads(v_ptr, tail_keys, ROW, N, D, BLOCK_D, True)
        k_tv = k_t if BLOCK_V == BLOCK_D else load_heads(k_ptr, tail_keys, ROW, N, D, BLOCK_V, True)
        dk_t = tl.zeros((TAIL, BLOCK_V), tl.float32)
        dv_t = tl.zeros((TAIL, BLOCK_V), tl.float32)
    for start in range(0, N, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_heads(q_ptr, rows, ROW, N, D, BLOCK_D, True)  # (BM, BLOCK_D)
        do = load_heads(do_ptr, rows, H * D, N, D, BLOCK_D, True)
        q_v = q if BLOCK_V == BLOCK_D else load_heads(q_ptr, rows, ROW, N, D, BLOCK_V, True)
        do_v = do if BLOCK_V == BLOCK_D else load_heads(do_ptr, rows, H * D, N, D, BLOCK_V, True)
        lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("inf"))  # P = 0 beyond the last query
        p, kept, dp = _probabilities(q, do, k, v, lse, scale, seed_ptr, head, rows, 0, N, FULL, not EXACT, THRESHOLD,
                                     KEEP_SCALE, PRECISION)  # (BM, FULL)
        delta = tl.sum(p * dp, 1)
        if TAIL > 0:
            p_t, kept_t, dp_t = _probabilities(q, do, k_t, v_t, lse, scale, seed_ptr, head, rows, FULL, N, TAIL, True,
                                               THRESHOLD, KEEP_SCALE, PRECISION)  # (BM, TAIL)
            delta += tl.sum(p_t * dp_t, 1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k_v, input_precision=PRECISION)
        dk = tl.dot(tl.trans(ds), q_v, dk, input_precision=PRECISION)
        dv = tl.dot(tl.trans(kept.to(q.dtype)), do_v, dv, input_precision=PRECISION)
        if TAIL > 0:
            ds_t = (p_t * (dp_t - delta[:, None])).to(q.dtype)
            dq = tl.dot(ds_t, k_tv, dq, input_precision=PRECISION)
            dk_t = tl.dot(tl.trans(ds_t), q_v, dk_t, input_precision=PRECISION)
            dv_t = tl.dot(tl.trans(kept_t.to(q.dtype)), do_v, dv_t, input_precision=PRECISION)
        store_heads(dq_ptr, rows, dq * (scale * LOGIT), ROW, N, D, BLOCK_V)
    store_heads(dk_ptr, keys, dk * (scale * LOGIT), ROW, N, D, BLOCK_V)
    store_heads(dv_ptr, keys, dv, ROW, N, D, BLOCK_V)
    if TAIL > 0:
        store_heads(dk_ptr, tail_keys, dk_t * (scale * LOGIT), ROW, N, D, BLOCK_V)
        store_heads(dv_ptr, tail_keys, dv_t, ROW, N, D, BLOCK_V)


@triton.jit
def _tile(q, do, k_ptr, v_ptr, lse, scale, seed_ptr, head, rows, first, ROW: tl.constexpr, N: tl.constexpr,
          D: tl.constexpr, BN: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, THRESHOLD: tl.constexpr,
          KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """(P, dP, k) of the BN keys from `first`."""
    keys = first + tl.arange(0, BN)
    k = load_heads(k_ptr, keys, ROW, N, D, BLOCK_D, MASKED)
    v = load_heads(v_ptr, keys, ROW, N, D, BLOCK_D, MASKED)
    p, _, dp = _probabilities(q, do, k, v, lse, scale, seed_ptr, head, rows, first, N, BN, MASKED, THRESHOLD,
                              KEEP_SCALE, PRECISION)
    return p, dp, k


@triton.jit
def attention_bwd_dq_kernel(qkv_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, scale, N: tl.constexpr,
                            H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            FULL: tl.constexpr, TAIL: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr,
                            KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """dQ and delta (B, H, N); one program per (b, h, block of queries), which walks over the keys twice."""
    LOGIT: tl.constexpr = 0.6931471805599453
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    ROW: tl.constexpr = 3 * H * D
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = head // H * N * ROW + head % H * D
    k_ptr = qkv_ptr + offset + H * D
    v_ptr = k_ptr + H * D
    q = load_heads(qkv_ptr + offset, rows, ROW, N, D, BLOCK_D, True)  # (BM, BLOCK_D)
    do = load_heads(grad_ptr + head // H * N * H * D + head % H * D, rows, H * D, N, D, BLOCK_D, True)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("inf"))
    delta = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, FULL, BLOCK_N):
        p, dp, k = _tile(q, do, k_ptr, v_ptr, lse, scale, seed_ptr, head, rows, first, ROW, N, D, BLOCK_N, BLOCK_D,
                         False, THRESHOLD, KEEP_SCALE, PRECISION)
        delta += tl.sum(p * dp, 1)
    if TAIL > 0:
        p_t, dp_t, k_t = _tile(q, do, k_ptr, v_ptr, lse, scale, seed_ptr, head, rows, FULL, ROW, N, D, TAIL, BLOCK_D,
                               True, THRESHOLD, KEEP_SCALE, PRECISION)
        delta += tl.sum(p_t * dp_t, 1)
    tl.store(delta_ptr + head * N + rows, delta, mask=rows < N)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if TAIL > 0:
        dq = tl.dot((p_t * (dp_t - delta[:, None])).to(q.dtype), k_t, dq, input_precision=PRECISION)
    for first in range(0, FULL, BLOCK_N):
        p, dp, k = _tile(q, do, k_ptr, v_ptr, lse, scale, seed_ptr, head, rows, first, ROW, N, D, BLOCK_N, BLOCK_D,
                         False, THRESHOLD, KEEP_SCALE, PRECISION)
        dq = tl.dot((p * (dp - delta[:, None])).to(q.dtype), k, dq, input_precision=PRECISION)
    store_heads(dqkv_ptr + offset, rows, dq * (scale * LOGIT), ROW, N, D, BLOCK_D)


@triton.jit
def _from_queries(k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, scale, seed_ptr, head, key_start, start,
                  ROW: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, THRESHOLD: tl.constexpr,
                  KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """(dK, dV) after the BN queries from `start`. Keys beyond N need no mask: they are never stored."""
    rows = start + tl.arange(0, BN)
    q = load_heads(q_ptr, rows, ROW, N, D, BLOCK_D, MASKED)  # (BN, BLOCK_D)
    do = load_heads(do_ptr, rows, H * D, N, D, BLOCK_D, MASKED)
    lse = tl.load(lse_ptr + head * N + rows, mask=rows < N, other=float("inf"))
    delta = tl.load(delta_ptr + head * N + rows, mask=rows < N, other=0.0)
    p, kept, dp = _probabilities(q, do, k, v, lse, scale, seed_ptr, head, rows, key_start, N, BLOCK_M, False, THRESHOLD,
                                 KEEP_SCALE, PRECISION)  # (BN, BLOCK_M): queries x keys
    dv = tl.dot(tl.trans(kept.to(q.dtype)), do, dv, input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_bwd_dkv_kernel(qkv_ptr, grad_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr, scale, N: tl.constexpr,
                             H: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                             FULL: tl.constexpr, TAIL: tl.constexpr, BLOCK_D: tl.constexpr, THRESHOLD: tl.constexpr,
                             KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """dK and dV; one program per (b, h, block of BLOCK_M keys), which walks over the queries."""
    LOGIT: tl.constexpr = 0.6931471805599453
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    ROW: tl.constexpr = 3 * H * D
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    key_start = pid % blocks * BLOCK_M
    keys = key_start + tl.arange(0, BLOCK_M)
    offset = head // H * N * ROW + head % H * D
    q_ptr = qkv_ptr + offset
    do_ptr = grad_ptr + head // H * N * H * D + head % H * D
    k = load_heads(q_ptr + H * D, keys, ROW, N, D, BLOCK_D, True)  # (BLOCK_M, BLOCK_D)
    v = load_heads(q_ptr + 2 * H * D, keys, ROW, N, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, FULL, BLOCK_N):
        dk, dv = _from_queries(k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, scale, seed_ptr, head, key_start, start,
                               ROW, N, H, D, BLOCK_N, BLOCK_M, BLOCK_D, False, THRESHOLD, KEEP_SCALE, PRECISION)
    if TAIL > 0:
        dk, dv = _from_queries(k, v, dk, dv, q_ptr, do_ptr, lse_ptr, delta_ptr, scale, seed_ptr, head, key_start, FULL,
                               ROW, N, H, D, TAIL, BLOCK_M, BLOCK_D, True, THRESHOLD, KEEP_SCALE, PRECISION)
    store_heads(dqkv_ptr + offset + H * D, keys, dk * (scale * LOGIT), ROW, N, D, BLOCK_D)
    store_heads(dqkv_ptr + offset + 2 * H * D, keys, dv, ROW, N, D, BLOCK_D)
