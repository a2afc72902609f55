"""Augmentation of a batch from a plan: the arithmetic that every backend shares, in plain torch.

Integers until the image is normalised, so that backends agree to the last bit. Crops, resizing and flips are
geometry.py's. A color operation is one blend clamp((x F + base) >> 16) of uint8 x with a 16.16 factor F, truncated to
uint8 like torchvision's. base is 0 for brightness; g (1 - F) for saturation with the pixel's gray g; the same with the
mean of all g for contrast. Gray is floor(0.2989 r + 0.587 g + 0.114 b), exactly, of the image as it is then. Hue turns
the color wheel, exactly, and rounds to the nearest level, where torchvision's fp32 truncates 255.999 times a value.

Floating point after that, in fp32 with these roundings and no others: normalising is one fma, c * scale + bias with
scale = 1 / (255 std) and bias = -mean / std rounded to fp32; mixing is fma(own, lam, p) with p = fl(partner *
fl(1 - lam)); the cast to the output's dtype comes last. An fma is written as fp64 rounded to fp32 here. Erasing comes
between the two (DeiT's order), with N(0, 1) noise by Box-Muller from Philox words of counter (y W + x, 0, 0, 0): words
0 and 1 make red and green, 2 and 3 make blue. remode "rand" fills a box with one color, that of the pixel whose number
is the box's; of boxes that overlap the last one counts. Native kernels evaluate the logarithm, sine and cosine in fp32:
noise is equal within a few roundings, the rest exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .geometry import geometry, source_size
from .philox import philox4x32, split

if TYPE_CHECKING:
    from deit_fast.data.plan import Plan

# torchvision's gray weights 0.2989, 0.587, 0.114, rounded up to 1/2^22: that adds less than 1/10000, so the floor of
# the sum is exact
GRAY = (1253678, 2462057, 478151)
ONE = 1 << 16  # 1.0 in 16.16
SECTORS = (5, 3, 1)  # sixths of the color wheel from where red, green and blue are 0 to its start


def augment(images: Tensor, labels: Tensor, plan: Plan, mean: Sequence[float], std: Sequence[float], num_classes: int,
            size: int | tuple[int, int] | None = None, smoothing: float = 0.0, dtype: torch.dtype = torch.float32,
            channels_last: bool = False) -> tuple[Tensor, Tensor]:
    """The augmented, normalised batch (B, 3, H', W') and its targets (B, K) fp32.

    images: (M, 3, H, W) or (M, H, W, 3) uint8; labels: (M,) int64; plan: B rows; size: (H', W'), default (H, W).
    """
    H, W = output_size(images, size)
    x = geometry(images, plan, H, W)  # (B, H', W', 3)
    x = grayscale(jitter(x, plan.jitter_order, plan.jitter), plan.grayscale)
    scale, bias = (constants(values, x.device) for values in normalisation(mean, std))
    x = fma(x, scale, bias)
    x = erase(x, plan.erase, plan.noise_key, plan.remode)
    x = mix(x, plan.partner, plan.lam, plan.cut).to(dtype).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x, mixed_targets(labels[plan.index], plan.partner, plan.lam, num_classes, smoothing)


def output_size(images: Tensor, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(H', W'): `size`, a square of side `size`, or the images' own."""
    if size is None:
        return source_size(images)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """(scale, bias) per channel with uint8 * scale + bias = (uint8 / 255 - mean) / std; to be rounded to fp32."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """(len(values),) fp32, made on the device: a CUDA graph cannot capture a copy from the host's memory."""
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def gray_of(x: Tensor) -> Tensor:
    """(..., 1) int32: floor(0.2989 r + 0.587 g + 0.114 b) of x (..., 3)."""
    x = x.int()
    return (x[..., 0:1] * GRAY[0] + x[..., 1:2] * GRAY[1] + x[..., 2:3] * GRAY[2]) >> 22


def jitter(x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 after brightness (0), contrast (1), saturation (2) and, where J = 4, hue (3) in rows' `order`.

    x: (B, H, W, 3) uint8; order: (B, J) uint8; factors: (B, J) int32, 16.16, by kind.
    """
    area = x.shape[1] * x.shape[2]
    x = x.int()
    for kind in order.long().unbind(1):  # (B,)
        factor = factors.gather(1, kind[:, None])[:, :, None, None]  # (B, 1, 1, 1)
        kind = kind[:, None, None, None]
        gray = gray_of(x)  # (B, H, W, 1)
        mean = (gray.sum((1, 2, 3), keepdim=True, dtype=torch.int64) << 16) // area  # (B, 1, 1, 1), 16.16
        contrast = (mean * (ONE - factor) >> 16).int()
        base = torch.where(kind == 2, gray * (ONE - factor), torch.where(kind == 1, contrast, 0))
        blended = ((x * factor + base) >> 16).clamp(0, 255)
        x = blended if order.shape[1] == 3 else torch.where(kind == 3, turn_hue(x, factor), blended)
    return x.to(torch.uint8)


def turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """x (B, H, W, 3) int32 with its hue moved by `shift` (B, 1, 1, 1), 16.16, in [-1/2, 1/2] turns of the color wheel.

    In HSV a channel is V - V S max(0, min(k, 4 - k, 1)) with k = its sector + hue, in sixths, modulo 6. V S is C =
    max - min, and hue C is a difference of channels plus a multiple of C: in units of C nothing has to be divided.
    """
    red, green, blue = x.unbind(-1)  # (B, H, W)
    top = x.amax(-1)
    chroma = top - x.amin(-1)
    hue = torch.where(green == top, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = torch.where(red == top, green - blue, hue)
    one = chroma << 16  # a sixth, times C
    hue = (hue << 16) + chroma * (6 * shift[..., 0])  # in [-4, 8] sixths
    hue = hue + torch.where(hue < 0, 6 * one, 0) - torch.where(hue >= 6 * one, 6 * one, 0)
    channels = []
    for sector in SECTORS:
        k = hue + sector * one
        k = k - torch.where(k >= 6 * one, 6 * one, 0)
        below_top = torch.minimum(torch.minimum(k, 4 * one - k), one).clamp(min=0)
        channels.append(((top << 16) - below_top + (1 << 15)) >> 16)
    return torch.stack(channels, dim=-1)


def grayscale(x: Tensor, chosen: Tensor) -> Tensor:
    """x (B, H, W, 3) uint8 with the rows of `chosen` (B,) gray."""
    return torch.where(chosen[:, None, None, None], gray_of(x).to(torch.uint8), x)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded once to fp32 (the product of two fp32 is exact in fp64)."""
    return (a.double() * b.double() + c.double()).float()


def noise(noise_key: Tensor, H: int, W: int) -> Tensor:
    """(B, H, W, 3) fp32, N(0, 1): a function of the key (B,) int64 and the pixel alone."""
    pixel = torch.arange(H * W, device=noise_key.device)
    words = philox4x32((pixel, 0, 0, 0), tuple(word[:, None] for word in split(noise_key)))  # 4 x (B, H W)
    u = [(word >> 8).double() * 2.0**-24 for word in words]  # 24 bits: exact in the kernels' fp32
    radius = [torch.sqrt(-2 * torch.log(v + 2.0**-24)) for v in (u[0], u[2])]  # of (0, 1]
    z = torch.stack([radius[0] * torch.cos(2 * math.pi * u[1]), radius[0] * torch.sin(2 * math.pi * u[1]),
                     radius[1] * torch.cos(2 * math.pi * u[3])], dim=-1)
    return z.float().view(len(noise_key), H, W, 3)


def inside_box(box: Tensor, H: int, W: int) -> Tensor:
    """(..., H, W) bool: the pixels of each box (..., 4) of (y, x, h, w)."""
    y, x, h, w = (side[..., None] for side in box.unbind(-1))
    rows, columns = torch.arange(H, device=box.device), torch.arange(W, device=box.device)
    return ((rows >= y) & (rows < y + h))[..., :, None] & ((columns >= x) & (columns < x + w))[..., None, :]


def erase(x: Tensor, boxes: Tensor, noise_key: Tensor, remode: str) -> Tensor:
    """x (B, H, W, 3) fp32, its boxes (B, R, 4) filled by noise ("pixel"), a color each ("rand") or 0 ("const")."""
    H, W = x.shape[1:3]
    if remode == "rand":
        colors = noise(noise_key, 1, boxes.shape[1])  # (B, 1, R, 3)
        for box, color in zip(boxes.unbind(1), colors.unbind(2)):  # (B, 4), (B, 1, 3)
            x = torch.where(inside_box(box, H, W)[..., None], color[:, None], x)
        return x
    filling = noise(noise_key, H, W) if remode == "pixel" else 0.0
    return torch.where(inside_box(boxes, H, W).any(1)[..., None], filling, x)


def mix(x: Tensor, partner: Tensor, lam: Tensor, cut: Tensor) -> Tensor:
    """MixUp by lam (B,), or CutMix where the cut (B, 4) has an area, of x (B, H, W, 3) with x[partner]."""
    H, W = x.shape[1:3]
    other = x[partner]
    weight = lam[:, None, None, None]
    mixed = fma(x, weight, other * (1 - weight))
    cuts = (cut[:, 2] * cut[:, 3] > 0)[:, None, None, None]
    return torch.where(cuts, torch.where(inside_box(cut, H, W)[..., None], other, x), mixed)


def mixed_targets(labels: Tensor, partner: Tensor, lam: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(B, K) fp32: one-hots smoothed to 1 - eps + eps / K and eps / K, mixed with the partner's; labels: (B,)."""
    off = smoothing / num_classes
    hot = labels[:, None] == torch.arange(num_classes, device=labels.device)
    return mix_targets(torch.where(hot, 1 - smoothing + off, off).float(), partner, lam)


def mix_targets(own: Tensor, partner: Tensor, lam: Tensor) -> Tensor:
    """Targets own (B, K) fp32 mixed with those of the partners; partner, lam: (B,)."""
    return fma(own, lam[:, None], own[partner] * (1 - lam[:, None]))
