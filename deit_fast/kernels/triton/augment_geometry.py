"""Where an augmented image's pixels come from, inside Triton kernels: reference/geometry.py, bit for bit.

A crop is an address. A resized crop is a weighted sum over a window of source pixels; its weights belong to rows and
columns, not to pixels, so `augment_weights_kernel` makes a table of them first, and the sum over the window then only
multiplies. The table has room for bicubic weights of the whole source; loops run over what a row's box needs.

Tuples between the functions: `source` (images, M, strides of image, channel, y and x, source height and width),
`window` (index, crop, flip, vflip), `resize` (resized_crop, bicubic, and the table: first places, weights).
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit_fast.reference.geometry import ONE_WEIGHT as REFERENCE_ONE_WEIGHT

ONE_WEIGHT = tl.constexpr(REFERENCE_ONE_WEIGHT)  # 2^14, the sum of the weights of an output pixel along one side
HALF = tl.constexpr(REFERENCE_ONE_WEIGHT**2 // 2)


@triton.jit
def clamp(x, low, high):
    """x within [low, high], integers."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def load_side(box_ptr, axis: tl.constexpr, source):
    """(start, length) of a box of (y, x, h, w) along y (axis 0) or x (1), clamped into a source of that length."""
    start = clamp(tl.load(box_ptr + axis), 0, source - 1)
    return start, clamp(tl.load(box_ptr + 2 + axis), 0, source - start)


@triton.jit
def taps(n, m, bicubic):
    """The most source pixels that an output pixel sees along a side, n pixels resized to m."""
    return (tl.where(bicubic, 4, 2) * tl.maximum(n, m) + m - 1) // m


@triton.jit
def filter_value(j, place, n, m, bicubic):
    """The filter at source pixel j of n, seen from output pixel `place` of m; 16 fractional bits. All int64."""
    twice = 2 * tl.maximum(n, m)
    reach = tl.where(bicubic, 2 * twice, twice)
    distance = tl.abs((2 * j + 1) * m - (2 * place + 1) * n)
    one = tl.full((), 1, tl.int64)
    u = (tl.minimum(distance, reach) * ((one << 46) // twice)) >> 30
    square = u * u
    near = (((3 * u - (5 << 16)) * square) >> 1) + (one << 48)  # 3/2 u^3 - 5/2 u^2 + 1
    far = ((((5 << 16) - u) * square) >> 1) - (u << 34) + (one << 49)  # -1/2 u^3 + 5/2 u^2 - 4 u + 2
    value = tl.where(bicubic, tl.where(u < (1 << 16), near, far) >> 32, (1 << 16) - u)
    return tl.where((j < n) & (distance < reach), value, 0)


@triton.jit(do_not_specialize=["source_h", "source_w"], do_not_specialize_on_alignment=["box_ptr", "bicubic_ptr"])
def augment_weights_kernel(box_ptr, bicubic_ptr, first_ptr, weights_ptr, source_h, source_w, H: tl.constexpr,
                           W: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """first (B, H' + W') int32: the first source place of each output row and column; weights (B, TAPS, H' + W') int32.

    Both are relative to the box. A row of the plan without a box is left as it is.
    """
    BLOCKS: tl.constexpr = (H + BLOCK - 1) // BLOCK + (W + BLOCK - 1) // BLOCK
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    box_ptr += 4 * row
    _, h = load_side(box_ptr, 0, source_h)
    _, w = load_side(box_ptr, 1, source_w)
    down = block < (H + BLOCK - 1) // BLOCK
    m = tl.where(down, H, W).to(tl.int64)
    n = tl.where(down, h, w).to(tl.int64)
    if (h > 0) & (w > 0):
        bicubic = tl.load(bicubic_ptr + row) != 0
        place = tl.where(down, block, block - (H + BLOCK - 1) // BLOCK) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        column = tl.where(down, 0, H) + place  # of the table
        inside = place < m
        before = (2 * place + 1) * n - tl.where(bicubic, 4, 2) * tl.maximum(n, m) - m  # > 2 m (first - 1)
        first = tl.where(before < 0, 0, before // (2 * m) + 1)
        count = taps(n, m, bicubic)
        total = tl.zeros((BLOCK,), tl.int64)
        for t in range(0, count):
            total += filter_value(first + t, place, n, m, bicubic)
        share = (tl.full((), 1, tl.int64) << 46) // tl.maximum(total, 1)
        running = tl.zeros((BLOCK,), tl.int64)
        done = tl.zeros((BLOCK,), tl.int64)  # of 2^14
        weights_ptr += row * TAPS * (H + W)
        for t in range(0, count):
            running += filter_value(first + t, place, n, m, bicubic)
            rounded = (running * share + (1 << 31)) >> 32
            tl.store(weights_ptr + t * (H + W) + column, (rounded - done).to(tl.int32), mask=inside)
            done = rounded
        tl.store(first_ptr + row * (H + W) + column, first.to(tl.int32), mask=inside)


@triton.jit
def reflect(place, size):
    """Places along a side, mirrored at the centres of its end pixels until they lie in [0, size); int32."""
    period = tl.maximum(2 * (size - 1), 1)
    place = place % period  # as in C, with the sign of place
    place = tl.where(place < 0, place + period, place)
    return tl.minimum(place, period - place)


@triton.jit
def load_pixels(at, stride_c, wanted):
    """(r, g, b) int32 at pointers to red (BLOCK,); 0 where not wanted. Twice stride_c may not fit an int32."""
    green = at + stride_c
    r = tl.load(at, mask=wanted, other=0).to(tl.int32)
    g = tl.load(green, mask=wanted, other=0).to(tl.int32)
    b = tl.load(green + stride_c, mask=wanted, other=0).to(tl.int32)
    return r, g, b


@triton.jit
def cropped(source, image_ptr, crop_ptr, row, y, x, wanted, H: tl.constexpr, W: tl.constexpr, REFLECT: tl.constexpr,
            WIDE: tl.constexpr):
    """(r, g, b) int32 (BLOCK,) of the window at the row's crop, black or mirrored outside the source."""
    _, _, _, stride_c, stride_y, stride_x, source_h, source_w = source
    y += clamp(tl.load(crop_ptr + 2 * row), -H, source_h)
    x += clamp(tl.load(crop_ptr + 2 * row + 1), -W, source_w)
    if REFLECT:
        y, x = reflect(y, source_h), reflect(x, source_w)
    else:
        wanted = wanted & (y >= 0) & (y < source_h) & (x >= 0) & (x < source_w)
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    return load_pixels(image_ptr + (y * stride_y + x * stride_x), stride_c, wanted)


@triton.jit
def resized(source, image_ptr, resize, row, y, x, wanted, H: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
            BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(r, g, b) int32 (BLOCK,) of the row's box resized: columns first, rounded once at the end."""
    _, _, _, stride_c, stride_y, stride_x, source_h, source_w = source
    box_ptr, bicubic_ptr, first_ptr, weights_ptr = resize
    top, h = load_side(box_ptr + 4 * row, 0, source_h)
    left, w = load_side(box_ptr + 4 * row, 1, source_w)
    bicubic = tl.load(bicubic_ptr + row) != 0
    first_ptr += row * (H + W)
    weights_ptr += row * TAPS * (H + W)
    first_y, first_x = tl.load(first_ptr + y), tl.load(first_ptr + H + x)
    total_r, total_g, total_b = (tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64),
                                 tl.zeros((BLOCK,), tl.int64))
    for down in range(0, taps(h, H, bicubic)):
        weight_y = tl.load(weights_ptr + down * (H + W) + y)
        source_y = tl.minimum(first_y + down, h - 1) + top  # past the box the weight is 0
        sum_r, sum_g, sum_b = tl.zeros_like(y), tl.zeros_like(y), tl.zeros_like(y)
        for across in range(0, taps(w, W, bicubic)):
            weight_x = tl.load(weights_ptr + across * (H + W) + H + x)
            source_x = tl.minimum(first_x + across, w - 1) + left
            if WIDE:
                offset = source_y.to(tl.int64) * stride_y + source_x.to(tl.int64) * stride_x
            else:
                offset = source_y * stride_y + source_x * stride_x
            r, g, b = load_pixels(image_ptr + offset, stride_c, wanted & (weight_x != 0) & (weight_y != 0))
            sum_r, sum_g, sum_b = sum_r + weight_x * r, sum_g + weight_x * g, sum_b + weight_x * b
        wide = weight_y.to(tl.int64)
        total_r += wide * clamp(sum_r, 0, 255 * ONE_WEIGHT).to(tl.int64)
        total_g += wide * clamp(sum_g, 0, 255 * ONE_WEIGHT).to(tl.int64)
        total_b += wide * clamp(sum_b, 0, 255 * ONE_WEIGHT).to(tl.int64)
    return (clamp((total_r + HALF) >> 28, 0, 255).to(tl.int32), clamp((total_g + HALF) >> 28, 0, 255).to(tl.int32),
            clamp((total_b + HALF) >> 28, 0, 255).to(tl.int32))


@triton.jit
def source_pixels(source, window, resize, row, y, x, wanted, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
                  TAPS: tl.constexpr, REFLECT: tl.constexpr, WIDE: tl.constexpr):
    """(r, g, b) int32 (BLOCK,): pixels (y, x) of a row's cropped or resized and mirrored image, where wanted.

    TAPS is 0 for a plan that resizes nothing.
    """
    images_ptr, M, stride_m, _, _, _, _, _ = source
    index_ptr, crop_ptr, flip_ptr, vflip_ptr = window
    image_ptr = images_ptr + clamp(tl.load(index_ptr + row), 0, M - 1) * stride_m
    y = tl.where(tl.load(vflip_ptr + row) != 0, H - 1 - y, y)
    x = tl.where(tl.load(flip_ptr + row) != 0, W - 1 - x, x)
    if TAPS == 0:
        r, g, b = cropped(source, image_ptr, crop_ptr, row, y, x, wanted, H, W, REFLECT, WIDE)
    else:
        box_ptr = resize[0] + 4 * row
        if (tl.load(box_ptr + 2) > 0) & (tl.load(box_ptr + 3) > 0):
            y = clamp(y, 0, H - 1)  # a tile's pixels past the image: the table ends
            r, g, b = resized(source, image_ptr, resize, row, y, x, wanted, H, W, TAPS, BLOCK, WIDE)
        else:
            r, g, b = cropped(source, image_ptr, crop_ptr, row, y, x, wanted, H, W, REFLECT, WIDE)
    return r, g, b
