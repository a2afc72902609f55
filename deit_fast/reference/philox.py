"""Philox4x32-10, the counter-based generator behind seeded dropout and augmentation plans, in plain torch.

A block cipher turns (counter, key) into four random 32-bit words: no state, so any element of any mask can be computed
alone, in any order, on any device, and again in the backward pass. Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011). Words live in int64 tensors as values in [0, 2^32); the 64-bit product of two of them wraps in int64,
and shift-and-mask recovers both halves. In plain torch this costs 30 times F.dropout: it is the specification, which native
kernels meet bit by bit, not a fast path.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key each round

Word = Tensor | int


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words per counter: Philox4x32 with ten rounds.

    counter: four words, int64 tensors of broadcastable shapes or ints (at least one a tensor); key: two words. All in
    [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def split(value: Word) -> tuple[Word, Word]:
    """The low and the high 32-bit word of a 64-bit integer (an int64 tensor or an int)."""
    return value & MASK, value >> 32 & MASK


def keep_mask(shape: tuple[int, ...] | torch.Size, p: float, seed: Tensor, site: int) -> Tensor:
    """A bool tensor of `shape`, False with probability p: the dropout mask that every backend draws for (seed, site).

    seed: () int64, on the device of the mask. Element i of the contiguous mask is kept iff word i % 4 of the counter
    (lo(i // 4), hi(i // 4), site, 0) under the key (lo(seed), hi(seed)) is at least round(p 2^32).
    """
    numel = torch.Size(shape).numel()
    block = torch.arange((numel + 3) // 4, device=seed.device)  # (ceil(numel / 4),)
    words = philox4x32((*split(block), site, 0), split(seed))
    drawn = torch.stack([w.expand_as(block) for w in words], dim=-1).flatten()[:numel]
    return (drawn >= round(p * 2**32)).view(shape)
