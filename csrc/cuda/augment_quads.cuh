// Four neighbouring pixels of an output row, which one thread makes at a time: read, colored, normalised, erased,
// mixed, and stored as vectors. The branches are the same for all threads of a block, but for those on boxes.
#pragma once

#include "augment_rows.cuh"

namespace {

constexpr int QUAD = 4;

// Quads are counted along the output's rows; the last of a row may be cut short.
inline __host__ __device__ uint32_t quads_of_row(const Args& a) { return ceil_div(uint32_t(a.width), uint32_t(QUAD)); }

inline __host__ __device__ uint32_t quads_of(const Args& a) { return uint32_t(a.height) * quads_of_row(a); }

struct Quad {
    int32_t c[3][QUAD];  // 0 to 255
};

// The bytes at places x to x + 3 of a line of whole, aligned words; 0 outside of it.
__device__ uint32_t four_bytes(const uint8_t* line, int32_t x, int32_t width) {
    const int32_t first = x & ~3, last = (x + 3) & ~3;  // the words that hold them, one where x is aligned
    const auto word = [&](int32_t at) {
        return uint32_t(at) < uint32_t(width) ? *reinterpret_cast<const uint32_t*>(line + at) : 0u;
    };
    return __funnelshift_r(word(first), word(last), 8 * (uint32_t(x) & 3u));
}

// Pixels (y, x) to (y, x + 3) after crop and flip; 0 in the padding. `pixels` is row.image, whose offsets have 64 bits,
// or its copy in shared memory, where 32 do.
template <class Offset>
__device__ Quad read_quad(const Args& a, const Row& row, const uint8_t* pixels, int32_t y, int32_t x) {
    Quad quad = {};
    int32_t source_y = row.from_y + row.step_y * y;
    const int32_t from_x = row.from_x + row.step_x * x;
    if (a.reflect) source_y = reflected(source_y, row.source_h);
    if (uint32_t(source_y) >= uint32_t(row.source_h)) return quad;
    const auto stride_c = Offset(row.stride_c), stride_x = Offset(row.stride_x);
    const uint8_t* line = pixels + Offset(source_y) * Offset(row.stride_y);
    if (row.words && !a.reflect) {
#pragma unroll
        for (int c = 0; c < 3; ++c, line += stride_c) {
            const bool ahead = row.step_x > 0;
            const uint32_t bytes = four_bytes(line, ahead ? from_x : from_x - (QUAD - 1), row.source_w);
            const uint32_t turned = ahead ? bytes : __byte_perm(bytes, 0, 0x0123);
            for (int k = 0; k < QUAD; ++k) quad.c[c][k] = int32_t(turned >> 8 * k & 255);
        }
        return quad;
    }
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
        int32_t source_x = from_x + row.step_x * k;
        if (a.reflect) source_x = reflected(source_x, row.source_w);
        if (uint32_t(source_x) >= uint32_t(row.source_w)) continue;
        const uint8_t* at = line + Offset(source_x) * stride_x;
        for (int c = 0; c < 3; ++c) quad.c[c][k] = at[c * stride_c];
    }
    return quad;
}

// Applies the first `steps` color operations.
__device__ void color_quad(const Row& row, int steps, Quad& quad) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const int32_t kind = row.kind[step], factor = row.factor[step];
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            int32_t &red = quad.c[0][k], &green = quad.c[1][k], &blue = quad.c[2][k];
            if (kind == kHue) {
                turn_hue(factor, red, green, blue);
                continue;
            }
            int32_t base = kind == kContrast ? row.base : 0;
            if (kind == kSaturation) base = saturation_base(gray(red, green, blue), factor);
            red = blend(red, factor, base), green = blend(green, factor, base), blue = blend(blue, factor, base);
        }
    }
}

// The sum of the gray values that contrast sees in an output image's quads first + threadIdx.x, + blockDim.x, ... below
// last.
template <class Offset>
__device__ int64_t sum_grays(const Args& a, const Row& row, const uint8_t* pixels, uint32_t first, uint32_t last) {
    const uint32_t row_quads = quads_of_row(a);
    int64_t sum = 0;
    for (uint32_t q = first + threadIdx.x; q < last; q += blockDim.x) {
        const auto y = int32_t(q / row_quads), x = int32_t(q % row_quads) * QUAD;
        Quad quad = read_quad<Offset>(a, row, pixels, y, x);
        color_quad(row, row.contrast, quad);
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            if (x + k < a.width) sum += gray(quad.c[0][k], quad.c[1][k], quad.c[2][k]);
        }
    }
    return sum;
}

// The block's sum of x, in every thread; at most 1,024 threads, whole warps. Between two calls lies a barrier.
__device__ int64_t block_sum(int64_t x) {
    __shared__ int64_t partial[32];
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) x += partial[warp];
    return x;
}

// Pixels (y, x) to (y, x + 3) of one row of the plan, normalised and erased.
template <class Offset>
__device__ void make_quad(const Args& a, const Row& row, const uint8_t* pixels, int32_t y, int32_t x,
                          float (&value)[3][QUAD]) {
    Quad quad = read_quad<Offset>(a, row, pixels, y, x);
    color_quad(row, row.steps, quad);
    if (row.grayscale) {
#pragma unroll
        for (int k = 0; k < QUAD; ++k) {
            quad.c[0][k] = quad.c[1][k] = quad.c[2][k] = gray(quad.c[0][k], quad.c[1][k], quad.c[2][k]);
        }
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        for (int k = 0; k < QUAD; ++k) value[c][k] = normalise(quad.c[c][k], a.scale[c], a.bias[c]);
    }
    if (!row.erases) return;
    int32_t box[QUAD] = {-1, -1, -1, -1};
    for (int32_t r = 0; r < int32_t(a.R); ++r) {  // the last one counts
#pragma unroll
        for (int k = 0; k < QUAD; ++k) box[k] = in_box(row.erase + 4 * r, y, x + k) ? r : box[k];
    }
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
        if (box[k] < 0) continue;
        value[0][k] = value[1][k] = value[2][k] = 0.0f;
        if (a.remode == kConst) continue;
        const uint32_t pixel = uint32_t(y) * uint32_t(a.width) + uint32_t(x + k);
        noise(a.remode == kRand ? uint32_t(box[k]) : pixel, row.key_low, row.key_high, value[0][k], value[1][k],
              value[2][k]);
    }
}

// The same of the output: the image's own row mixed with its partner's.
template <class Offset>
__device__ void mix_quad(const Args& a, const Work& work, const uint8_t* own, const uint8_t* partner, int32_t y,
                         int32_t x, float (&value)[3][QUAD]) {
    bool inside[QUAD], any = false, all = true;
#pragma unroll
    for (int k = 0; k < QUAD; ++k) {
        inside[k] = work.cuts && in_box(work.cut, y, x + k);
        any |= inside[k], all &= inside[k];
    }
#pragma unroll 1
    for (int who = all; who <= int(work.mixes || any); ++who) {
        float made[3][QUAD];
        make_quad<Offset>(a, work.row[who], who ? partner : own, y, x, made);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            for (int k = 0; k < QUAD; ++k) {
                if (who == 0 || inside[k]) value[c][k] = made[c][k];
                else if (work.mixes) value[c][k] = mix(value[c][k], made[c][k], work.lam);
            }
        }
    }
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

// Stores pixels (y, x) to (y, x + 3), or to the row's end, of output image i: 8 or 16 bytes at once where all rows are
// whole, aligned quads.
template <int DTYPE>
__device__ void store_quad(const Args& a, int64_t i, int32_t y, int32_t x, const float (&value)[3][QUAD]) {
    using T = typename Output<DTYPE>::type;
    struct alignas(QUAD * sizeof(T)) Vector {
        T element[QUAD];
    };
    const uint32_t area = uint32_t(a.height) * uint32_t(a.width), pixel = uint32_t(y) * uint32_t(a.width) + uint32_t(x);
    T* image = static_cast<T*>(a.out) + 3 * i * int64_t(area);
    const bool vectors = a.width % QUAD == 0 && reinterpret_cast<uintptr_t>(a.out) % sizeof(Vector) == 0;
    const int count = a.width - x < QUAD ? a.width - x : QUAD;
#pragma unroll
    for (int part = 0; part < 3; ++part) {  // a channel, or the part'th vector of neighbours with their channels
        Vector vector;
        T* to = image + (a.channels_last ? 3 * int64_t(pixel) + QUAD * part : int64_t(part) * area + pixel);
#pragma unroll
        for (int e = 0; e < QUAD; ++e) {
            const int place = QUAD * part + e;
            vector.element[e] = Output<DTYPE>::from(a.channels_last ? value[place % 3][place / 3] : value[part][e]);
        }
        if (vectors) {
            *reinterpret_cast<Vector*>(to) = vector;
            continue;
        }
#pragma unroll
        for (int e = 0; e < QUAD; ++e) {
            if (a.channels_last ? QUAD * part + e < 3 * count : e < count) to[e] = vector.element[e];
        }
    }
}

// Makes the quads first + threadIdx.x, + blockDim.x, ... below last of output image i.
template <int DTYPE, class Offset>
__device__ void make_quads(const Args& a, const Work& work, const uint8_t* own, const uint8_t* partner, int64_t i,
                           uint32_t first, uint32_t last) {
    const uint32_t row_quads = quads_of_row(a);
    for (uint32_t q = first + threadIdx.x; q < last; q += blockDim.x) {
        const auto y = int32_t(q / row_quads), x = int32_t(q % row_quads) * QUAD;
        float value[3][QUAD];
        mix_quad<Offset>(a, work, own, partner, y, x, value);
        store_quad<DTYPE>(a, i, y, x, value);
    }
}

}  // namespace
