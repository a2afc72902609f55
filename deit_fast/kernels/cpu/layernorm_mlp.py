"""C++ layernorm_mlp: a tile of rows goes through LayerNorm, W1, GELU, dropout, W2 and the residual without leaving the cache.

Backward gets the rows' mean and 1 / standard deviation, 8 bytes a token beside x itself, and computes the hidden activations
again: one product of six, against 4 F bytes a token written in forward and read in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, module
from .layernorm_linear import saved_like

__all__ = ["backward", "forward", "saved_like", "why_not"]


def why_not(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor | None,
            fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None) -> str | None:
    """Why this call cannot be served, or None."""
    return launch.why_not(x, fc1_weight.shape[0], dropout_p, seed)


def forward(x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None, fc1_weight: Tensor, fc1_bias: Tensor | None,
            fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None,
            row_scale: Tensor | None, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out (B, ..., C), [mean, rstd])."""
    out = x.new_empty(x.shape)
    saved = saved_like(x) if save else []
    tensors = launch.contiguous(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    settings, _keep = launch.residual_settings(x, dropout_p, seed, row_scale)
    launch.run(_call(tensors, eps, saved, settings), False, out.data_ptr())
    return out, saved


def backward(grad: Tensor, saved: list[Tensor], needs: list[bool], x: Tensor, ln_weight: Tensor, ln_bias: Tensor | None,
             fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, eps: float,
             dropout_p: float, seed: Tensor | None, row_scale: Tensor | None) -> list[Tensor]:
    """[dx, dln_weight, dln_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias]; dx is computed whatever `needs` says."""
    arguments = (x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    grads = launch.empty_grads(needs, *arguments)
    dx = x.new_empty(x.shape) if grads[0] is None else grads[0]
    tensors = launch.contiguous(*arguments)
    settings, _keep = launch.residual_settings(x, dropout_p, seed, row_scale)
    launch.run(_call(tensors, eps, saved, settings), True, grad.data_ptr(), dx.data_ptr(),
               *map(launch.parameter, grads[1:]))
    return launch.given(grads, grad)


def _call(tensors: tuple[Tensor | None, ...], eps: float, saved: list[Tensor], settings: tuple):
    x, *parameters = tensors
    F, C = tensors[3].shape
    mean, rstd = map(launch.pointer, saved) if saved else (0, 0)
    return module.LayerNormMlp(x.dtype == torch.bfloat16, x.numel() // C, C, F, eps, x.data_ptr(), mean, rstd,
                               *map(launch.parameter, parameters), *settings, launch.threads(4 * x.numel() * F))
