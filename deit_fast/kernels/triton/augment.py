"""Launches the augmentation kernels: one where a program holds an image, a pass for contrast's means before it where
none does, and one for the weights of resized crops where the plan has any. No value is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deit_fast.kernels.augment_args import pixel_strides
from deit_fast.reference.augment import normalisation
from deit_fast.reference.geometry import source_size

from .augment_geometry import augment_weights_kernel
from .augment_kernels import augment_fwd_kernel, augment_gray_kernel
from .common import cdiv, launch, power_of_two, refusal

OP = "augment"
WHOLE = 2048  # pixels of the largest image that one program holds, so that two programs fit a multiprocessor
TILE = 1024  # pixels of a program's tile of a larger image
MOST_SPLITS = 16  # programs that share an image's sum of grays
PLACES = 128  # output rows or columns of a program that computes weights
PIXELS_PER_THREAD = 4


class Tiles(NamedTuple):
    """A program's pixels and warps, and the number of partial sums of an image's grays (0: one program holds it)."""

    BLOCK: int
    SPLITS: int
    num_warps: int


def tiles(height: int, width: int) -> Tiles:
    """How an output image of that size is cut."""
    area = height * width
    whole = area <= WHOLE
    block = power_of_two(area, 32) if whole else TILE
    splits = 0 if whole else min(MOST_SPLITS, power_of_two(cdiv(area, TILE), 1))
    return Tiles(block, splits, max(1, block // (32 * PIXELS_PER_THREAD)))


def taps(source: tuple[int, int], height: int, width: int) -> int:
    """The most source pixels along a side that an output pixel can see: bicubic, the whole source resized."""
    return max(cdiv(4 * max(n, m), m) for n, m in zip(source, (height, width)))


def why_not(images: Tensor, labels: Tensor, plan: list[Tensor], remode: str, padding_mode: str, mean: list[float],
            std: list[float], num_classes: int, height: int, width: int, smoothing: float, dtype: torch.dtype,
            channels_last: bool) -> str | None:
    """Why this call cannot be served, or None."""
    return refusal(OP, images, dtype=dtype)


def forward(images: Tensor, labels: Tensor, plan: list[Tensor], remode: str, padding_mode: str, mean: list[float],
            std: list[float], num_classes: int, height: int, width: int, smoothing: float, dtype: torch.dtype,
            channels_last: bool, out: Tensor, targets: Tensor) -> bool:
    """Fills out (B, 3, H', W') and targets (B, K); always True: values are clamped, not checked.

    images: (M, 3, H, W) or (M, H, W, 3) uint8, any strides; labels: (M,); plan: its tensors in Plan's order.
    """
    plan = [tensor.contiguous() for tensor in plan]
    index, box, bicubic, crop, flip, vflip, order, jitter, grayscale, erase, key, partner, lam, cut = (
        tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in plan)
    (B, R), J = erase.shape[:2], jitter.shape[1]
    BLOCK, SPLITS, num_warps = tiles(height, width)
    stride_m, stride_c, stride_y, stride_x = pixel_strides(images)
    source_h, source_w = source_size(images)
    last = 2 * stride_c + (source_h - 1) * stride_y + (source_w - 1) * stride_x  # of an image, from its first pixel
    common = dict(num_warps=num_warps, enable_fp_fusion=False)  # augment_color.py writes the fused operations itself
    TAPS, first, weights = 0, None, None
    if len(box):
        TAPS = taps((source_h, source_w), height, width)
        first = box.new_empty((B, height + width))
        weights = box.new_empty((B, TAPS, height + width))
        programs = B * (cdiv(height, PLACES) + cdiv(width, PLACES))
        launch(OP, augment_weights_kernel, programs, images, box_ptr=box, bicubic_ptr=bicubic, first_ptr=first,
               weights_ptr=weights, source_h=source_h, source_w=source_w, H=height, W=width, TAPS=TAPS, BLOCK=PLACES,
               num_warps=PLACES // 32)
    sums = index.new_empty((B, SPLITS)) if SPLITS else None
    shared = dict(images_ptr=images, index_ptr=index, box_ptr=box if TAPS else None,
                  bicubic_ptr=bicubic if TAPS else None, first_ptr=first, weights_ptr=weights, crop_ptr=crop,
                  flip_ptr=flip, vflip_ptr=vflip, order_ptr=order, jitter_ptr=jitter, sums_ptr=sums, M=images.shape[0],
                  stride_m=stride_m, stride_c=stride_c, stride_y=stride_y, stride_x=stride_x, source_h=source_h,
                  source_w=source_w, H=height, W=width, J=J, BLOCK=BLOCK, SPLITS=SPLITS, TAPS=TAPS,
                  REFLECT=padding_mode == "reflect", WIDE=max(last, 3 * height * width) >= 2**31, **common)
    if SPLITS:
        launch(OP, augment_gray_kernel, B * SPLITS, images, **shared)
    (scale_r, scale_g, scale_b), (bias_r, bias_g, bias_b) = normalisation(mean, std)
    off = smoothing / num_classes
    launch(OP, augment_fwd_kernel, B * cdiv(height * width, BLOCK), images, labels_ptr=labels.contiguous(),
           grayscale_ptr=grayscale, erase_ptr=erase, key_ptr=key, partner_ptr=partner, lam_ptr=lam, cut_ptr=cut,
           out_ptr=out, targets_ptr=targets, B=B, scale_r=scale_r, scale_g=scale_g, scale_b=scale_b, bias_r=bias_r,
           bias_g=bias_g, bias_b=bias_b, on=1 - smoothing + off, off=off, R=R, K=num_classes,
           BLOCK_K=min(power_of_two(num_classes, 1), 1024), REMODE=remode, CHANNELS_LAST=channels_last, **shared)
    return True
