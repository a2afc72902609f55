"""Dropout masks inside kernels: Philox4x32-10, bit for bit those of `reference.philox.keep_mask`.

One block of the cipher gives the words of four neighbouring elements. Where rows start at a multiple of four, a tile
asks for a quarter as many blocks as it has elements (ten rounds are about 80 integer instructions); elsewhere every
element runs its own. Triton's own `tl.philox` is the cipher; only the counters are ours.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_of(seed, block, SITE: tl.constexpr):
    """The four uint32 words of each counter (lo(block), hi(block), SITE, 0); block: int64 tensor."""
    lo = block.to(tl.uint32)
    hi = (block >> 32).to(tl.uint32)
    zero = lo * 0
    return tl.philox(seed, lo, hi, zero + SITE, zero)


@triton.jit
def keep_tile(seed_ptr, rows, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SITE: tl.constexpr,
              THRESHOLD: tl.constexpr):
    """Which elements of a tile dropout keeps: bool (BM, BLOCK).

    rows: (BM,) int64 rows of the logical (rows, WIDTH) tensor; first: the tile's first column, a multiple of BLOCK.
    """
    seed = tl.load(seed_ptr)
    if WIDTH % 4 == 0 and BLOCK >= 4:
        block = rows[:, None] * (WIDTH // 4) + (first // 4 + tl.arange(0, BLOCK // 4))[None, :]  # (BM, BLOCK / 4)
        w0, w1, w2, w3 = words_of(seed, block, SITE)
        least = tl.full((), THRESHOLD, tl.uint32)
        even = tl.join(w0 >= least, w2 >= least)
        odd = tl.join(w1 >= least, w3 >= least)
        keep = tl.reshape(tl.join(even, odd), (rows.shape[0], BLOCK))
    else:
        index = rows[:, None] * WIDTH + (first + tl.arange(0, BLOCK))[None, :]  # (BM, BLOCK)
        w0, w1, w2, w3 = words_of(seed, index >> 2, SITE)
        lane = index & 3
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        keep = word >= tl.full((), THRESHOLD, tl.uint32)
    return keep
