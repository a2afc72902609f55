"""Launches csrc/cpu/augment.cpp, which checks the plan's values before it follows any of them."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_fast.kernels.augment_args import pack

from . import module


def why_not(images: Tensor, labels: Tensor, plan: list[Tensor], remode: str, padding_mode: str,
            *_call: object) -> str | None:
    """Why the CPU kernel cannot serve this plan, or None."""
    if images.device.type != "cpu":
        return f"the images are on {images.device}"
    _, resized_crop, _, _, _, vflip, _, jitter, grayscale, *_ = plan
    if len(resized_crop) or jitter.shape[1] == 4 or remode == "rand" or padding_mode == "reflect":
        return "the plan resizes, turns hues, erases by color or mirrors padding"
    return "the plan flips vertically or loses color" if vflip.any() or grayscale.any() else None


def forward(images: Tensor, labels: Tensor, plan: list[Tensor], *settings: object, out: Tensor,
            targets: Tensor) -> bool:
    """Fills out (B, 3, H', W') and targets (B, K); False, with nothing written, when a value is out of range."""
    arguments, _kept = pack(images, labels, plan, *settings, out, targets)
    threads = min(torch.get_num_threads(), max(out.shape[0], 1))
    workspace = torch.empty(module.augment_workspace(out.shape[2], out.shape[3], threads), dtype=torch.uint8)
    return module.augment_fwd(*arguments, workspace.data_ptr(), threads)
