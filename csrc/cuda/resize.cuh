// Resized crops on a GPU: the weights of every output row and column, then the pixels, into uint8 tiles (B, 3, H', W').
//
// A pixel sums its taps directly, each row's first: there are 3 to 8 a side in the usual crops, and neighbours share them
// in the first-level cache. Two passes would read less and write and read an array in between. It has not been measured.
#pragma once

#include "workspace.cuh"

namespace {

constexpr int RESIZE_THREADS = 256, WEIGHT_THREADS = 128;

// The box of row i, clamped into the source.
__device__ void source_box(const Args& a, int64_t i, int32_t& y, int32_t& x, int32_t& h, int32_t& w) {
    const int32_t* box = a.resized_crop + 4 * i;
    y = clamp(box[0], 0, a.source_h - 1), x = clamp(box[1], 0, a.source_w - 1);
    h = clamp(box[2], 1, a.source_h - y), w = clamp(box[3], 1, a.source_w - x);
}

__global__ void __launch_bounds__(WEIGHT_THREADS) resize_weights_kernel(const Args a) {
    const int64_t i = blockIdx.x;
    if (!resizes(a, i)) return;
    int32_t y, x, h, w;
    source_box(a, i, y, x, h, w);
    for (int64_t place = threadIdx.x; place < a.height + a.width; place += WEIGHT_THREADS) {
        const bool vertical = place < a.height;
        const int64_t m = vertical ? a.height : a.width, to = vertical ? place : place - a.height;
        const bool flip = vertical ? a.vflip[i] : a.flip[i];
        const Side side = side_of(a, i, vertical);
        const Filter filter = make_filter(vertical ? h : w, m, a.bicubic[i]);
        const int64_t pixel = flip ? m - 1 - to : to;
        int32_t first, count;
        find_taps(filter, pixel, first, count);
        side.first[to] = first, side.count[to] = count;
        weigh(filter, pixel, first, count, side.weight + to, m);
    }
}

inline __host__ __device__ uint32_t resize_blocks(const Args& a) {  // of one row of the plan
    return ceil_div(uint32_t(a.height) * uint32_t(a.width), uint32_t(RESIZE_THREADS));
}

__global__ void __launch_bounds__(RESIZE_THREADS) resize_kernel(const Args a) {
    const uint32_t area = uint32_t(a.height) * uint32_t(a.width), blocks = resize_blocks(a);
    const uint32_t i = blockIdx.x / blocks, p = blockIdx.x % blocks * RESIZE_THREADS + threadIdx.x;
    if (!resizes(a, i) || p >= area) return;
    int32_t box_y, box_x, h, w;
    source_box(a, i, box_y, box_x, h, w);
    const auto y = int32_t(p / uint32_t(a.width)), x = int32_t(p % uint32_t(a.width));
    const Side down = side_of(a, i, true), across = side_of(a, i, false);
    const int32_t first_y = down.first[y], rows = down.count[y], first_x = across.first[x], columns = across.count[x];
    const uint8_t* from = a.images + clamp(a.index[i], int64_t(0), a.M - 1) * a.stride_m +
                          (box_y + first_y) * a.stride_y + (box_x + first_x) * a.stride_x;
    int64_t total[3] = {};
    for (int32_t row = 0; row < rows; ++row, from += a.stride_y) {
        int32_t sum[3] = {};
        for (int32_t column = 0; column < columns; ++column) {
            const int32_t weight = across.weight[int64_t(column) * a.width + x];
            for (int c = 0; c < 3; ++c) sum[c] += weight * from[c * a.stride_c + column * a.stride_x];
        }
        const int64_t weight = down.weight[int64_t(row) * a.height + y];
        for (int c = 0; c < 3; ++c) total[c] += weight * clamp(sum[c], 0, kMostOfRow);
    }
    uint8_t* to = tile_of(a, i) + p;
    for (int c = 0; c < 3; ++c) {
        const int64_t level = (total[c] + (int64_t(1) << (2 * kWeightBits - 1))) >> (2 * kWeightBits);
        to[int64_t(c) * area] = uint8_t(clamp(level, int64_t(0), int64_t(255)));
    }
}

// Makes the tiles of all rows that are resized.
inline void resize(const Args& a, cudaStream_t stream) {
    launch(resize_weights_kernel, a.B, WEIGHT_THREADS, 0, stream, a);
    launch(resize_kernel, a.B * resize_blocks(a), RESIZE_THREADS, 0, stream, a);
}

}  // namespace
