// What a call keeps in its workspace: the parts of every row's sum of grays, and, where rows are resized, the tiles
// that they become and the weights of that.
#pragma once

#include "augment_filter.h"
#include "launch.cuh"

namespace {

constexpr int MOST_PARTS = 16;  // of an image's sum of grays

__host__ __device__ inline int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The parts come first, (B, MOST_PARTS) int64.
__host__ __device__ inline int64_t sums_bytes(int64_t B) { return padded(B * MOST_PARTS * int64_t(sizeof(int64_t))); }

__device__ int64_t* sums_of(const Args& a, int64_t i) { return static_cast<int64_t*>(a.workspace) + i * MOST_PARTS; }

// Of one row of the plan: int32 weights [tap][output pixel] along a side, then the first source pixels and counts.
__host__ __device__ inline int64_t side_ints(int64_t source, int64_t m) { return (most_taps(source, m) + 2) * m; }

__host__ __device__ inline int64_t tiles_bytes(int64_t height, int64_t width, int64_t B) {
    return padded(B * 3 * height * width);
}

inline int64_t resize_bytes(int64_t source_h, int64_t source_w, int64_t height, int64_t width, int64_t B) {
    return tiles_bytes(height, width, B) + 4 * B * (side_ints(source_h, height) + side_ints(source_w, width));
}

__device__ uint8_t* tile_of(const Args& a, int64_t i) {
    return static_cast<uint8_t*>(a.workspace) + sums_bytes(a.B) + i * 3 * a.height * a.width;
}

struct Side {
    int32_t *weight, *first, *count;
};

__device__ Side side_of(const Args& a, int64_t i, bool vertical) {
    const int64_t down = side_ints(a.source_h, a.height), across = side_ints(a.source_w, a.width);
    const int64_t before = sums_bytes(a.B) + tiles_bytes(a.height, a.width, a.B);
    const auto ints = reinterpret_cast<int32_t*>(static_cast<char*>(a.workspace) + before);
    const int64_t source = vertical ? a.source_h : a.source_w, m = vertical ? a.height : a.width;
    int32_t* weight = ints + i * (down + across) + (vertical ? 0 : down);
    int32_t* first = weight + most_taps(source, m) * m;
    return {weight, first, first + m};
}

}  // namespace
