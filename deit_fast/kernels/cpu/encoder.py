"""C++ encoder, for inference: all blocks in one call, each in place on the output."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, module
from .encoder_block import threads

PACKED = 2  # the kind of a weight that `Frozen` packed, beside fp32 (0) and bf16 (1)


def why_not(x: Tensor, parameters: list[Tensor | None], num_heads: int, eps: float) -> str | None:
    """Why this call cannot be served, or None."""
    return launch.why_not(x, min([1, *_features(parameters)]))


def forward(x: Tensor, parameters: list[Tensor | None], num_heads: int, eps: float) -> Tensor:
    """out (B, N, C) of x (B, N, C) and the blocks' parameters, twelve for each in the order of `encoder_block`."""
    x, *parameters = launch.contiguous(x, *parameters)
    features = _features(parameters)
    if not features:
        return x.clone()
    encoder = module.Encoder(x.dtype == torch.bfloat16, x.shape[2], num_heads, eps,
                             [launch.parameter(tensor) for tensor in parameters], features)
    return _run(encoder, x, features[0])


class Frozen:
    """An encoder of these blocks' parameters, copied and its weights packed once, which serves calls of any B and N.

    Args: as of `forward`, but dtype, which x will have, for x itself; at least one block.
    """

    def __init__(self, dtype: torch.dtype, parameters: list[Tensor | None], num_heads: int, eps: float) -> None:
        is_bf16 = dtype == torch.bfloat16
        self.features = _features(parameters)
        self.tensors = [None if tensor is None else self._kept(tensor.detach(), is_bf16) for tensor in parameters]
        arguments = [(launch.pointer(kept), PACKED) if tensor is not None and tensor.dim() == 2 else
                     launch.parameter(kept) for tensor, kept in zip(parameters, self.tensors, strict=True)]
        self.encoder = module.Encoder(is_bf16, parameters[0].shape[0], num_heads, eps, arguments, self.features)

    def __call__(self, x: Tensor) -> Tensor:
        """out (B, N, C) of contiguous x (B, N, C)."""
        return _run(self.encoder, x, self.features[0])

    @staticmethod
    def _kept(tensor: Tensor, is_bf16: bool) -> Tensor:
        """A copy of a vector; a weight (N, K) as the kernels want it."""
        (tensor,) = launch.contiguous(tensor)
        if tensor.dim() == 1:
            return tensor.clone()
        N, K = tensor.shape
        packed = torch.empty(module.packed_bytes(is_bf16, K, N), dtype=torch.uint8)
        module.pack(is_bf16, K, N, launch.parameter(tensor), packed.data_ptr())
        return packed


def _features(parameters: list[Tensor | None]) -> list[int]:
    """The hidden features of each block: its fc1_weight's rows."""
    return [parameters[first + 8].shape[0] for first in range(0, len(parameters), 12)]


def _run(encoder, x: Tensor, features: int) -> Tensor:
    B, N, _ = x.shape
    use = threads(x, features)
    out, workspace = x.new_empty(x.shape), torch.empty(encoder.workspace(B, N, use), dtype=torch.uint8)
    encoder.forward(B, N, use, workspace.data_ptr(), x.data_ptr(), out.data_ptr())
    return out
