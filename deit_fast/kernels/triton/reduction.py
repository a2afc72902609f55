"""Sums of partial gradients, in a fixed order: each result bit is the same on every run.

Backward programs each write the sums over their own rows, one row of an fp32 workspace per program: `matrix_ptr` (S,
sum of the matrix gradients' sizes), `vector_ptr` (T, sum of the vectors'). One launch then adds them up for up to three
gradients of each kind and rounds once.
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
def reduction_kernel(matrix_ptr, vector_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr, S, T,
                     SIZE0: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr, SIZE3: tl.constexpr,
                     SIZE4: tl.constexpr, SIZE5: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients 0 to 2 from matrix_ptr (S, ...), 3 to 5 from vector_ptr (T, ...); BLOCK elements per program."""
    END0: tl.constexpr = (SIZE0 + BLOCK - 1) // BLOCK  # first block behind gradient 0, ...
    END1: tl.constexpr = END0 + (SIZE1 + BLOCK - 1) // BLOCK
    END2: tl.constexpr = END1 + (SIZE2 + BLOCK - 1) // BLOCK
    END3: tl.constexpr = END2 + (SIZE3 + BLOCK - 1) // BLOCK
    END4: tl.constexpr = END3 + (SIZE4 + BLOCK - 1) // BLOCK
    MATRIX: tl.constexpr = SIZE0 + SIZE1 + SIZE2
    VECTOR: tl.constexpr = SIZE3 + SIZE4 + SIZE5
    pid = tl.program_id(0)
    if SIZE0 > 0:
        if pid < END0:
            _sum(matrix_ptr, out0_ptr, pid, S, 0, SIZE0, MATRIX, ROWS, BLOCK)
    if SIZE1 > 0:
        if (pid >= END0) & (pid < END1):
            _sum(matrix_ptr, out1_ptr, pid - END0, S, SIZE0, SIZE1, MATRIX, ROWS, BLOCK)
    if SIZE2 > 0:
        if (pid >= END1) & (pid < END2):
            _sum(matrix_ptr, out2_ptr, pid - END1, S, SIZE0 + SIZE1, SIZE2, MATRIX, ROWS, BLOCK)
    if SIZE3 > 0:
        if (pid >= END2) & (pid < END3):
            _sum(vector_ptr, out3_ptr, pid - END2, T, 0, SIZE3, VECTOR, ROWS, BLOCK)
    if SIZE4 > 0:
        if (pid >= END3) & (pid < END4):
            _sum(vector_ptr, out4_ptr, pid - END3, T, SIZE3, SIZE4, VECTOR, ROWS, BLOCK)
    if SIZE5 > 0:
        if pid >= END4:
            _sum(vector_ptr, out5_ptr, pid - END4, T, SIZE3 + SIZE4, SIZE5, VECTOR, ROWS, BLOCK)


def reduce(op: str, x: Tensor, matrix: Partials | None, vector: Partials | None) -> None:
    """Adds up both workspaces into their gradients; a gradient that is None has no columns."""
    grads = [*_padded(matrix), *_padded(vector)]
    sizes = [0 if grad is None else grad.numel() for grad in grads]
    launch(op, reduction_kernel, sum(cdiv(size, BLOCK) for size in sizes), x,
           matrix_ptr=matrix and matrix.workspace, vector_ptr=vector and vector.workspace,
           **{f"out{i}_ptr": grad for i, grad in enumerate(grads)},
           **{f"SIZE{i}": size for i, size in enumerate(sizes)}, S=matrix.workspace.shape[0] if matrix else 0,
           T=vector.workspace.shape[0] if vector else 0, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)


def _padded(partials: Partials | None) -> list[Tensor | None]:
    grads = list(partials.grads) if partials else []
    return grads + [None] * (3 - len(grads))
