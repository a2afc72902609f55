"""Sums of partial gradients, in a fixed order: each result bit is the same on every run.

Backward programs each write the sums over their own rows, one row of an fp32 workspace per program: `matrix_ptr` (S,
sum of the matrix gradients' sizes), `vector_ptr` (T, sum of the vectors'). One launch then adds them up for all
gradients and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
def reduction_kernel(matrix_ptr, vector_ptr, outs, S, T, SIZES: tl.constexpr, STARTS: tl.constexpr, FIRST: tl.constexpr,
                     MATRICES: tl.constexpr, MATRIX: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK: tl.constexpr):
    """All outs: the first MATRICES from matrix_ptr (S, MATRIX), the others from vector_ptr (T, VECTOR).

    Gradient i has SIZES[i] columns from STARTS[i] on; programs FIRST[i] to FIRST[i + 1] add up BLOCK of them each.
    """
    pid = tl.program_id(0)
    for i in tl.static_range(len(SIZES)):
        if (pid >= FIRST[i]) & (pid < FIRST[i + 1]):
            if i < MATRICES:
                _sum(matrix_ptr, outs[i], pid - FIRST[i], S, STARTS[i], SIZES[i], MATRIX, ROWS, BLOCK)
            else:
                _sum(vector_ptr, outs[i], pid - FIRST[i], T, STARTS[i], SIZES[i], VECTOR, ROWS, BLOCK)


def reduce(op: str, x: Tensor, matrix: Partials | None, vector: Partials | None) -> None:
    """Adds up both workspaces into their gradients; a gradient that is None has no columns."""
    matrices, vectors = ([] if each is None else [grad for grad in each.grads if grad is not None]
                         for each in (matrix, vector))
    outs = (*matrices, *vectors)
    sizes = [out.numel() for out in outs]
    first = list(accumulate((cdiv(size, BLOCK) for size in sizes), initial=0))
    columns = [list(accumulate((out.numel() for out in each), initial=0)) for each in (matrices, vectors)]
    launch(op, reduction_kernel, first[-1], x, matrix_ptr=matrix and matrix.workspace,
           vector_ptr=vector and vector.workspace, outs=outs, S=matrix.workspace.shape[0] if matrix else 0,
           T=vector.workspace.shape[0] if vector else 0, SIZES=tuple(sizes),
           STARTS=(*columns[0][:-1], *columns[1][:-1]), FIRST=tuple(first), MATRICES=len(matrices),
           MATRIX=columns[0][-1], VECTOR=columns[1][-1], ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
