"""The pixel arithmetic of augmentation inside Triton kernels: that of csrc/augment.h, operation by operation.

Integers up to normalisation. After it every fused multiply-add is a `tl.fma`, and the launcher switches contraction off
(`enable_fp_fusion=False`), so that a compiler has no rounding left to choose: on a GPU the results are those of the C++
kernels. Three channels are three tensors of a tile's pixels, since a tile has powers of two as sides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.reference.augment import GRAY, SECTORS
from deit_fast.reference.augment import ONE as UNIT

from .augment_geometry import clamp
from .philox import words_of

ONE = tl.constexpr(UNIT)  # 1.0 in the 16.16 format of the color factors
MAX_FACTOR, MAX_SHIFT = tl.constexpr(64 * UNIT), tl.constexpr(UNIT // 2)
BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(kind) for kind in range(4))
GRAY_RED, GRAY_GREEN, GRAY_BLUE = (tl.constexpr(weight) for weight in GRAY)
RED_SECTOR, GREEN_SECTOR, BLUE_SECTOR = (tl.constexpr(sector) for sector in SECTORS)


@triton.jit
def gray(r, g, b):
    """floor(0.2989 r + 0.587 g + 0.114 b), exactly; int32."""
    return (r * GRAY_RED + g * GRAY_GREEN + b * GRAY_BLUE) >> 22


@triton.jit
def load_factors(jitter_ptr, row, J: tl.constexpr):
    """(brightness, contrast, saturation, hue) of a row, int32 scalars within their ranges; jitter: (B, J) int32."""
    jitter_ptr += J * row
    brightness = clamp(tl.load(jitter_ptr + BRIGHTNESS), 0, MAX_FACTOR)
    contrast = clamp(tl.load(jitter_ptr + CONTRAST), 0, MAX_FACTOR)
    saturation = clamp(tl.load(jitter_ptr + SATURATION), 0, MAX_FACTOR)
    hue = contrast * 0
    if J == 4:
        hue = clamp(tl.load(jitter_ptr + HUE), -MAX_SHIFT, MAX_SHIFT)
    return brightness, contrast, saturation, hue


@triton.jit
def load_order(order_ptr, row, J: tl.constexpr):
    """A row's color operations in one int32 scalar, a byte each, the first one lowest; order: (B, J) uint8."""
    order_ptr += J * row
    order = (tl.load(order_ptr).to(tl.int32) | (tl.load(order_ptr + 1).to(tl.int32) << 8)
             | (tl.load(order_ptr + 2).to(tl.int32) << 16))
    if J == 4:
        order = order | (tl.load(order_ptr + 3).to(tl.int32) << 24)
    return order


@triton.jit
def color_at(order, step, J: tl.constexpr):
    """The kind of a row's color operation number `step`."""
    return tl.minimum((order >> (8 * step)) & 255, J - 1)


@triton.jit
def changes(factors):
    """Whether any color operation of a row changes anything."""
    brightness, contrast, saturation, hue = factors
    return (brightness != ONE) | (contrast != ONE) | (saturation != ONE) | (hue != 0)


@triton.jit
def contrast_base(gray_sum, factor, AREA: tl.constexpr):
    """The addend of contrast from the sum of an image's grays; gray_sum: int64 scalar."""
    mean = (gray_sum << 16) // AREA
    return ((mean * (ONE - factor)) >> 16).to(tl.int32)


@triton.jit
def blend(x, factor, base):
    """clamp((x F + base) >> 16): one channel (BLOCK,) int32 of a color operation."""
    return clamp((x * factor + base) >> 16, 0, 255)


@triton.jit
def hue_channel(top, one, hue, SECTOR: tl.constexpr):
    """A channel of the pixels whose hue, times the chroma, is `hue` sixths in 16.16; one: the chroma in 16.16."""
    k = hue + SECTOR * one
    k = tl.where(k >= 6 * one, k - 6 * one, k)
    below_top = tl.maximum(tl.minimum(tl.minimum(k, 4 * one - k), one), 0)
    return ((top << 16) - below_top + (1 << 15)) >> 16


@triton.jit
def turn_hue(r, g, b, shift):
    """(r, g, b) with the hue moved by `shift`, 16.16 turns of the color wheel, in units of the chroma: no quotient."""
    top = tl.maximum(tl.maximum(r, g), b)
    chroma = top - tl.minimum(tl.minimum(r, g), b)
    hue = tl.where(r == top, g - b, tl.where(g == top, 2 * chroma + b - r, 4 * chroma + r - g))
    one = chroma << 16
    hue = (hue << 16) + chroma * (6 * shift)
    hue += tl.where(hue < 0, 6 * one, 0) - tl.where(hue >= 6 * one, 6 * one, 0)
    return hue_channel(top, one, hue, RED_SECTOR), hue_channel(top, one, hue, GREEN_SECTOR), hue_channel(
        top, one, hue, BLUE_SECTOR)


@triton.jit
def color(r, g, b, kind, factors, contrast_addend, J: tl.constexpr):
    """(r, g, b) after the color operation of that kind. J is 4 where hues may turn."""
    brightness, contrast, saturation, hue = factors
    if J == 4 and kind == HUE:
        if hue != 0:
            r, g, b = turn_hue(r, g, b, hue)
    else:
        factor = tl.where(kind == BRIGHTNESS, brightness, tl.where(kind == CONTRAST, contrast, saturation))
        if factor != ONE:
            base = tl.zeros_like(r)
            if kind == CONTRAST:
                base += contrast_addend
            if kind == SATURATION:
                base = gray(r, g, b) * (ONE - factor)
            r, g, b = blend(r, factor, base), blend(g, factor, base), blend(b, factor, base)
    return r, g, b


@triton.jit
def mix(own, other, lam):
    """fma(own, lam, other (1 - lam)), fp32."""
    return tl.fma(own, lam, other * (1.0 - lam))


@triton.jit
def noise_radius(word):
    """sqrt(-2 log u) of u = ((word >> 8) + 1) / 2^24; the polynomial is (log(1 + f) - f + f^2 / 2) / f^3."""
    u = ((word >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 0.0714975372, -0.115712009)
    p = tl.fma(p, f, 0.116615109)
    p = tl.fma(p, f, -0.124110505)
    p = tl.fma(p, f, 0.142499372)
    p = tl.fma(p, f, -0.166684806)
    p = tl.fma(p, f, 0.200007081)
    p = tl.fma(p, f, -0.249999896)
    p = tl.fma(p, f, 0.333333313)
    f2 = f * f
    log1p = f + tl.fma(p * f, f2, -0.5 * f2)
    return tl.sqrt_rn(-2.0 * tl.fma(e, 0.693147182, log1p))


@triton.jit
def noise_angle(word):
    """(cos, sin) of 2 pi (word >> 8) / 2^24; the quarter turn is taken off in integers."""
    turn = (word >> 8).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    x = (turn - quarter * (1 << 22)).to(tl.float32) * 3.74507039e-7
    z = x * x
    s = tl.fma(x * z, tl.fma(tl.fma(z, -0.000195879504, 0.0083327489), z, -0.166666642), x)
    q = tl.fma(tl.fma(z, 2.45479914e-05, -0.00138883037), z, 0.0416666642)
    c = tl.fma(z * z, q, tl.fma(z, -0.5, 1.0))
    odd_quarter = (quarter & 1) != 0
    even, odd = tl.where(odd_quarter, s, c), tl.where(odd_quarter, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -even, even), tl.where((quarter & 2) != 0, -odd, odd)


@triton.jit
def noise(key, pixel):
    """Three N(0, 1) numbers, fp32, for the channels of pixel y W + x: int64, a tile or a scalar, like the key."""
    w0, w1, w2, w3 = words_of(key, pixel, 0)
    radius = noise_radius(w0)
    cosine, sine = noise_angle(w1)
    blue, _ = noise_angle(w3)
    return radius * cosine, radius * sine, noise_radius(w2) * blue
