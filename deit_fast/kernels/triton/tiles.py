"""The pieces that the row kernels are made of: tiles of rows in and out, LayerNorm and its gradient, GELU, dropout.

A tile is (BM rows, BLOCK columns); rows are int64 (a batch of 224-pixel images passes 2^31 elements early), columns
beyond the width read zero. Statistics and everything between two products are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import keep_tile


@triton.jit
def load(ptr, rows, cols, M, WIDTH: tl.constexpr):
    """A tile (BM, BLOCK) of a row-major (M, WIDTH) tensor, zero outside it."""
    return tl.load(ptr + rows[:, None] * WIDTH + cols[None, :], mask=(rows < M)[:, None] & (cols < WIDTH)[None, :],
                   other=0.0)


@triton.jit
def store(ptr, rows, cols, value, M, WIDTH: tl.constexpr):
    """Writes a tile (BM, BLOCK), rounded to the tensor's dtype."""
    tl.store(ptr + rows[:, None] * WIDTH + cols[None, :], value.to(ptr.dtype.element_ty),
             mask=(rows < M)[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def load_vector(ptr, cols, WIDTH: tl.constexpr):
    """A parameter vector (BLOCK,) in fp32, zero beyond WIDTH; zeros where there is none."""
    if ptr is None:  # one return: Triton also compiles what follows a return inside an `if`
        vector = tl.zeros(cols.shape, tl.float32)
    else:
        vector = tl.load(ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    return vector


@triton.jit
def row_statistics(x_ptr, rows, M, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(mean, 1 / standard deviation) (BM,) of rows of x (M, C)."""
    cols = tl.arange(0, BLOCK_C)
    return statistics(load(x_ptr, rows, cols, M, C).to(tl.float32), cols, eps, C)


@triton.jit
def statistics(x, cols, eps, C: tl.constexpr):
    """The same of whole rows x (BM, BLOCK_C) in registers, fp32, zero beyond C: two passes, exact for a large mean."""
    mean = tl.sum(x, 1) / C
    centred = tl.where((cols < C)[None, :], x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / C + eps)


@triton.jit
def normalise(x_ptr, rows, cols, mean, rstd, M, C: tl.constexpr):
    """(x - mean) / std of a tile (BM, BLOCK) in fp32, zero outside (M, C)."""
    x = load(x_ptr, rows, cols, M, C).to(tl.float32)
    inside = (rows < M)[:, None] & (cols < C)[None, :]
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def affine(xhat, weight_ptr, bias_ptr, cols, C: tl.constexpr):
    """LayerNorm's affine of a normalised tile (BM, BLOCK)."""
    return xhat * load_vector(weight_ptr, cols, C)[None, :] + load_vector(bias_ptr, cols, C)[None, :]


@triton.jit
def layer_norm(x, weight_ptr, bias_ptr, cols, eps, C: tl.constexpr):
    """LN(x) of whole rows x (BM, BLOCK_C) in registers, fp32, zero beyond C."""
    mean, rstd = statistics(x, cols, eps, C)
    xhat = tl.where((cols < C)[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
    return affine(xhat, weight_ptr, bias_ptr, cols, C)


@triton.jit
def layer_norm_gradient(dh, xhat, rstd, weight_ptr, cols, C: tl.constexpr):
    """dx (BM, BLOCK_C) of LayerNorm from dh, the gradient of its output."""
    dxhat = dh * load_vector(weight_ptr, cols, C)[None, :]
    mean = tl.sum(dxhat, 1) / C
    projection = tl.sum(dxhat * xhat, 1) / C
    return rstd[:, None] * (dxhat - mean[:, None] - xhat * projection[:, None])


@triton.jit
def branch(y, seed_ptr, row_scale_ptr, rows, rows_per_sample, first, M, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
           SITE: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr):
    """row_scale * dropout(y) for a tile (BM, BLOCK) of columns from `first`; its own gradient, too."""
    if THRESHOLD > 0:
        y = tl.where(keep_tile(seed_ptr, rows, first, WIDTH, BLOCK, SITE, THRESHOLD), y * KEEP_SCALE, 0.0)
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + rows // rows_per_sample, mask=rows < M, other=0.0)
        y *= scale.to(tl.float32)[:, None]
    return y


@triton.jit
def gelu(z):
    """z Phi(z), exact."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_gradient(z):
    """Phi(z) + z phi(z)."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
