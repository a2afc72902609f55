"""Attention on packed qkv in base-2 softmax: blocks of queries of a few heads forward, one head a program backward.

A ViT's sequence is barely longer than a power of two (66 = 64 + 2, 198 = 3 * 64 + 6), so keys are cut into full blocks
without a mask and one tail of the smallest power of two >= 16 that holds the rest: 80 and 208 keys are computed where
whole powers of two take 128 and 256. Queries come in blocks of 16 (one warp each) for short sequences. head_dim 8 is
padded to 16 only inside Q K^T, whose instruction needs it.

A row of one head of 8 channels is 16 bytes, half of the smallest transfer. So forward takes as many heads as lie in 64
bytes of a row, as the batch of a batched product with a warp for each. More heads would save few transfers and fill
small batches less evenly. Backward takes one head: its P^T and dS^T cost shuffles in a batched product (4 heads of 8,
66 tokens: 21 % more instructions than a program for each head).

A forward program walks over blocks of queries and holds K and V of the whole sequence on chip: of one block of keys in
registers or shared memory as the compiler finds room, of up to 256 tokens in 16 bits and head_dim 64 in shared memory.
Longer sequences, wider heads, fp32 and dropout read them again for each block of queries. Where images are few, as
many programs share a head's blocks as find room at once, and each reads K and V: 5 at batch 64, 1 from batch 199 on
(66 tokens, 8 heads); with one block each (198 tokens, 3 heads, batch 64) holding gains nothing over reading.

Backward never sees the output: delta = sum_j P_ij dP_ij comes from a whole row of P, so there is neither a saved O
nor an fp32 dq workspace, and every gradient is written once by one program (no atomics: bit-reproducible). Where dK and
dV of a head fit in registers one kernel gives all gradients; longer sequences take one kernel for dQ (which leaves
delta behind) and one for dK and dV, with tiles of their own before Hopper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention_backward_kernels import attention_bwd_dkv_kernel, attention_bwd_dq_kernel, attention_bwd_kernel
from .attention_kernels import attention_fwd_kernel
from .common import (HOPPER, architecture, cdiv, dot_precision, dropout_arguments, launch, power_of_two,
                     refusal)

OP = "attention"
LOG2E = 1.0 / math.log(2.0)
WARPS = 132 * 24  # of forward, that an H100 holds at once: its registers hold 24 a multiprocessor
BACKWARD_WARPS = 132 * 10  # of a short sequence's backward, that an H100 holds at once: 193 registers a thread
SECTOR = 32  # bytes, the smallest transfer
SHORT = 96  # tokens up to which a warp takes 16 queries
LONGEST = 256  # tokens whose K and V a program holds: the code is written out for each block of keys
HELD_BYTES = 16 * 1024  # of K and V for each warp that holds them: eight such warps fit 164 KiB of shared memory


@dataclass(frozen=True)
class Shape:
    """The tiles for one call: N = FULL + up to TAIL keys, FULL a multiple of BLOCK_N."""

    BLOCK_M: int
    BLOCK_N: int
    FULL: int
    TAIL: int
    num_warps: int


def split_keys(N: int, BLOCK_N: int) -> tuple[int, int]:
    """(FULL, TAIL): N keys as full blocks and a masked tail: 66 -> (64, 16), 198 -> (192, 16), 64 -> (64, 0)."""
    FULL = N // BLOCK_N * BLOCK_N
    return FULL, power_of_two(N - FULL) if N > FULL else 0


def heads_together(N: int, H: int, D: int, itemsize: int) -> int:
    """How many of H heads a forward program takes: the most of 1, 2, 4, 8 that divide H and lie in two sectors.

    One, whose products may be larger, where a long sequence meets heads that fill sectors of their own.
    """
    heads = 8 if N <= SHORT or D * itemsize < SECTOR else 1
    while H % heads or heads > 1 and heads * D * itemsize > 2 * SECTOR:
        heads //= 2
    return heads


def shares(groups: int, blocks: int, num_warps: int) -> int:
    """How many programs share the query blocks of a group of heads: as long as all warps find room at once."""
    most = max(1, min(blocks, WARPS // max(1, groups * num_warps)))
    return cdiv(blocks, cdiv(blocks, most))


def forward_shape(N: int, D: int, itemsize: int, heads: int = 1) -> Shape:
    """Tiles of the forward kernel for N tokens, head_dim D, `itemsize` bytes an element and `heads` heads."""
    if heads > 1:
        BLOCK_M, num_warps = 16 if N <= SHORT else 32, heads
    elif N <= SHORT or D > 128:
        BLOCK_M, num_warps = 16, 1
    else:
        BLOCK_M, num_warps = (32, 2) if D <= 16 or itemsize == 4 else (64, 4)
    BLOCK_N = 64 if D <= 64 and not (itemsize == 4 and D > 32) else 32
    if N < BLOCK_N:
        BLOCK_N = 32 if N >= 32 else 16
    return Shape(BLOCK_M, BLOCK_N, *split_keys(N, BLOCK_N), num_warps)


def holds(tiles: Shape, D: int, itemsize: int, heads: int, blocks: int, dropout_p: float) -> bool:
    """Whether a forward program of `blocks` query blocks reads K and V once for all of them.

    One full block of keys always. Several must fit; wider heads, fp32 and dropout's Philox, which costs far more than
    is saved, spill then; and a program of one query block reads them once anyway, walking in fewer registers.
    """
    if tiles.FULL <= tiles.BLOCK_N:
        return True
    keys = tiles.FULL + tiles.TAIL
    return (blocks > 1 and keys <= LONGEST and D <= 64 and itemsize == 2 and dropout_p == 0.0
            and 2 * keys * heads * power_of_two(D) * itemsize <= HELD_BYTES * tiles.num_warps)


def backward_shape(N: int, D: int, itemsize: int, programs: int = 1) -> Shape | None:
    """Tiles of the one backward kernel, whose two pieces FULL and TAIL hold all keys; None where they would spill.

    programs: the heads of all images. Where they fill an H100 with one warp each, it takes 16 queries at a time (80
    rows for 66, no barriers); fewer programs share 32 queries between two warps, so that as many warps are at work.
    """
    FULL = 16
    while FULL * 2 <= N and FULL < 128:
        FULL *= 2
    TAIL = power_of_two(N - FULL) if N > FULL else 0
    if N > 128 or (FULL + TAIL) * power_of_two(D) * itemsize > 5120:
        return None
    if itemsize == 2 and FULL + TAIL <= 80 and D <= 16 and programs >= BACKWARD_WARPS:
        return Shape(16, FULL, FULL, TAIL, 1)
    return Shape(32 if N > 16 and itemsize == 2 else 16, FULL, FULL, TAIL,
                 2 if FULL + TAIL <= 96 and itemsize == 2 else 4)


def split_backward_shape(N: int, D: int, itemsize: int, arch: int = HOPPER) -> tuple[Shape, Shape]:
    """Tiles of the dQ kernel and, with the roles of queries and keys exchanged, of the dK and dV kernel.

    Before Hopper dK and dV of 64 keys, both in registers, spill: of head_dim 64, and of 32 with dropout.
    """
    BLOCK_N = 16 if itemsize == 4 or D > 64 else 32
    wide = Shape(2 * BLOCK_N, BLOCK_N, *split_keys(N, BLOCK_N), 4)
    return wide, replace(wide, BLOCK_M=32) if arch < HOPPER and D > 16 else wide


def why_not(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None) -> str | None:
    """Why this call cannot be served, or None."""
    if qkv.shape[-1] // (3 * num_heads) > 256:
        return f"head_dim {qkv.shape[-1] // (3 * num_heads)} is above 256"
    return refusal(OP, qkv, dropout_p, seed)


def _arguments(tiles: Shape, qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float,
               seed: Tensor | None) -> dict[str, object]:
    """The arguments that all four kernels take alike."""
    N, D = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    return {"scale": (D**-0.5 if scale is None else scale) * LOG2E, "N": N, "H": num_heads, "D": D,
            "BLOCK_M": tiles.BLOCK_M, "BLOCK_N": tiles.BLOCK_N, "FULL": tiles.FULL, "TAIL": tiles.TAIL,
            "BLOCK_D": power_of_two(D), "PRECISION": dot_precision(qkv), "num_warps": tiles.num_warps, "num_stages": 2,
            **dropout_arguments(dropout_p, seed)}


def forward(qkv: Tensor, num_heads: int, scale: float | None, dropout_p: float, seed: Tensor | None,
            save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, N, C), [log-sum-exp (B, H, N) fp32, base 2] to save) of qkv (B, N, 3C)."""
    qkv = qkv.contiguous()
    B, N, C3 = qkv.shape
    D = C3 // (3 * num_heads)
    out = qkv.new_empty((B, N, C3 // 3))
    saved = saved_like(qkv, num_heads) if save else []
    heads = heads_together(N, num_heads, D, qkv.element_size())
    tiles = forward_shape(N, D, qkv.element_size(), heads)
    groups = B * num_heads // heads
    blocks = cdiv(N, tiles.BLOCK_M)
    per_group = shares(groups, blocks, tiles.num_warps)
    held = holds(tiles, D, qkv.element_size(), heads, cdiv(blocks, per_group), dropout_p)
    launch(OP, attention_fwd_kernel, groups * per_group, qkv, qkv_ptr=qkv, out_ptr=out,
           lse_ptr=saved[0] if save else None, shares=per_group, HEADS=heads, HELD=held, BLOCK_V=power_of_two(D, 8),
           **_arguments(tiles, qkv, num_heads, scale, dropout_p, seed))
    return out, saved


def saved_like(qkv: Tensor, num_heads: int, *_: object) -> list[Tensor]:
    """What forward saves, uninitialised: [log-sum-exp (B, H, N) fp32]."""
    return [qkv.new_empty((qkv.shape[0], num_heads, qkv.shape[1]), dtype=torch.float32)]


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], qkv: Tensor, num_heads: int, scale: float | None,
             dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """[dqkv (B, N, 3C)] of grad (B, N, C)."""
    if not needs[0]:
        return [qkv.new_empty(0)]
    qkv = qkv.contiguous()
    B, N, C3 = qkv.shape
    D = C3 // (3 * num_heads)
    dqkv = qkv.new_empty((B, N, C3))
    tensors = {"qkv_ptr": qkv, "grad_ptr": grad, "lse_ptr": saved[0], "dqkv_ptr": dqkv}
    tiles = backward_shape(N, D, qkv.element_size(), B * num_heads)
    if tiles is not None:
        launch(OP, attention_bwd_kernel, B * num_heads, qkv, **tensors, BLOCK_V=power_of_two(D, 8),
               **_arguments(tiles, qkv, num_heads, scale, dropout_p, seed))
        return [dqkv]
    tensors["delta_ptr"] = saved[0].new_empty(saved[0].shape)
    for kernel, tiles in zip((attention_bwd_dq_kernel, attention_bwd_dkv_kernel),
                             split_backward_shape(N, D, qkv.element_size(), architecture(qkv))):
        launch(OP, kernel, B * num_heads * cdiv(N, tiles.BLOCK_M), qkv, **tensors,
               **_arguments(tiles, qkv, num_heads, scale, dropout_p, seed))
    return [dqkv]
