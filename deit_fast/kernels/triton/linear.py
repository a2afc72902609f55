"""Tiles and the backward pass that layernorm_linear and linear_residual share."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .common import cdiv, dot_precision, dropout_arguments, empty, launch, power_of_two
from .linear_kernels import linear_bwd_kernel
from .reduction import Partials, reduce

PROGRAMS = 264  # two per multiprocessor of an H100; more tiles are looped over


def fused(x: Tensor, C: int) -> bool:
    """Whether the fused kernels serve width C: up to 256, in fp32 (no 16-bit tensor cores) up to 64."""
    return C <= (64 if x.dtype == torch.float32 else 256)


@dataclass(frozen=True)
class Tiles:
    """Rows, features and (padded) channels of one program, and its warps."""

    BLOCK_M: int
    BLOCK_F: int
    BLOCK_C: int
    num_warps: int = 4


def forward_tiles(M: int, C: int, F: int, itemsize: int) -> Tiles:
    """Tiles of a forward kernel over M rows: small until every multiprocessor has work."""
    BLOCK_F = min(64 if itemsize == 2 else 32, power_of_two(F))
    BLOCK_M = 64 if itemsize == 2 and C <= 128 and M * cdiv(F, BLOCK_F) >= 64 * 2 * PROGRAMS else 32
    return Tiles(min(BLOCK_M, power_of_two(M)), BLOCK_F, power_of_two(C))


def backward_tiles(M: int, C: int, F: int, itemsize: int) -> Tiles:
    """Tiles of the backward kernel, both roles."""
    BLOCK_C = power_of_two(C)
    BLOCK_M = 32 if itemsize == 4 or M <= 32 * PROGRAMS or BLOCK_C > 128 else 64
    return Tiles(min(BLOCK_M, power_of_two(M)), min(64 if itemsize == 2 else 32, power_of_two(F)), BLOCK_C,
                 4 if BLOCK_C <= 64 else 8)


def row_splits(M: int, feature_blocks: int, BLOCK_M: int) -> tuple[int, int]:
    """(splits, rows per split): into how many pieces of at least 128 rows the sum over rows is cut, by shape alone."""
    splits = max(1, min(cdiv(M, 128), PROGRAMS // feature_blocks))
    rows = cdiv(cdiv(M, splits), BLOCK_M) * BLOCK_M
    return cdiv(M, rows), rows


def channels_per_step(C: int, itemsize: int) -> int:
    """BLOCK_K: how many channels a forward product takes at a time (192 = 3 * 64 wastes nothing)."""
    return min(64 if itemsize == 2 else 32, power_of_two(C))


def linear_backward(op: str, grad: Tensor, x: Tensor, ln_weight: Tensor | None, ln_bias: Tensor | None, weight: Tensor,
                    bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None, row_scale: Tensor | None,
                    rows_per_sample: int, dx_needed: bool, dw_needed: bool) -> list[Tensor | None]:
    """[dx, dln_weight, dln_bias, dweight, dbias] for rows grad (M, F) and x (M, C); None where not needed or absent."""
    (M, C), F = x.shape, weight.shape[0]
    tiles = backward_tiles(M, C, F, x.element_size())
    dx_programs = min(cdiv(M, tiles.BLOCK_M), PROGRAMS) if dx_needed else 0
    blocks = cdiv(F, tiles.BLOCK_F)
    splits, rows_per_split = row_splits(M, blocks, tiles.BLOCK_M) if dw_needed else (0, 0)
    dx = x.new_empty(x.shape) if dx_needed else None
    vector = matrix = None
    if dx_needed and ln_weight is not None:
        vector = Partials.empty(x, dx_programs, (empty(ln_weight), empty(ln_weight if ln_bias is None else ln_bias)))
    if dw_needed:
        matrix = Partials.empty(x, splits, (empty(weight), None if bias is None else empty(bias)))
    launch(op, linear_bwd_kernel, dx_programs + blocks * splits, x, x_ptr=x, grad_ptr=grad, ln_weight_ptr=ln_weight,
           ln_bias_ptr=ln_bias, weight_ptr=weight, dx_ptr=dx, vector_ptr=vector and vector.workspace,
           matrix_ptr=matrix and matrix.workspace, row_scale_ptr=row_scale, M=M, rows_per_sample=rows_per_sample,
           eps=eps, dx_programs=dx_programs, rows_per_split=rows_per_split, C=C, F=F, LAYERNORM=ln_weight is not None,
           BIAS=bias is not None, PRECISION=dot_precision(x), num_stages=2, **asdict(tiles),
           **dropout_arguments(dropout_p, seed))
    reduce(op, x, matrix, vector)
    dln_weight, dln_bias = vector.grads if vector else (None, None)
    dweight, dbias = matrix.grads if matrix else (None, None)
    return [dx, dln_weight, dln_bias if ln_bias is not None else None, dweight, dbias]


def wide_weight_gradients(g: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(dweight (F, C), dbias (F,)) of g (M, F) and h (M, C) by cuBLAS."""
    dweight = torch.mm(g.t(), h).to(weight.dtype)
    return dweight, None if bias is None else g.sum(0, dtype=torch.float32).to(bias.dtype)


def only_needed(x: Tensor, needs: list[bool], grads: list[Tensor | None]) -> list[Tensor]:
    """The gradients that are needed, empty (0,) tensors for the others."""
    return [grad if need and grad is not None else x.new_empty(0) for need, grad in zip(needs, grads, strict=True)]


def zero_gradients(x: Tensor, needs: list[bool], arguments: list[Tensor | None]) -> list[Tensor]:
    """The gradients of a call on no rows: zeros of each argument's shape."""
    return only_needed(x, needs, [None if each is None else each.new_zeros(each.shape) for each in arguments])
