"""The row kernels around cuBLAS where `linear.fused` says no: LayerNorm, GELU, dropout, drop-path, residual.

Past C = 256 cuBLAS is expected to beat a fused kernel on Hopper (flash-attention switches its own fused MLP off there;
ours is not measured yet); what is left to win is one pass instead of five over what lies between the products. One
program takes one or more whole rows of LayerNorm, or a tile of an elementwise step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, dropout_arguments, empty, launch, power_of_two
from .reduction import Partials
from .tiles import (affine, branch, gelu, gelu_gradient, layer_norm_gradient, load, load_vector, normalise,
                    row_statistics, store)

GRADIENT_PROGRAMS = 264  # of LayerNorm's backward: two per multiprocessor of an H100


@triton.jit(do_not_specialize=["M"])
def layer_norm_fwd_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, M, eps, C: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_C: tl.constexpr):
    """out (M, C) = LN(x)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_C)
    mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
    store(out_ptr, rows, cols, affine(normalise(x_ptr, rows, cols, mean, rstd, M, C), weight_ptr, bias_ptr, cols, C), M,
          C)


@triton.jit(do_not_specialize=["M", "programs"])
def layer_norm_bwd_kernel(x_ptr, dh_ptr, residual_ptr, weight_ptr, dx_ptr, vector_ptr, M, programs, eps,
                          C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx (M, C) = LN's gradient of dh, plus the residual's; vector[pid] = sums of (dweight, dbias)."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(pid, tl.cdiv(M, BLOCK_M), programs):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mean, rstd = row_statistics(x_ptr, rows, M, eps, C, BLOCK_C)
        xhat = normalise(x_ptr, rows, cols, mean, rstd, M, C)
        dh = load(dh_ptr, rows, cols, M, C).to(tl.float32)
        dweight += tl.sum(dh * xhat, 0)
        dbias += tl.sum(dh, 0)
        dx = layer_norm_gradient(dh, xhat, rstd, weight_ptr, cols, C)
        if residual_ptr is not None:
            dx += load(residual_ptr, rows, cols, M, C).to(tl.float32)
        store(dx_ptr, rows, cols, dx, M, C)
    tl.store(vector_ptr + pid * 2 * C + cols, dweight, mask=cols < C)
    tl.store(vector_ptr + pid * 2 * C + C + cols, dbias, mask=cols < C)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def branch_kernel(y_ptr, bias_ptr, residual_ptr, out_ptr, seed_ptr, row_scale_ptr, M, rows_per_sample,
                  WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, SITE: tl.constexpr,
                  THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """out (M, WIDTH) = residual + row_scale dropout(y + bias); without bias and residual, its own gradient."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid % blocks * BLOCK
    cols = first + tl.arange(0, BLOCK)
    y = load(y_ptr, rows, cols, M, WIDTH).to(tl.float32) + load_vector(bias_ptr, cols, WIDTH)[None, :]
    y = branch(y, seed_ptr, row_scale_ptr, rows, rows_per_sample, first, M, WIDTH, BLOCK, SITE, THRESHOLD, KEEP_SCALE)
    if residual_ptr is not None:
        y += load(residual_ptr, rows, cols, M, WIDTH).to(tl.float32)
    store(out_ptr, rows, cols, y, M, WIDTH)


@triton.jit(do_not_specialize=["M"])
def gelu_fwd_kernel(z_ptr, a_ptr, seed_ptr, M, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
                    SITE: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """a (M, WIDTH) = dropout(gelu(z))."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid % blocks * BLOCK
    cols = first + tl.arange(0, BLOCK)
    a = gelu(load(z_ptr, rows, cols, M, WIDTH).to(tl.float32))
    store(a_ptr, rows, cols, branch(a, seed_ptr, None, rows, 1, first, M, WIDTH, BLOCK, SITE, THRESHOLD, KEEP_SCALE), M,
          WIDTH)


@triton.jit(do_not_specialize=["M"])
def gelu_bwd_kernel(z_ptr, da_ptr, a_ptr, seed_ptr, M, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
                    SITE: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """a (M, WIDTH) = dropout(gelu(z)) again, and da becomes dz in place: one pass and one mask for both."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    rows = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = pid % blocks * BLOCK
    cols = first + tl.arange(0, BLOCK)
    z = load(z_ptr, rows, cols, M, WIDTH).to(tl.float32)
    kept = branch(tl.full((BLOCK_M, BLOCK), 1.0, tl.float32), seed_ptr, None, rows, 1, first, M, WIDTH, BLOCK, SITE,
                  THRESHOLD, KEEP_SCALE)
    store(a_ptr, rows, cols, gelu(z) * kept, M, WIDTH)
    dz = load(da_ptr, rows, cols, M, WIDTH).to(tl.float32) * kept * gelu_gradient(z)
    store(da_ptr, rows, cols, dz, M, WIDTH)


def _row_tiles(C: int) -> dict[str, int]:
    BLOCK_C = power_of_two(C)
    return {"C": C, "BLOCK_M": max(1, 2048 // BLOCK_C), "BLOCK_C": BLOCK_C, "num_warps": 4 if BLOCK_C <= 2048 else 8}


def layer_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LN(x) (M, C) in the dtype of x (M, C)."""
    out, tiles = x.new_empty(x.shape), _row_tiles(x.shape[1])
    launch(op, layer_norm_fwd_kernel, cdiv(x.shape[0], tiles["BLOCK_M"]), x, x_ptr=x, weight_ptr=weight, bias_ptr=bias,
           out_ptr=out, M=x.shape[0], eps=eps, **tiles)
    return out


def layer_norm_backward(op: str, dh: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                        eps: float) -> tuple[Tensor, Partials]:
    """(dx (M, C), partial sums of dweight and dbias) of dh (M, C); the residual's gradient (M, C) is added to dx."""
    M, tiles = x.shape[0], _row_tiles(x.shape[1])
    programs = min(cdiv(M, tiles["BLOCK_M"]), GRADIENT_PROGRAMS)
    dx = x.new_empty(x.shape)
    vector = Partials.empty(x, programs, (empty(weight), empty(weight if bias is None else bias)))
    launch(op, layer_norm_bwd_kernel, programs, x, x_ptr=x, dh_ptr=dh, residual_ptr=residual, weight_ptr=weight,
           dx_ptr=dx, vector_ptr=vector.workspace, M=M, programs=programs, eps=eps, **tiles)
    return dx, vector


def _elementwise_tiles(y: Tensor) -> tuple[int, dict[str, int]]:
    """(programs, tile) of an elementwise kernel over y (M, WIDTH)."""
    M, WIDTH = y.shape
    BLOCK = min(256, power_of_two(WIDTH))
    BLOCK_M = 2048 // BLOCK
    return cdiv(M, BLOCK_M) * cdiv(WIDTH, BLOCK), {"M": M, "WIDTH": WIDTH, "BLOCK_M": BLOCK_M, "BLOCK": BLOCK,
                                                   "num_warps": 4}


def add_branch(op: str, y: Tensor, bias: Tensor | None, residual: Tensor | None, site: int, dropout_p: float,
               seed: Tensor | None, row_scale: Tensor | None, rows_per_sample: int) -> Tensor:
    """residual + row_scale dropout(y + bias) for y (M, F); without bias and residual, the gradient of that by y."""
    out = y.new_empty(y.shape)
    programs, tiles = _elementwise_tiles(y)
    launch(op, branch_kernel, programs, y, y_ptr=y, bias_ptr=bias, residual_ptr=residual, out_ptr=out,
           row_scale_ptr=row_scale, rows_per_sample=rows_per_sample, SITE=site, **tiles,
           **dropout_arguments(dropout_p, seed))
    return out


def gelu_dropout(op: str, z: Tensor, site: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dropout(gelu(z)) (M, F)."""
    a = z.new_empty(z.shape)
    programs, tiles = _elementwise_tiles(z)
    launch(op, gelu_fwd_kernel, programs, z, z_ptr=z, a_ptr=a, SITE=site, **tiles, **dropout_arguments(dropout_p, seed))
    return a


def gelu_dropout_backward(op: str, z: Tensor, da: Tensor, site: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dropout(gelu(z)) (M, F) once more; da (M, F) becomes dz in place."""
    a = z.new_empty(z.shape)
    programs, tiles = _elementwise_tiles(z)
    launch(op, gelu_bwd_kernel, programs, z, z_ptr=z, da_ptr=da, a_ptr=a, SITE=site, **tiles,
           **dropout_arguments(dropout_p, seed))
    return a
