// Small images: a block makes a whole one at a time, from pixels in shared memory, and as many blocks as fit the GPU
// take turns. While an image is made, the next one's pixels and its partner's are on their way, and the plan's rows of
// the one after.
#pragma once

#include <cuda_pipeline.h>

#include "augment_quads.cuh"

// Two images and their partners, each of staged_bytes(a).
extern __shared__ uint4 staged_pixels[];

namespace {

constexpr int STAGED_THREADS = 256, STAGED_BLOCKS = 4;  // blocks that a multiprocessor must have registers for
constexpr int64_t STAGED_BYTES = 3 * 64 * 64;           // of the largest image

__host__ __device__ inline int64_t image_bytes(int64_t height, int64_t width) { return 3 * height * width; }

// Bytes of whatever serves as a source: images, and the tiles of rows that are resized.
__host__ __device__ inline int64_t staged_bytes(const Args& a) {
    const int64_t source = image_bytes(a.source_h, a.source_w), tile = image_bytes(a.height, a.width);
    return a.resized_crop && tile > source ? tile : source;
}

// Whether images are copied whole, by vectors of 16 bytes: dense, aligned, small, and not much larger than what is made
// of them.
inline bool can_stage(const Args& a) {
    const int64_t source = image_bytes(a.source_h, a.source_w), made = image_bytes(a.height, a.width);
    const bool planes = a.stride_x == 1 && a.stride_y == a.source_w && a.stride_c == int64_t(a.source_h) * a.source_w;
    const bool pixels = a.stride_c == 1 && a.stride_x == 3 && a.stride_y == 3 * a.source_w;
    const auto bits = reinterpret_cast<uintptr_t>(a.images) | uintptr_t(a.stride_m) | uintptr_t(source);
    const bool aligned = bits % 16 == 0 && (!a.resized_crop || made % 16 == 0);
    return (planes || pixels) && aligned && source <= 2 * made && source <= STAGED_BYTES && made <= STAGED_BYTES;
}

// Begins to copy the images of `work` to `to`: half of the block its own, the other half its partner's.
__device__ void stage(const Args& a, const Work& work, uint8_t* to) {
    constexpr int HALF = STAGED_THREADS / 2;
    const int who = threadIdx.x / HALF;
    if (who && !work.partnered) return;
    const Row& row = work.row[who];
    const auto bytes = int32_t(image_bytes(row.source_h, row.source_w));
    to += who * staged_bytes(a);
    for (int32_t at = int32_t(threadIdx.x % HALF) * 16; at < bytes; at += HALF * 16) {
        __pipeline_memcpy_async(to + at, row.image + at, 16);
    }
}

// Contrast's base in both rows, by all threads of a block.
__device__ void find_contrast(const Args& a, Work& work, const uint8_t* own, const uint8_t* partner, uint32_t quads) {
    for (int who = 0; who <= work.partnered; ++who) {
        Row& row = work.row[who];
        if (row.contrast < 0) continue;  // the same for the whole block
        const int64_t sum = block_sum(sum_grays<int32_t>(a, row, who ? partner : own, 0, quads));
        if (threadIdx.x == 0) {
            row.base = contrast_base(sum, int64_t(a.height) * a.width, row.factor[row.contrast]);
        }
        __syncthreads();
    }
}

template <int DTYPE>
__global__ void __launch_bounds__(STAGED_THREADS, STAGED_BLOCKS) augment_staged_kernel(const Args a) {
    __shared__ Work ring[3];  // of the image that is made, the next, and the one after
    auto* const pixels = reinterpret_cast<uint8_t*>(staged_pixels);
    const auto bytes = int32_t(staged_bytes(a));
    const auto buffer = [=](int turn) { return pixels + turn % 2 * 2 * bytes; };
    const uint32_t quads = quads_of(a);
    const int64_t stride = gridDim.x;
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
        if (blockIdx.x + turn * stride < a.B) load_work(a, blockIdx.x + turn * stride, ring[turn]);
    }
    __syncthreads();
    stage(a, ring[0], buffer(0));
    __pipeline_commit();
    int turn = 0;
    for (int64_t i = blockIdx.x; i < a.B; i += stride, ++turn) {
        if (i + stride < a.B) stage(a, ring[(turn + 1) % 3], buffer(turn + 1));
        __pipeline_commit();
        __pipeline_wait_prior(1);
        __syncthreads();  // this image is there
        Work& work = ring[turn % 3];
        const uint8_t *own = buffer(turn), *partner = own + bytes;
        find_contrast(a, work, own, partner, quads);
        if (i + 2 * stride < a.B) load_work(a, i + 2 * stride, ring[(turn + 2) % 3]);  // one warp; the others go on
        make_quads<DTYPE, int32_t>(a, work, own, partner, i, 0, quads);
        write_targets(a, work, i);
        __syncthreads();  // nobody reads this image or its rows any more
    }
}

template <int DTYPE>
void make_staged(const Args& a, cudaStream_t stream) {
    const auto kernel = augment_staged_kernel<DTYPE>;
    const int64_t shared = 4 * staged_bytes(a);
    int device = 0, multiprocessors = 1, resident = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, STAGED_THREADS, size_t(shared));
    const int64_t blocks = int64_t(multiprocessors) * resident;
    launch(kernel, blocks < a.B ? blocks : a.B, STAGED_THREADS, shared, stream, a);
}

}  // namespace
