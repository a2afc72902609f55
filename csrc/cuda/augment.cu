// Augmentation of a batch on a GPU: one block makes one output image, every thread the pixels p, p + blockDim.x, ...
//
// A pixel is computed straight from the uint8 source: crop and flip are an address, the color operations are functions
// of the pixel once contrast's mean is known, and the mixing partner is the same computation for another row of the
// plan. Rows that are resized are made first, by resize.cuh's two kernels, as uint8 tiles that then serve as source.
// Only an image whose contrast changes is read twice: the block first sums the gray values of what contrast will see.
// Values are clamped into range, never checked, so that nothing waits for the GPU; the arithmetic is augment.h's, as on
// the CPU.
#include <cuda_runtime.h>

#include "augment.h"
#include "resize.cuh"

namespace {

using namespace augment;

constexpr int THREADS = 256;

// One row of the plan, ready for any of its pixels. STEPS color operations: 4 where the hue changes, else 3.
template <int STEPS>
struct Row {
    const uint8_t* image;
    int64_t stride_c, stride_y, stride_x;
    int32_t source_h, source_w, crop_y, crop_x, flip, vflip, grayscale;
    int32_t kind[STEPS], factor[STEPS], base[STEPS];  // in order; base is unused by saturation and hue
    const int32_t* erase;
    uint32_t key_low, key_high;
};

template <int STEPS>
__device__ Row<STEPS> load_row(const Args& a, int64_t i) {
    Row<STEPS> row;
    if (resizes(a, i)) {
        row = {tile_of(a, i), int64_t(a.height) * a.width, a.width, 1, a.height, a.width};
    } else {
        row = {a.images + clamp(a.index[i], int64_t(0), a.M - 1) * a.stride_m, a.stride_c, a.stride_y, a.stride_x,
               a.source_h, a.source_w};
        row.crop_y = clamp(a.crop[2 * i], -a.height, a.source_h);
        row.crop_x = clamp(a.crop[2 * i + 1], -a.width, a.source_w);
        row.flip = a.flip[i], row.vflip = a.vflip[i];
    }
    row.grayscale = a.grayscale[i];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int32_t kind = clamp(int32_t(a.jitter_order[STEPS * i + step]), 0, STEPS - 1);
        const int32_t factor = a.jitter[STEPS * i + kind];
        row.kind[step] = kind;
        row.factor[step] = kind == kHue ? clamp(factor, -kMaxShift, kMaxShift) : clamp(factor, 0, kMaxFactor);
        row.base[step] = 0;
    }
    row.erase = a.erase + 4 * a.R * i;
    row.key_low = uint32_t(uint64_t(a.noise_key[i]));
    row.key_high = uint32_t(uint64_t(a.noise_key[i]) >> 32);
    return row;
}

struct Color {
    uint8_t c[3];
};

// Pixel (y, x) after crop, flip and the first `steps` color operations.
template <int STEPS>
__device__ Color color(const Args& a, const Row<STEPS>& row, int32_t y, int32_t x, int steps) {
    int32_t source_y = (row.vflip ? a.height - 1 - y : y) + row.crop_y;
    int32_t source_x = (row.flip ? a.width - 1 - x : x) + row.crop_x;
    if (a.reflect) source_y = reflected(source_y, row.source_h), source_x = reflected(source_x, row.source_w);
    Color v = {};
    if (source_y >= 0 && source_y < row.source_h && source_x >= 0 && source_x < row.source_w) {
        const uint8_t* at = row.image + source_y * row.stride_y + source_x * row.stride_x;
        for (int c = 0; c < 3; ++c) v.c[c] = at[c * row.stride_c];
    }
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int32_t kind = row.kind[step], factor = row.factor[step];
        if (step >= steps || factor == (kind == kHue ? 0 : kOne)) continue;
        if (STEPS > kHue && kind == kHue) {
            turn_hue(factor, v.c[0], v.c[1], v.c[2]);
            continue;
        }
        int32_t base = row.base[step];
        if (kind == kSaturation) base = saturation_base(gray(v.c[0], v.c[1], v.c[2]), factor);
        for (int c = 0; c < 3; ++c) v.c[c] = blend(v.c[c], factor, base);
    }
    if (steps == STEPS && row.grayscale) v.c[0] = v.c[1] = v.c[2] = uint8_t(gray(v.c[0], v.c[1], v.c[2]));
    return v;
}

// The block's sum of x, in every thread.
__device__ int64_t block_sum(int64_t x) {
    __shared__ int64_t partial[THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
    __syncthreads();  // the last call's readers are done
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < THREADS / 32; ++warp) x += partial[warp];
    return x;
}

// Fills in contrast's base; all threads of the block must call it. A plan in range has one contrast step.
template <int STEPS>
__device__ void find_contrast(const Args& a, Row<STEPS>& row) {
    const int64_t area = int64_t(a.height) * a.width;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        if (row.kind[step] != kContrast || row.factor[step] == kOne) continue;  // the same for the whole block
        int64_t sum = 0;
        for (int64_t p = threadIdx.x; p < area; p += THREADS) {
            const Color v = color(a, row, int32_t(p / a.width), int32_t(p % a.width), step);
            sum += gray(v.c[0], v.c[1], v.c[2]);
        }
        row.base[step] = contrast_base(block_sum(sum), area, row.factor[step]);
    }
}

// Normalised and erased channels of pixel (y, x).
template <int STEPS>
__device__ void pixel(const Args& a, const Row<STEPS>& row, int32_t y, int32_t x, float* value) {
    int64_t box = -1;
    for (int64_t r = 0; r < a.R; ++r) box = in_box(row.erase + 4 * r, y, x) ? r : box;  // the last one counts
    if (box >= 0) {
        value[0] = value[1] = value[2] = 0.0f;
        if (a.remode != kConst) {
            const uint32_t p = a.remode == kRand ? uint32_t(box) : uint32_t(y) * uint32_t(a.width) + uint32_t(x);
            noise(p, row.key_low, row.key_high, value[0], value[1], value[2]);
        }
        return;
    }
    const Color v = color(a, row, y, x, STEPS);
    for (int c = 0; c < 3; ++c) value[c] = normalise(v.c[c], a.scale[c], a.bias[c]);
}

template <int DTYPE>
struct Output;
template <>
struct Output<kFloat32> {
    using type = float;
    static __device__ float from(float x) { return x; }
};
template <>
struct Output<kBFloat16> {
    using type = uint16_t;
    static __device__ uint16_t from(float x) { return to_bfloat16(x); }
};
template <>
struct Output<kFloat16> {
    using type = uint16_t;
    static __device__ uint16_t from(float x) { return to_float16(x); }
};

template <int DTYPE, int STEPS>
__global__ void __launch_bounds__(THREADS) augment_fwd_kernel(const Args a) {
    using T = typename Output<DTYPE>::type;
    const int64_t i = blockIdx.x, area = int64_t(a.height) * a.width;
    const int64_t j = clamp(a.partner[i], int64_t(0), a.B - 1);
    const float lam = fminf(fmaxf(a.lam[i], 0.0f), 1.0f);
    const int32_t* cut = a.cut + 4 * i;
    const bool cuts = has_area(cut), mixes = !cuts && lam != 1.0f;
    auto own = load_row<STEPS>(a, i);
    find_contrast(a, own);
    auto other = own;
    if (cuts || mixes) {
        other = load_row<STEPS>(a, j);
        find_contrast(a, other);
    }
    T* out = static_cast<T*>(a.out) + 3 * i * area;
    for (int64_t p = threadIdx.x; p < area; p += THREADS) {
        const int32_t y = int32_t(p / a.width), x = int32_t(p % a.width);
        const bool inside = cuts && in_box(cut, y, x);
        float value[3];
        if (!inside) pixel(a, own, y, x, value);
        if (inside || mixes) {
            float partner[3];
            pixel(a, other, y, x, partner);
            for (int c = 0; c < 3; ++c) value[c] = inside ? partner[c] : mix(value[c], partner[c], lam);
        }
        for (int c = 0; c < 3; ++c) out[a.channels_last ? 3 * p + c : c * area + p] = Output<DTYPE>::from(value[c]);
    }
    const int64_t own_label = a.labels[clamp(a.index[i], int64_t(0), a.M - 1)];
    const int64_t other_label = a.labels[clamp(a.index[j], int64_t(0), a.M - 1)];
    for (int64_t k = threadIdx.x; k < a.K; k += THREADS) {
        a.targets[i * a.K + k] = mix(k == own_label ? a.on : a.off, k == other_label ? a.on : a.off, lam);
    }
}

template <int STEPS>
void launch(const Args& a, cudaStream_t stream) {
    const auto grid = unsigned(a.B);
    if (a.dtype == kFloat32) augment_fwd_kernel<kFloat32, STEPS><<<grid, THREADS, 0, stream>>>(a);
    if (a.dtype == kBFloat16) augment_fwd_kernel<kBFloat16, STEPS><<<grid, THREADS, 0, stream>>>(a);
    if (a.dtype == kFloat16) augment_fwd_kernel<kFloat16, STEPS><<<grid, THREADS, 0, stream>>>(a);
}

}  // namespace

int64_t augment_workspace(int64_t source_h, int64_t source_w, int64_t height, int64_t width, int64_t B) {
    return source_h ? resize_bytes(source_h, source_w, height, width, B) : 0;
}

int augment_fwd(const augment::Args& a, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (a.resized_crop) resize(a, on);
    if (a.J == 4) {
        launch<4>(a, on);
    } else {
        launch<3>(a, on);
    }
    return cudaGetLastError();
}
