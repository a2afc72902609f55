"""Launches csrc/cuda/augment.cu on the current stream; it clamps the plan's values instead of checking them."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_fast.kernels.augment_args import pack, workspace

from . import FAILED, loading, module

OP = "augment"


def why_not(images: Tensor, *_call: object) -> str | None:
    """Why the CUDA kernel cannot serve these images, or None."""
    return FAILED.get(images.device) if images.device.type == "cuda" else f"the images are on {images.device}"


def forward(images: Tensor, labels: Tensor, plan: list[Tensor], *settings: object, out: Tensor,
            targets: Tensor) -> bool:
    """Fills out (B, 3, H', W') and targets (B, K); always True."""
    if out.shape[0]:  # a grid of no blocks is an error
        arguments, _kept = pack(images, labels, plan, *settings, out, targets)
        space = workspace(module, images, plan, out, out.shape[0])
        # The extension sets the device too; leaving here restores torch's.
        with torch.cuda.device(images.device), loading(OP, images.device):
            stream = torch.cuda.current_stream().cuda_stream
            module.augment_fwd(*arguments, space.data_ptr(), stream, images.device.index)
    return True
