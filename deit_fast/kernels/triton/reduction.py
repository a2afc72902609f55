"""Sums of partial gradients, in a fixed order: each result bit is the same on every run.

Backward programs each write the sums over their own rows, one row of an fp32 workspace per program: `matrix_ptr` (S,
sum of the matrix gradients' sizes), `vector_ptr` (T, sum of the vectors'). One launch then adds them up for all
gradients and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, launch

BLOCK = 128
ROWS = 16


@dataclass(frozen=True)
class Partials:
    """A workspace (count, sum of sizes) fp32 and the gradients that its columns add up to, side by side."""

    workspace: Tensor
    grads: tuple[Tensor | None, ...]

    @classmethod
    def empty(cls, x: Tensor, count: int, grads: Sequence[Tensor | None]) -> Partials:
        width = sum(grad.numel() for grad in grads if grad is not None)
        return cls(x.new_empty((count, width), dtype=torch.float32), tuple(grads))


@triton.constexpr_function
def _total(sizes, first, end):
    return sum(sizes[i] for i in range(first, end))


@triton.jit
def _sum(partial_ptr, out_ptr, block, count, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
         ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[block] = the sum over `count` rows of columns START + block of partial (count, WIDTH)."""
    cols = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        total += tl.load(partial_ptr + rows[:, None].to(tl.int64) * WIDTH + START + cols[None, :],
                         mask=(rows < count)[:, None] & (cols < SIZE)[None, :], other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < SIZE)


@triton.jit(do_not_specialize=["S", "T"])
def reduction_kernel(matrix_ptr, vector_ptr, outs, S, T, SIZES: tl.constexpr, MATRICES: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """All outs: the first MATRICES from matrix_ptr (S, ...), the others from vector_ptr (T, ...), SIZES[i] columns each.

    BLOCK elements of one gradient per program.
    """
    MATRIX: tl.constexpr = _total(SIZES, 0, MATRICES)
    VECTOR: tl.constexpr = _total(SIZES, MATRICES, len(SIZES))
    block = tl.program_id(0)  # counted from the gradient's first
    for i in tl.static_range(len(SIZES)):
        if (block >= 0) & (block < tl.cdiv(SIZES[i], BLOCK)):
            if i < MATRICES:
                _sum(matrix_ptr, outs[i], block, S, _total(SIZES, 0, i), SIZES[i], MATRIX, ROWS, BLOCK)
            else:
                _sum(vector_ptr, outs[i], block, T, _total(SIZES, MATRICES, i), SIZES[i], VECTOR, ROWS, BLOCK)
        block -= tl.cdiv(SIZES[i], BLOCK)


def reduce(op: str, x: Tensor, matrix: Partials | None, vector: Partials | None) -> None:
    """Adds up both workspaces into their gradients; a gradient that is None has no columns."""
    matrices, vectors = ([] if each is None else [grad for grad in each.grads if grad is not None]
                         for each in (matrix, vector))
    outs = (*matrices, *vectors)
    sizes = tuple(out.numel() for out in outs)
    launch(op, reduction_kernel, sum(cdiv(size, BLOCK) for size in sizes), x,
           matrix_ptr=matrix and matrix.workspace, vector_ptr=vector and vector.workspace, outs=outs,
           S=matrix.workspace.shape[0] if matrix else 0, T=vector.workspace.shape[0] if vector else 0, SIZES=sizes,
           MATRICES=len(matrices), ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
