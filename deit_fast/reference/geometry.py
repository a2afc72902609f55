"""Where the pixels of an augmented image come from: a shifted crop, or a resized one, then mirrored; in plain torch.

A crop copies pixels. A resized crop is torchvision's `resized_crop` with antialiasing, in integers, so that backends
agree to the last bit whatever order they sum in. For n source and m output pixels along one side, M = max(n, m), the
distance of source pixel j from output pixel i is |(2 j + 1) m - (2 i + 1) n| / 2 M in units of the filter, which is
stretched where the image shrinks. Distances have 16 fractional bits, weights sum to exactly 2^14 (they are the
differences of their rounded running sums, so flat areas stay flat). Rows come first, and what bicubic weights overshoot
is clamped to 0..255 after each pass, as torchvision's uint8 kernels and Pillow do: at a sharp edge that is worth up to
30 levels. Unlike theirs the first pass keeps its 14 fractional bits; the second one rounds once, half up. Hence up to
one level of difference, two for bicubic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deit_fast.data.plan import Plan

ONE_WEIGHT = 1 << 14  # the sum of the weights of an output pixel along one side
ROWS_AT_ONCE = 64  # resized images are fp64 here: 8 bytes a pixel


def channels_first(images: Tensor) -> bool:
    """Whether images are (M, 3, H, W), not (M, H, W, 3); images of shape (M, 3, W, 3) count as (M, 3, H, W)."""
    return images.shape[1] == 3


def source_size(images: Tensor) -> tuple[int, int]:
    """(H, W) of images in either layout."""
    return (images.shape[2], images.shape[3]) if channels_first(images) else (images.shape[1], images.shape[2])


def geometry(images: Tensor, plan: Plan, H: int, W: int) -> Tensor:
    """(B, H, W, 3) uint8: cropped or resized, and mirrored. images: (M, 3, H, W) or (M, H, W, 3) uint8."""
    y, x = mirrored(plan.vflip, H), mirrored(plan.flip, W)
    cropped = crop(images, plan.index, plan.crop, y, x, plan.padding_mode)
    if len(plan.resized_crop) == 0:
        return cropped
    resized = resized_crop(images, plan.index, plan.resized_crop, plan.bicubic, y, x)
    resizes = plan.resized_crop[:, 2:].amin(1) > 0  # (B,)
    return torch.where(resizes[:, None, None, None], resized, cropped)


def mirrored(flip: Tensor, size: int) -> Tensor:
    """(B, size) int64: 0, 1, ..., size - 1, backwards where flip (B,)."""
    place = torch.arange(size, device=flip.device)
    return torch.where(flip[:, None], size - 1 - place, place)


def crop(images: Tensor, index: Tensor, corner: Tensor, y: Tensor, x: Tensor, padding_mode: str) -> Tensor:
    """(B, H, W, 3) uint8: rows corner + y and columns corner + x of images[index]; padding_mode: what is outside them.

    index: (B,); corner: (B, 2); y: (B, H); x: (B, W).
    """
    source_h, source_w = source_size(images)
    y, x = corner[:, 0, None] + y, corner[:, 1, None] + x
    rows = index[:, None, None]
    if padding_mode == "reflect":
        return _pixels(images, rows, reflect(y, source_h)[:, :, None], reflect(x, source_w)[:, None, :])
    inside = ((y >= 0) & (y < source_h))[:, :, None] & ((x >= 0) & (x < source_w))[:, None, :]
    y, x = y.clamp(0, source_h - 1)[:, :, None], x.clamp(0, source_w - 1)[:, None, :]
    return _pixels(images, rows, y, x) * inside[..., None]


def reflect(place: Tensor, size: int) -> Tensor:
    """Places along a side, mirrored at the centres of its end pixels until they lie in [0, size)."""
    period = max(2 * (size - 1), 1)
    place = place % period
    return torch.minimum(place, period - place) if size > 1 else place


def _pixels(images: Tensor, rows: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(B, H, W, 3) from indices (B, 1, 1), (B, H, 1) and (B, 1, W)."""
    return images[rows, :, y, x] if channels_first(images) else images[rows, y, x]


def resized_crop(images: Tensor, index: Tensor, box: Tensor, bicubic: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(B, H, W, 3) uint8: the box (B, 4) of images[index (B,)] resized; output rows y (B, H) and columns x (B, W)."""
    return torch.cat([_resized_rows(images, *rows) for rows in
                      zip(*(t.split(ROWS_AT_ONCE) for t in (index, box.long(), bicubic, y, x)))])


def _resized_rows(images: Tensor, index: Tensor, box: Tensor, bicubic: Tensor, y: Tensor, x: Tensor) -> Tensor:
    source = images[index] if channels_first(images) else images[index].permute(0, 3, 1, 2)  # (B, 3, h, w)
    down = weights(box[:, 0], box[:, 2], bicubic, y, source.shape[2])  # (B, H, h)
    across = weights(box[:, 1], box[:, 3], bicubic, x, source.shape[3])  # (B, W, w)
    # fp64 holds every partial sum exactly: they are integers below 2^40
    rows = (source.double() @ across.double()[:, None].transpose(2, 3)).clamp(0, 255 * ONE_WEIGHT)  # (B, 3, h, W)
    total = down.double()[:, None] @ rows  # (B, 3, H, W)
    return torch.floor(total / ONE_WEIGHT**2 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def weights(start: Tensor, side: Tensor, bicubic: Tensor, place: Tensor, source: int) -> Tensor:
    """(B, size, source) int64, rows summing to 2^14: how much every source pixel counts in the output pixels `place`.

    start, side: (B,), of the boxes along this side of the source; bicubic: (B,); place: (B, size), in [0, size).
    """
    m = place.shape[1]
    n = side.clamp(min=1)[:, None, None]  # (B, 1, 1)
    cubic = bicubic[:, None, None]
    twice = 2 * n.clamp(min=m)  # 2 M
    j = torch.arange(source, device=place.device) - start[:, None, None]  # (B, 1, source)
    distance = ((2 * j + 1) * m - (2 * place[:, :, None] + 1) * n).abs()  # (B, size, source), in 1 / 2 M
    reach = torch.where(cubic, 2 * twice, twice)
    inside = (j >= 0) & (j < n) & (distance < reach)
    u = torch.minimum(distance, reach) * ((1 << 46) // twice) >> 30  # 16 fractional bits
    value = torch.where(inside, torch.where(cubic, cubic_filter(u), (1 << 16) - u), 0)
    running = value.cumsum(2)
    total = running[:, :, -1:].clamp(min=1)  # 0: a box without area at the source's end, which nobody looks at
    running = (running * ((1 << 46) // total) + (1 << 31)) >> 32  # of a sum of 2^14
    return running.diff(dim=2, prepend=torch.zeros_like(running[:, :, :1]))


def cubic_filter(u: Tensor) -> Tensor:
    """Keys' cubic with a = -1/2 at distances u in [0, 2]; argument and value have 16 fractional bits, rounded down."""
    square = u * u
    near = ((3 * u - (5 << 16)) * square >> 1) + (1 << 48)  # 3/2 u^3 - 5/2 u^2 + 1
    far = (((5 << 16) - u) * square >> 1) - (u << 34) + (2 << 48)  # -1/2 u^3 + 5/2 u^2 - 4 u + 2
    return torch.where(u < 1 << 16, near, far) >> 32
