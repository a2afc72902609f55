// The plan's rows as the kernels read them: clamped into range, one output image's own row and its partner's side by
// side in shared memory, so that a pixel costs no registers for them.
#pragma once

#include "workspace.cuh"

namespace {

struct Row {
    const uint8_t* image;  // what is cropped: a source image, or the tile that resize.cuh has made
    int64_t stride_c, stride_y, stride_x;
    int32_t source_h, source_w;
    int32_t from_y, step_y, from_x, step_x;  // output (y, x) is source (from_y + step_y y, from_x + step_x x)
    int32_t words;                           // whether a channel's lines consist of whole, aligned 32-bit words
    int32_t steps, kind[4], factor[4];       // the color operations that change anything, in order
    int32_t contrast, base;                  // which of them is contrast, or -1; and its base, once the mean is known
    int32_t grayscale, erases;
    const int32_t* erase;
    uint32_t key_low, key_high;
    int64_t label;
};

// All about one output image.
struct Work {
    Row row[2];           // its own, its partner's
    int32_t partnered;    // whether a pixel of the partner shows: the whole image is mixed, or the box is cut
    int32_t mixes, cuts;  // never both
    int32_t cut[4];
    float lam;
};

__device__ void load_colors(const Args& a, int64_t i, Row& row) {
    row.steps = 0, row.contrast = -1, row.base = 0;
    for (int step = 0; step < int(a.J); ++step) {
        const int32_t kind = clamp(int32_t(a.jitter_order[a.J * i + step]), 0, int32_t(a.J) - 1);
        const int32_t factor = a.jitter[a.J * i + kind];
        if (kind == kContrast && row.contrast >= 0) continue;  // a plan in range names it once
        const bool neutral = factor == (kind == kHue ? 0 : kOne);
        if (neutral) continue;
        if (kind == kContrast) row.contrast = row.steps;
        row.kind[row.steps] = kind;
        row.factor[row.steps] =
            kind == kHue ? clamp(factor, -kMaxShift, kMaxShift) : clamp(factor, 0, kMaxFactor);
        ++row.steps;
    }
    row.grayscale = a.grayscale[i];
}

__device__ void load_row(const Args& a, int64_t i, Row& row) {
    const int64_t m = clamp(a.index[i], int64_t(0), a.M - 1);
    row.from_y = row.from_x = 0, row.step_y = row.step_x = 1;
    if (resizes(a, i)) {  // and flipped, while it was resized
        row.image = tile_of(a, i);
        row.stride_c = int64_t(a.height) * a.width, row.stride_y = a.width, row.stride_x = 1;
        row.source_h = a.height, row.source_w = a.width;
    } else {
        row.image = a.images + m * a.stride_m;
        row.stride_c = a.stride_c, row.stride_y = a.stride_y, row.stride_x = a.stride_x;
        row.source_h = a.source_h, row.source_w = a.source_w;
        row.from_y = clamp(a.crop[2 * i], -a.height, a.source_h);
        row.from_x = clamp(a.crop[2 * i + 1], -a.width, a.source_w);
        if (a.vflip[i]) row.from_y += a.height - 1, row.step_y = -1;
        if (a.flip[i]) row.from_x += a.width - 1, row.step_x = -1;
    }
    const auto bits = reinterpret_cast<uintptr_t>(row.image) | uintptr_t(row.stride_c) | uintptr_t(row.stride_y);
    row.words = row.stride_x == 1 && (bits | uintptr_t(row.source_w)) % 4 == 0;
    load_colors(a, i, row);
    row.erase = a.erase + 4 * a.R * i, row.erases = false;
    for (int64_t r = 0; r < a.R; ++r) row.erases |= has_area(row.erase + 4 * r);
    row.key_low = uint32_t(uint64_t(a.noise_key[i]));
    row.key_high = uint32_t(uint64_t(a.noise_key[i]) >> 32);
    row.label = a.labels[m];
}

// For all threads of a block, of which two work; a barrier must come before anyone reads `work`.
__device__ void load_work(const Args& a, int64_t i, Work& work) {
    const int who = threadIdx.x;
    if (who > 1) return;
    load_row(a, who ? clamp(a.partner[i], int64_t(0), a.B - 1) : i, work.row[who]);
    if (who) return;
    for (int k = 0; k < 4; ++k) work.cut[k] = a.cut[4 * i + k];
    work.lam = fminf(fmaxf(a.lam[i], 0.0f), 1.0f);
    work.cuts = has_area(work.cut);
    work.mixes = !work.cuts && work.lam != 1.0f;
    work.partnered = work.cuts || work.mixes;
}

// The targets of output image i, by all threads of a block.
__device__ void write_targets(const Args& a, const Work& work, int64_t i) {
    for (int64_t k = threadIdx.x; k < a.K; k += blockDim.x) {
        a.targets[i * a.K + k] =
            mix(k == work.row[0].label ? a.on : a.off, k == work.row[1].label ? a.on : a.off, work.lam);
    }
}

}  // namespace
