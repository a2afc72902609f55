"""What the CPU and the CUDA launcher of `augment` share: a call's tensors and settings as the extension's arguments."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from deit_fast.reference.augment import normalisation
from deit_fast.reference.geometry import channels_first, source_size

REMODES = {"const": 0, "pixel": 1, "rand": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pack(images: Tensor, labels: Tensor, plan: list[Tensor], remode: str, padding_mode: str, mean: list[float],
         std: list[float], num_classes: int, height: int, width: int, smoothing: float, dtype: torch.dtype,
         channels_last: bool, out: Tensor, targets: Tensor) -> tuple[tuple, list[Tensor]]:
    """(arguments of augment_fwd up to the workspace, tensors that must outlive the call).

    images: (M, 3, H, W) or (M, H, W, 3) uint8, any strides; labels: (M,); plan: its tensors in Plan's order; out:
    (B, 3, H', W'); targets: (B, K).
    """
    kept = [labels.contiguous(), *(tensor.contiguous() for tensor in plan)]
    m, *rest = images.stride()
    c, y, x = rest if channels_first(images) else (rest[2], rest[0], rest[1])
    scale, bias = normalisation(mean, std)
    off = smoothing / num_classes
    index, _, _, _, _, _, _, jitter, _, erase, *_ = plan
    sizes = (images.shape[0], index.shape[0], jitter.shape[1], erase.shape[1], num_classes)
    pointers = [tensor.data_ptr() for tensor in (*kept, out, targets)]  # null for a plan that resizes nothing
    extent = (*source_size(images), height, width)
    return (images.data_ptr(), (m, c, y, x), *pointers, sizes, extent, REMODES[remode], padding_mode == "reflect",
            channels_last, DTYPES[dtype], scale, bias, 1 - smoothing + off, off), kept


def workspace(module: ModuleType, images: Tensor, plan: list[Tensor], out: Tensor, count: int) -> Tensor:
    """Uninitialised uint8 for a call of the extension `module`; count: as its augment_workspace wants it."""
    source = source_size(images) if len(plan[1]) else (0, 0)  # of resized_crop
    return images.new_empty(module.augment_workspace(*source, *out.shape[2:], count))
