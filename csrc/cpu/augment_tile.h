// The uint8 tile (3, H', W') of one image: its pixels gathered, planar, then jittered in place.
#pragma once

#include <algorithm>

#include "augment_resize.h"

namespace {

using namespace augment;

constexpr int64_t kStrip = 1024;  // pixels; 2 images x 3 channels x 4 bytes = 24 KiB of a 32 or 48 KiB cache

// Rows of n pixels of a plane, each reversed where FLIP. Rows are short: a call for each would cost more than its copy.
template <bool FLIP>
void copy_rows(uint8_t* __restrict dst, int64_t dst_step, const uint8_t* __restrict src, int64_t src_step, int32_t rows,
               int32_t n) {
    for (; rows > 0; --rows, dst += dst_step, src += src_step) {
        int32_t x = 0;
        for (; x + 32 <= n; x += 32)
            for (int k = 0; k < 32; ++k) dst[x + k] = src[FLIP ? n - 1 - x - k : x + k];
        for (; x < n; ++x) dst[x] = src[FLIP ? n - 1 - x : x];
    }
}

// Pixels (y, first_x), ..., (y, last_x - 1) of a crop at (y0, x0), whose source row is source_y.
AUGMENT_FN void load_row(const Args& a, const uint8_t* image, uint8_t* tile, int32_t y, int32_t source_y, int32_t x0,
                         int32_t first_x, int32_t last_x, bool flip) {
    const int64_t area = int64_t(a.height) * a.width;
    const int32_t n = last_x - first_x, start = flip ? a.width - last_x : first_x;
    const uint8_t* src = image + source_y * a.stride_y + (first_x + x0) * a.stride_x;
    uint8_t* dst = tile + int64_t(y) * a.width + start;
    if (a.stride_x == 1) {
        for (int c = 0; c < 3; ++c)
            (flip ? copy_rows<true> : copy_rows<false>)(dst + c * area, 0, src + c * a.stride_c, 0, 1, n);
        return;
    }
    const int64_t step = flip ? -a.stride_x : a.stride_x;
    if (flip) src += (n - 1) * a.stride_x;
    uint8_t *red = dst, *green = dst + area, *blue = dst + 2 * area;
    if (a.stride_c == 1 && step == 3) {
#pragma omp simd
        for (int32_t x = 0; x < n; ++x) red[x] = src[3 * x], green[x] = src[3 * x + 1], blue[x] = src[3 * x + 2];
    } else if (a.stride_c == 1 && step == -3) {
#pragma omp simd
        for (int32_t x = 0; x < n; ++x) red[x] = src[-3 * x], green[x] = src[-3 * x + 1], blue[x] = src[-3 * x + 2];
    } else {
        for (int32_t x = 0; x < n; ++x)
            for (int c = 0; c < 3; ++c) dst[c * area + x] = src[c * a.stride_c + x * step];
    }
}

// Columns [from, to) of a row as load_row's, beyond the source's sides: mirrored there.
void reflect_row(const Args& a, const uint8_t* image, uint8_t* tile, int32_t y, int32_t source_y, int32_t x0,
                 int32_t from, int32_t to, bool flip) {
    const int64_t area = int64_t(a.height) * a.width;
    for (int32_t x = from; x < to; ++x) {
        const uint8_t* src = image + source_y * a.stride_y + reflected(x + x0, a.source_w) * a.stride_x;
        uint8_t* dst = tile + int64_t(y) * a.width + (flip ? a.width - 1 - x : x);
        for (int c = 0; c < 3; ++c) dst[c * area] = src[c * a.stride_c];
    }
}

void crop_tile(const Args& a, int64_t i, uint8_t* tile) {
    const int32_t H = a.height, W = a.width, y0 = a.crop[2 * i], x0 = a.crop[2 * i + 1];
    const int64_t area = int64_t(H) * W;
    const uint8_t* image = a.images + a.index[i] * a.stride_m;
    const bool flip = a.flip[i], vflip = a.vflip[i];
    const int32_t first_y = std::clamp(-y0, 0, H), last_y = std::clamp(a.source_h - y0, first_y, H);
    const int32_t first_x = std::clamp(-x0, 0, W), last_x = std::clamp(a.source_w - x0, first_x, W);
    const bool whole = last_x - first_x == W && last_y - first_y == H;
    if (!whole && !a.reflect) memset(tile, 0, 3 * area);
    if (!flip && !vflip && a.stride_x == 1 && a.stride_y == W && last_x - first_x == W && (whole || !a.reflect)) {
        for (int c = 0; c < 3; ++c)
            memcpy(tile + c * area + int64_t(first_y) * W, image + c * a.stride_c + int64_t(first_y + y0) * W,
                   int64_t(last_y - first_y) * W);
        return;
    }
    if (a.stride_x == 1 && !a.reflect) {
        const uint8_t* src = image + int64_t(first_y + y0) * a.stride_y + first_x + x0;
        uint8_t* dst = tile + int64_t(vflip ? H - 1 - first_y : first_y) * W + (flip ? W - last_x : first_x);
        const auto copy = flip ? copy_rows<true> : copy_rows<false>;
        for (int c = 0; c < 3; ++c)
            copy(dst + c * area, vflip ? -W : W, src + c * a.stride_c, a.stride_y, last_y - first_y, last_x - first_x);
        return;
    }
    const int32_t from = a.reflect ? 0 : first_y, to = a.reflect ? H : last_y;
    for (int32_t y = from; y < to; ++y) {
        const int32_t row = vflip ? H - 1 - y : y, source_y = a.reflect ? reflected(y + y0, a.source_h) : y + y0;
        if (first_x < last_x) load_row(a, image, tile, row, source_y, x0, first_x, last_x, flip);
        if (!a.reflect) continue;
        reflect_row(a, image, tile, row, source_y, x0, 0, first_x, flip);
        reflect_row(a, image, tile, row, source_y, x0, last_x, W, flip);
    }
}

void blend_all(uint8_t* __restrict tile, int64_t n, int32_t factor, int32_t base) {
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) tile[p] = blend(tile[p], factor, base);
}

int64_t gray_sum(const uint8_t* __restrict tile, int64_t area) {
    int64_t total = 0;
    for (int64_t from = 0; from < area; from += kStrip) {  // a strip's sum fits an int32
        int32_t sum = 0;
        const int64_t to = std::min(from + kStrip, area);
#pragma omp simd reduction(+ : sum)
        for (int64_t p = from; p < to; ++p) sum += gray(tile[p], tile[area + p], tile[2 * area + p]);
        total += sum;
    }
    return total;
}

void saturate(uint8_t* __restrict tile, int64_t area, int32_t factor) {
    uint8_t *__restrict red = tile, *__restrict green = tile + area, *__restrict blue = tile + 2 * area;
#pragma omp simd
    for (int64_t p = 0; p < area; ++p) {
        const int32_t base = saturation_base(gray(red[p], green[p], blue[p]), factor);
        red[p] = blend(red[p], factor, base);
        green[p] = blend(green[p], factor, base);
        blue[p] = blend(blue[p], factor, base);
    }
}

void turn_hues(uint8_t* __restrict tile, int64_t area, int32_t shift) {
    uint8_t *__restrict red = tile, *__restrict green = tile + area, *__restrict blue = tile + 2 * area;
#pragma omp simd
    for (int64_t p = 0; p < area; ++p) turn_hue(shift, red[p], green[p], blue[p]);
}

void jitter_tile(const Args& a, int64_t i, uint8_t* tile) {
    const int64_t area = int64_t(a.height) * a.width;
    for (int64_t step = 0; step < a.J; ++step) {
        const int kind = a.jitter_order[a.J * i + step];
        const int32_t factor = a.jitter[a.J * i + kind];
        if (factor == (kind == kHue ? 0 : kOne)) continue;  // exactly the identity
        if (kind == kBrightness) blend_all(tile, 3 * area, factor, 0);
        if (kind == kContrast) blend_all(tile, 3 * area, factor, contrast_base(gray_sum(tile, area), area, factor));
        if (kind == kSaturation) saturate(tile, area, factor);
        if (kind == kHue) turn_hues(tile, area, factor);
    }
    if (a.grayscale[i]) saturate(tile, area, 0);
}

// Fills the tile of row i; `scratch` is for resizing.
void load_tile(const Args& a, int64_t i, uint8_t* tile, char* scratch) {
    if (resizes(a, i)) {
        resize_tile(a, i, tile, scratch);
    } else {
        crop_tile(a, i, tile);
    }
    jitter_tile(a, i, tile);
}

}  // namespace
