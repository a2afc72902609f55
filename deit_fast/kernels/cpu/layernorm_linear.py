"""C++ layernorm_linear: a tile of rows is normalised once into cache and meets all of W there.

Backward gets the rows' mean and 1 / standard deviation: 8 bytes a token beside x itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, module


def why_not(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> str | None:
    """Why this call cannot be served, or None."""
    return launch.why_not(x, weight.shape[0])


def forward(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
            save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (..., F), [mean, rstd])."""
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    saved = saved_like(x) if save else []
    tensors = launch.contiguous(x, ln_weight, ln_bias, weight, bias)
    launch.run(_call(tensors, eps, saved), False, out.data_ptr())
    return out, saved


def saved_like(x: Tensor, *_: object) -> list[Tensor]:
    """[mean, rstd], each (M,) fp32 for the M rows of x."""
    rows = x.numel() // x.shape[-1]
    return [x.new_empty(rows, dtype=torch.float32) for _ in range(2)]


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None,
             weight: Tensor, bias: Tensor | None, eps: float) -> list[Tensor]:
    """[dx, dln_weight, dln_bias, dweight, dbias]; dx is computed whatever `needs` says, as LayerNorm's own need it."""
    grads = launch.empty_grads(needs, x, ln_weight, ln_bias, weight, bias)
    tensors = launch.contiguous(x, ln_weight, ln_bias, weight, bias)
    dx = x.new_empty(x.shape) if grads[0] is None else grads[0]
    launch.run(_call(tensors, eps, saved), True, grad.data_ptr(), dx.data_ptr(), *map(launch.parameter, grads[1:]))
    return launch.given(grads, grad)


def _call(tensors: tuple[Tensor | None, ...], eps: float, saved: list[Tensor]):
    x, *parameters = tensors
    F, C = tensors[3].shape
    mean, rstd = map(launch.pointer, saved) if saved else (0, 0)
    return module.LayerNormLinear(x.dtype == torch.bfloat16, x.numel() // C, C, F, eps, x.data_ptr(), mean, rstd,
                                  *map(launch.parameter, parameters), launch.threads(2 * x.numel() * F))
