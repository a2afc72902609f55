// Resized crops on a GPU: the weights of every output row and column, then the pixels, into uint8 tiles (B, 3, H', W').
//
// A pixel sums its taps directly, each row's first: there are 3 to 8 a side in the usual crops, and neighbours share them
// in the first-level cache. Two passes would read less and write and read an array in between. It has not been measured.
#pragma once

#include <cuda_runtime.h>

#include "augment_filter.h"

namespace {

using namespace augment;

constexpr int RESIZE_THREADS = 256, WEIGHT_THREADS = 128;

template <class T>
__host__ __device__ T clamp(T x, T low, T high) {
    return x < low ? low : x > high ? high : x;
}

__host__ __device__ inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Of one row of the plan: int32 weights [tap][output pixel] along a side, then the first source pixels and counts.
__host__ __device__ inline int64_t side_ints(int64_t source, int64_t m) { return (most_taps(source, m) + 2) * m; }

__host__ __device__ inline int64_t tiles_bytes(int64_t height, int64_t width, int64_t B) {
    return padded(B * 3 * height * width);
}

inline int64_t resize_bytes(int64_t source_h, int64_t source_w, int64_t height, int64_t width, int64_t B) {
    return tiles_bytes(height, width, B) + 4 * B * (side_ints(source_h, height) + side_ints(source_w, width));
}

__device__ uint8_t* tile_of(const Args& a, int64_t i) {
    return static_cast<uint8_t*>(a.workspace) + i * 3 * a.height * a.width;
}

struct Side {
    int32_t *weight, *first, *count;
};

__device__ Side side_of(const Args& a, int64_t i, bool vertical) {
    const int64_t down = side_ints(a.source_h, a.height), across = side_ints(a.source_w, a.width);
    const auto ints = reinterpret_cast<int32_t*>(static_cast<char*>(a.workspace) + tiles_bytes(a.height, a.width, a.B));
    const int64_t source = vertical ? a.source_h : a.source_w, m = vertical ? a.height : a.width;
    int32_t* weight = ints + i * (down + across) + (vertical ? 0 : down);
    int32_t* first = weight + most_taps(source, m) * m;
    return {weight, first, first + m};
}

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

__global__ void __launch_bounds__(RESIZE_THREADS) resize_kernel(const Args a) {
    const int64_t i = blockIdx.x, area = int64_t(a.height) * a.width;
    const int64_t p = int64_t(blockIdx.y) * RESIZE_THREADS + threadIdx.x;
    if (!resizes(a, i) || p >= area) return;
    int32_t box_y, box_x, h, w;
    source_box(a, i, box_y, box_x, h, w);
    const int32_t y = int32_t(p / a.width), x = int32_t(p % a.width);
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
        to[c * area] = uint8_t(clamp(level, int64_t(0), int64_t(255)));
    }
}

// Makes the tiles of all rows that are resized.
inline void resize(const Args& a, cudaStream_t stream) {
    const int64_t area = int64_t(a.height) * a.width;
    const dim3 grid(unsigned(a.B), unsigned((area + RESIZE_THREADS - 1) / RESIZE_THREADS));
    resize_weights_kernel<<<unsigned(a.B), WEIGHT_THREADS, 0, stream>>>(a);
    resize_kernel<<<grid, RESIZE_THREADS, 0, stream>>>(a);
}

}  // namespace
