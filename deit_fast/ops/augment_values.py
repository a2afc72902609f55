"""The ranges of a plan's values, in plain torch: what makes the message when a value is refused.

The CPU kernel has its own, faster test of the same ranges; it says only that something is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deit_fast.reference.geometry import source_size

MAX_FACTOR, MAX_SHIFT = 64 << 16, 1 << 15  # of the color factors and the hue's shift, as in csrc/augment.h


def check_values(images: Tensor, labels: Tensor, plan: list[Tensor], num_classes: int, height: int, width: int) -> None:
    """Raises ValueError for the first value out of its range; reads values, so it synchronises with a GPU.

    images: (M, 3, H, W) or (M, H, W, 3); labels: (M,); plan: its tensors in Plan's order.
    """
    index, resized_crop, _, crop, _, _, jitter_order, jitter, _, erase, _, partner, lam, cut = plan
    B, (source_h, source_w) = index.shape[0], source_size(images)
    _check_range("plan.index", index, 0, images.shape[0] - 1)
    _check_range("labels", labels[index], 0, num_classes - 1, "label of row")
    _check_boxes("plan.resized_crop", resized_crop, source_h, source_w)
    _check_range("plan.crop (y)", crop[:, 0], -height, source_h)
    _check_range("plan.crop (x)", crop[:, 1], -width, source_w)
    kinds = torch.arange(jitter_order.shape[1], device=images.device)
    bad = (jitter_order.sort(1).values != kinds).any(1)
    _check("plan.jitter_order", bad, jitter_order, f"a permutation of {', '.join(map(str, kinds.tolist()))}")
    _check_range("plan.jitter", jitter[:, :3], 0, MAX_FACTOR)
    _check_range("plan.jitter (hue)", jitter[:, 3:], -MAX_SHIFT, MAX_SHIFT)
    _check_boxes("plan.erase", erase, height, width)
    _check_range("plan.partner", partner, 0, B - 1)
    _check("plan.lam", ~((lam >= 0) & (lam <= 1)), lam, "in [0, 1]")
    _check_boxes("plan.cut", cut, height, width)


def _check(name: str, bad: Tensor, values: Tensor, what: str, where: str = "row") -> None:
    """bad: (B,) bool; values: (B, ...)."""
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(f"augment: {name} must be {what}, got {values[row].tolist()} in {where} {row}.")


def _check_range(name: str, values: Tensor, low: int, high: int, where: str = "row") -> None:
    bad = ((values < low) | (values > high)).flatten(1).any(1) if values.dim() > 1 else (values < low) | (values > high)
    _check(name, bad, values, f"in [{low}, {high}]", where)


def _check_boxes(name: str, boxes: Tensor, height: int, width: int) -> None:
    """boxes: (B, ..., 4) of (y, x, h, w), or (0, 4)."""
    sides = boxes.long()
    y, x, h, w = sides.unbind(-1)
    bad = (sides < 0).any(-1) | (y + h > height) | (x + w > width)
    _check(name, bad.flatten(1).any(1) if bad.dim() > 1 else bad, boxes, f"boxes (y, x, h, w) inside {height}x{width}")
