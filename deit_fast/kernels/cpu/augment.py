"""Launches csrc/cpu/augment.cpp, which checks the plan's values before it follows any of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from deit_fast.kernels.augment_args import pack, workspace

from . import module


def why_not(images: Tensor, *_call: object) -> str | None:
    """Why the CPU kernel cannot serve these images, or None."""
    if images.device.type != "cpu":
        return f"the images are on {images.device}"
    if not torch.compiler.is_compiling() and get_worker_info() is not None:  # Dynamo cannot trace the question
        return "this is a DataLoader's worker process, and OpenMP does not survive the fork"
    return None


def forward(images: Tensor, labels: Tensor, plan: list[Tensor], *settings: object, out: Tensor,
            targets: Tensor) -> bool:
    """Fills out (B, 3, H', W') and targets (B, K); False, with nothing written, when a value is out of range."""
    arguments, _kept = pack(images, labels, plan, *settings, out, targets)
    threads = min(torch.get_num_threads(), max(out.shape[0], 1))
    space = workspace(module, images, plan, out, threads)
    return module.augment_fwd(*arguments, space.data_ptr(), 0, threads)
