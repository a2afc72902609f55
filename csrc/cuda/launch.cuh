// Small things that every kernel of this module uses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "augment.h"

namespace {

using namespace augment;

template <class T>
__host__ __device__ constexpr T clamp(T x, T low, T high) {
    return x < low ? low : x > high ? high : x;
}

template <class T>
__host__ __device__ constexpr T ceil_div(T x, T y) {
    return (x + y - 1) / y;
}

// Starts a kernel on a grid of one dimension; cudaGetLastError knows what came of it.
inline void launch(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
                   const Args& a) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = stream;
    cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace
