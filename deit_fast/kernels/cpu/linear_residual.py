"""C++ linear_residual: bias, dropout, drop-path and the addition happen while a tile of the product is in cache.

Backward keeps nothing of its own: x is the caller's, the mask is drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, module


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None) -> str | None:
    """Why this call cannot be served, or None."""
    return launch.why_not(x, weight.shape[0], dropout_p, seed)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, ..., F), [])."""
    out = residual.new_empty(residual.shape)
    x, weight, bias, residual = launch.contiguous(x, weight, bias, residual)
    settings, _keep = launch.residual_settings(x, dropout_p, seed, row_scale)
    launch.run(_call(x, weight, bias, settings), False, residual.data_ptr(), out.data_ptr())
    return out, []


def saved_like(*_: object) -> list[Tensor]:
    """Nothing."""
    return []


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], x: Tensor, weight: Tensor, bias: Tensor | None,
             residual: None, dropout_p: float, seed: Tensor | None, row_scale: Tensor | None) -> list[Tensor]:
    """[dx, dweight, dbias]."""
    grads = launch.empty_grads(needs, x, weight, bias)
    x, weight, bias = launch.contiguous(x, weight, bias)
    settings, _keep = launch.residual_settings(x, dropout_p, seed, row_scale)
    launch.run(_call(x, weight, bias, settings), True, grad.data_ptr(), launch.pointer(grads[0]),
               *map(launch.parameter, grads[1:]))
    return launch.given(grads, grad)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple):
    F, C = weight.shape
    return module.LinearResidual(x.dtype == torch.bfloat16, x.numel() // C, C, F, x.data_ptr(), launch.parameter(weight),
                                 launch.parameter(bias), *settings, launch.threads(2 * x.numel() * F))
