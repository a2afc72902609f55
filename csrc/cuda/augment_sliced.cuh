// Images of any size and strides, read where they lie: a block makes a slice of one. Contrast needs a mean of the whole
// image, so a kernel before sums the gray values that it will see, in at most MOST_PARTS blocks an image.
#pragma once

#include "augment_quads.cuh"

namespace {

constexpr int SLICED_THREADS = 256, SLICED_BLOCKS = 4;  // blocks that a multiprocessor must have registers for
constexpr uint32_t SLICE = 2 * SLICED_THREADS;          // quads of a block
constexpr uint32_t PART = 8 * SLICED_THREADS;           // quads of a block that sums, at least

inline __host__ __device__ uint32_t slices_of(const Args& a) { return ceil_div(quads_of(a), SLICE); }

inline __host__ __device__ uint32_t parts_of(const Args& a) {
    return clamp(ceil_div(quads_of(a), PART), 1u, uint32_t(MOST_PARTS));
}

__global__ void __launch_bounds__(SLICED_THREADS) augment_gray_kernel(const Args a) {
    __shared__ Row row;
    const uint32_t parts = parts_of(a), i = blockIdx.x / parts, part = blockIdx.x % parts;
    if (threadIdx.x == 0) load_row(a, i, row);
    __syncthreads();
    if (row.contrast < 0) return;
    const uint32_t quads = quads_of(a), each = ceil_div(quads, parts), first = part * each;
    const uint32_t last = first + each < quads ? first + each : quads;
    const int64_t sum = block_sum(sum_grays<int64_t>(a, row, row.image, first, last));
    if (threadIdx.x == 0) sums_of(a, i)[part] = sum;
}

template <int DTYPE>
__global__ void __launch_bounds__(SLICED_THREADS, SLICED_BLOCKS) augment_sliced_kernel(const Args a) {
    __shared__ Work work;
    const uint32_t slices = slices_of(a), i = blockIdx.x / slices, slice = blockIdx.x % slices;
    load_work(a, i, work);
    if (threadIdx.x < 2 && work.row[threadIdx.x].contrast >= 0) {  // whoever has loaded the row
        Row& row = work.row[threadIdx.x];
        const int64_t* sums = sums_of(a, threadIdx.x ? clamp(a.partner[i], int64_t(0), a.B - 1) : i);
        int64_t sum = 0;
        for (uint32_t part = 0; part < parts_of(a); ++part) sum += sums[part];
        row.base = contrast_base(sum, int64_t(a.height) * a.width, row.factor[row.contrast]);
    }
    __syncthreads();
    const uint32_t first = slice * SLICE, quads = quads_of(a), last = first + SLICE < quads ? first + SLICE : quads;
    make_quads<DTYPE, int64_t>(a, work, work.row[0].image, work.row[1].image, i, first, last);
    if (slice == 0) write_targets(a, work, i);
}

template <int DTYPE>
void make_sliced(const Args& a, cudaStream_t stream) {
    launch(augment_gray_kernel, a.B * parts_of(a), SLICED_THREADS, 0, stream, a);
    launch(augment_sliced_kernel<DTYPE>, a.B * slices_of(a), SLICED_THREADS, 0, stream, a);
}

}  // namespace
