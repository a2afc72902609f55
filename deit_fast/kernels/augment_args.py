"""What the launchers of `augment` share: a call's tensors and settings as an extension's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from deit_fast.reference.augment import normalisation
from deit_fast.reference.geometry import channels_first, source_size

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pixel_strides(images: Tensor) -> tuple[int, int, int, int]:
    """The strides of image, channel, y and x, of images in either layout."""
    m, *rest = images.stride()
    c, y, x = rest if channels_first(images) else (rest[2], rest[0], rest[1])
    return m, c, y, x


def pack(images: Tensor, labels: Tensor, plan: list[Tensor], remode: str, padding_mode: str, mean: list[float],
         std: list[float], num_classes: int, height: int, width: int, smoothing: float, dtype: torch.dtype,
         channels_last: bool, out: Tensor, targets: Tensor) -> tuple[tuple, list[Tensor]]:
    """(arguments of augment_fwd, tensors that must outlive the call).

    images: (M, 3, H, W) or (M, H, W, 3) uint8, any strides; labels: (M,); plan: the ten tensors in Plan's order; out:
    (B, 3, H', W'); targets: (B, K).
    """
    index, _, _, crop, flip, _, jitter_order, jitter, _, *rest_of_plan = plan
    plan = [index, crop, flip, jitter_order, jitter, *rest_of_plan]
    kept = [labels.contiguous(), *(tensor.contiguous() for tensor in plan)]
    scale, bias = normalisation(mean, std)
    off = smoothing / num_classes
    sizes = (images.shape[0], plan[0].shape[0], plan[5].shape[1], num_classes)
    pointers = [tensor.data_ptr() for tensor in (*kept, out, targets)]
    extent = (*source_size(images), height, width)
    return (images.data_ptr(), pixel_strides(images), *pointers, sizes, extent, remode == "pixel", channels_last,
            DTYPES[dtype], scale, bias, 1 - smoothing + off, off), kept
