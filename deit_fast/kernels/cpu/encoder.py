"""C++ encoder, for inference: all blocks in one call, each in place on the output."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, module
from .encoder_block import threads


def why_not(x: Tensor, parameters: list[Tensor | None], num_heads: int, eps: float) -> str | None:
    """Why this call cannot be served, or None."""
    features = [parameters[first + 8].shape[0] for first in range(0, len(parameters), 12)]
    return launch.why_not(x, min([1, *features]))


def forward(x: Tensor, parameters: list[Tensor | None], num_heads: int, eps: float) -> Tensor:
    """out (B, N, C) of x (B, N, C) and the blocks' parameters, twelve for each in the order of `encoder_block`."""
    x, *parameters = launch.contiguous(x, *parameters)
    B, N, C = x.shape
    features = [parameters[first + 8].shape[0] for first in range(0, len(parameters), 12)]
    if not features:
        return x.clone()
    out = x.new_empty(x.shape)
    launch.run(module.Encoder(x.dtype == torch.bfloat16, B, N, C, num_heads, eps, launch.pointer(x),
                              [launch.parameter(tensor) for tensor in parameters], features,
                              threads(x, features[0])), False, out.data_ptr())
    return out
