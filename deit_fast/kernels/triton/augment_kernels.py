"""Augmentation as Triton kernels: a program makes a tile of an output image's pixels, straight from the uint8 source.

The mixing partner is the same computation for another row of the plan. What a row does not use (resizing, color, boxes,
a partner) is skipped by a branch that the whole program takes; nothing depends on a value on the host. Values are
clamped into range, never checked, as in csrc/cuda/augment.cu. Contrast needs the mean of the whole image: where one
program holds the image it adds up its own pixels, else `augment_gray_kernel` leaves sums for it.

More tuples than augment_geometry.py's: `colors` (jitter_order, jitter, grayscale, sums of grays), `boxes` (erase,
noise_key), `affine` (scale and bias of red, green, blue), `tile` (pixel numbers, y, x, first and last y).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .augment_color import (CONTRAST, ONE, changes, color, color_at, contrast_base, gray, load_factors, load_order, mix,
                            noise)
from .augment_geometry import clamp, source_pixels

# A batch's plan is a slice of an epoch's: were its pointers specialised on their alignment, steps would compile anew.
SLICED = ["images_ptr", "labels_ptr", "index_ptr", "box_ptr", "bicubic_ptr", "crop_ptr", "flip_ptr", "vflip_ptr",
          "order_ptr", "jitter_ptr", "grayscale_ptr", "erase_ptr", "key_ptr", "partner_ptr", "lam_ptr", "cut_ptr"]


@triton.jit
def in_box(box_ptr, y, x):
    """Which pixels lie in a box of (y, x, h, w) int32; any values are safe. y, x: (BLOCK,) int32."""
    h, w = tl.maximum(tl.load(box_ptr + 2), 0).to(tl.uint32), tl.maximum(tl.load(box_ptr + 3), 0).to(tl.uint32)
    return ((y - tl.load(box_ptr)).to(tl.uint32, bitcast=True) < h) & (
        (x - tl.load(box_ptr + 1)).to(tl.uint32, bitcast=True) < w)


@triton.jit
def reaches(box_ptr, first_y, last_y, H: tl.constexpr):
    """Whether a box with an area touches the image rows first_y to last_y."""
    top, h, w = clamp(tl.load(box_ptr), 0, H), clamp(tl.load(box_ptr + 2), 0, H), tl.load(box_ptr + 3)
    return (h > 0) & (w > 0) & (top <= last_y) & (top + h > first_y)


@triton.jit
def jittered(r, g, b, factors, colors, row, AREA: tl.constexpr, J: tl.constexpr, SPLITS: tl.constexpr):
    """(r, g, b) after the row's color operations in its order."""
    order_ptr, _, _, sums_ptr = colors
    order = load_order(order_ptr, row, J)
    for step in range(J):  # a loop: unrolled, eight copies of all operations cost more in instructions than they save
        kind = color_at(order, step, J)
        addend = kind * 0
        if (kind == CONTRAST) & (factors[1] != ONE):
            if SPLITS == 0:
                total = tl.sum(gray(r, g, b)).to(tl.int64)  # past the image pixels are black until contrast
            else:
                total = tl.sum(tl.load(sums_ptr + row * SPLITS + tl.arange(0, SPLITS)))
            addend = contrast_base(total, factors[1], AREA)
        r, g, b = color(r, g, b, kind, factors, addend, J)
    return r, g, b


@triton.jit
def erased(r, g, b, boxes, row, tile, R: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, REMODE: tl.constexpr):
    """(r, g, b) fp32 with the row's boxes filled: noise, a color per box, or 0; no box reaches the tile: no work."""
    erase_ptr, key_ptr = boxes
    p, y, x, first_y, last_y = tile
    hit = tl.zeros((BLOCK,), tl.int1)
    reached = False
    for i in range(R):
        box_ptr = erase_ptr + 4 * (row * R + i)
        if reaches(box_ptr, first_y, last_y, H):
            box = in_box(box_ptr, y, x)
            if REMODE == "rand":
                red, green, blue = noise(tl.load(key_ptr + row), tl.zeros((), tl.int64) + i)
                r, g, b = tl.where(box, red, r), tl.where(box, green, g), tl.where(box, blue, b)
            hit = hit | box
            reached = True
    if REMODE != "rand":
        if reached:
            if REMODE == "pixel":
                red, green, blue = noise(tl.load(key_ptr + row), p.to(tl.int64))
                r, g, b = tl.where(hit, red, r), tl.where(hit, green, g), tl.where(hit, blue, b)
            else:
                r, g, b = tl.where(hit, 0.0, r), tl.where(hit, 0.0, g), tl.where(hit, 0.0, b)
    return r, g, b


@triton.jit
def finished(r, g, b, factors, colors, boxes, affine, row, tile, AREA: tl.constexpr, H: tl.constexpr, J: tl.constexpr,
             R: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, REMODE: tl.constexpr):
    """(r, g, b) fp32 (BLOCK,) of a row's source pixels, all done but mixing."""
    if changes(factors):
        r, g, b = jittered(r, g, b, factors, colors, row, AREA, J, SPLITS)
    if tl.load(colors[2] + row) != 0:
        r = gray(r, g, b)
        g, b = r, r
    scale_r, scale_g, scale_b, bias_r, bias_g, bias_b = affine
    r = tl.fma(r.to(tl.float32), scale_r, bias_r)
    g = tl.fma(g.to(tl.float32), scale_g, bias_g)
    b = tl.fma(b.to(tl.float32), scale_b, bias_b)
    return erased(r, g, b, boxes, row, tile, R, H, BLOCK, REMODE)


@triton.jit
def mixed_targets(labels_ptr, index_ptr, targets_ptr, row, partner, lam, M, on, off, K: tl.constexpr,
                  BLOCK_K: tl.constexpr):
    """Row `row` of targets (B, K): its smoothed one-hot mixed with its partner's."""
    own = tl.load(labels_ptr + clamp(tl.load(index_ptr + row), 0, M - 1))
    other = tl.load(labels_ptr + clamp(tl.load(index_ptr + partner), 0, M - 1))
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        target = mix(tl.where(k == own, on, off), tl.where(k == other, on, off), lam)
        tl.store(targets_ptr + row * K + k, target, mask=k < K)


@triton.jit(do_not_specialize=["M", "stride_m", "stride_c", "stride_y", "stride_x", "source_h", "source_w"],
            do_not_specialize_on_alignment=SLICED)
def augment_gray_kernel(images_ptr, index_ptr, box_ptr, bicubic_ptr, first_ptr, weights_ptr, crop_ptr, flip_ptr,
                        vflip_ptr, order_ptr, jitter_ptr, sums_ptr, M, stride_m, stride_c, stride_y, stride_x, source_h,
                        source_w, H: tl.constexpr, W: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr,
                        SPLITS: tl.constexpr, TAPS: tl.constexpr, REFLECT: tl.constexpr, WIDE: tl.constexpr):
    """sums (B, SPLITS) int64: the grays of a row's image as contrast finds it, a program's share of the tiles each.

    Rows without contrast are left as they are: nobody reads their sums.
    """
    TILES: tl.constexpr = (H * W + BLOCK - 1) // BLOCK
    source = (images_ptr, M, stride_m, stride_c, stride_y, stride_x, source_h, source_w)
    window, resize = (index_ptr, crop_ptr, flip_ptr, vflip_ptr), (box_ptr, bicubic_ptr, first_ptr, weights_ptr)
    row, split = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    factors = load_factors(jitter_ptr, row, J)
    if factors[1] != ONE:
        order = load_order(order_ptr, row, J)
        total = tl.zeros((BLOCK,), tl.int64)
        for number in range(split, TILES, SPLITS):
            p = number * BLOCK + tl.arange(0, BLOCK)
            r, g, b = source_pixels(source, window, resize, row, p // W, p % W, p < H * W, H, W, BLOCK, TAPS, REFLECT,
                                    WIDE)
            before = True
            for step in range(J):
                kind = color_at(order, step, J)
                before = before & (kind != CONTRAST)
                if before:
                    r, g, b = color(r, g, b, kind, factors, 0, J)
            total += gray(r, g, b)  # past the image pixels are black until contrast
        tl.store(sums_ptr + row * SPLITS + split, tl.sum(total))


@triton.jit(do_not_specialize=["M", "B", "stride_m", "stride_c", "stride_y", "stride_x", "source_h", "source_w"],
            do_not_specialize_on_alignment=SLICED)
def augment_fwd_kernel(images_ptr, labels_ptr, index_ptr, box_ptr, bicubic_ptr, first_ptr, weights_ptr, crop_ptr,
                       flip_ptr, vflip_ptr, order_ptr, jitter_ptr, grayscale_ptr, erase_ptr, key_ptr, partner_ptr,
                       lam_ptr, cut_ptr, sums_ptr, out_ptr, targets_ptr, M, B, stride_m, stride_c, stride_y, stride_x,
                       source_h, source_w, scale_r, scale_g, scale_b, bias_r, bias_g, bias_b, on, off, H: tl.constexpr,
                       W: tl.constexpr, J: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
                       BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, TAPS: tl.constexpr, REFLECT: tl.constexpr,
                       REMODE: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """A tile of out (B, 3, H', W'), and from an image's first tile its targets (B, K).

    sums: (B, SPLITS) int64 of `augment_gray_kernel`; with SPLITS 0 a program holds the whole image.
    """
    TILES: tl.constexpr = (H * W + BLOCK - 1) // BLOCK
    source = (images_ptr, M, stride_m, stride_c, stride_y, stride_x, source_h, source_w)
    window, resize = (index_ptr, crop_ptr, flip_ptr, vflip_ptr), (box_ptr, bicubic_ptr, first_ptr, weights_ptr)
    colors, boxes = (order_ptr, jitter_ptr, grayscale_ptr, sums_ptr), (erase_ptr, key_ptr)
    affine = (scale_r, scale_g, scale_b, bias_r, bias_g, bias_b)
    row, number = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    partner = clamp(tl.load(partner_ptr + row), 0, B - 1)
    lam = tl.minimum(tl.maximum(tl.load(lam_ptr + row), 0.0), 1.0)
    p = number * BLOCK + tl.arange(0, BLOCK)
    y, x, inside = p // W, p % W, p < H * W
    tile = (p, y, x, number * BLOCK // W, (number * BLOCK + BLOCK - 1) // W)
    cut_ptr += 4 * row
    cuts = (tl.load(cut_ptr + 2) > 0) & (tl.load(cut_ptr + 3) > 0)
    mixes = cuts | (lam != 1.0)
    factors, other_factors = load_factors(jitter_ptr, row, J), load_factors(jitter_ptr, partner, J)
    cut = tl.zeros((BLOCK,), tl.int1)
    if cuts:
        cut = in_box(cut_ptr, y, x)
    own_wanted, other_wanted = ~cut, cut | ~cuts
    if SPLITS == 0:  # a mean is of all pixels
        own_wanted, other_wanted = own_wanted | (factors[1] != ONE), other_wanted | (other_factors[1] != ONE)
    # both images are on their way before either is worked on
    r, g, b = source_pixels(source, window, resize, row, y, x, inside & own_wanted, H, W, BLOCK, TAPS, REFLECT, WIDE)
    other_r, other_g, other_b = tl.zeros_like(r), tl.zeros_like(g), tl.zeros_like(b)
    if mixes:
        other_r, other_g, other_b = source_pixels(source, window, resize, partner, y, x, inside & other_wanted, H, W,
                                                  BLOCK, TAPS, REFLECT, WIDE)
    r, g, b = finished(r, g, b, factors, colors, boxes, affine, row, tile, H * W, H, J, R, BLOCK, SPLITS, REMODE)
    if mixes:
        red, green, blue = finished(other_r, other_g, other_b, other_factors, colors, boxes, affine, partner, tile,
                                    H * W, H, J, R, BLOCK, SPLITS, REMODE)
        if cuts:
            r, g, b = tl.where(cut, red, r), tl.where(cut, green, g), tl.where(cut, blue, b)
        else:
            r, g, b = mix(r, red, lam), mix(g, green, lam), mix(b, blue, lam)
    if WIDE:
        p = p.to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    at = out_ptr + row * (3 * H * W) + (3 * p if CHANNELS_LAST else p)
    STEP: tl.constexpr = 1 if CHANNELS_LAST else H * W  # from channel to channel
    tl.store(at, r.to(dtype), mask=inside)
    tl.store(at + STEP, g.to(dtype), mask=inside)
    tl.store(at + 2 * STEP, b.to(dtype), mask=inside)
    if number == 0:
        mixed_targets(labels_ptr, index_ptr, targets_ptr, row, partner, lam, M, on, off, K, BLOCK_K)
