// One head of one image: its buffers in a thread's workspace, and the parts of attention that work on them.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "attention_math.h"
#include "attention_product.h"

namespace deit {

constexpr long QUERIES = 4 * LANES;
constexpr uint32_t SITE = 0;

inline long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

// softmax(scale q k) = softmax in base 2 of (sign q) k times `base`. Q is staged times the sign alone, which is exact.
struct Logits {
    float sign, base;
};

inline Logits make_logits(double scale) {
    return {scale < 0 ? -1.0f : 1.0f, float(std::fabs(scale) * 1.4426950408889634)};
}

// A block of rows of the softmax: `live` queries of a head.
struct Queries {
    long live;
    Logits logits;
    Dropout drop;
    uint64_t first;  // linear index of the block's first element in the (B, H, N, N) mask
    float* lse;      // (live,), or null in a forward pass that saves nothing
    float scale;
};

// Buffers of one thread, carved out of the workspace. `pitch` is the floats of a staged row: D padded to whole vectors,
// or 8.
struct Head {
    long N, D, pitch;
    float *k, *v;                 // (padded N, pitch), zeros beyond N
    float *dk, *dv;               // (N, max(pitch, LANES)), sums
    float *q, *dout, *row;        // (QUERIES, pitch)
    float *qt, *doutt, *column;   // (pitch, QUERIES)
    float *s, *ds;                // (N, QUERIES), or (queries, padded N)
    Mask mask;

    long sum_pitch() const { return std::max<long>(pitch, LANES); }

    // Lays the buffers out from `base`; returns the bytes that they take.
    long lay_out(char* base, bool backward, bool dropout) {
        long used = 0;
        auto take = [&](long floats) {
            float* p = reinterpret_cast<float*>(base + used);
            used += (4 * floats + 63) / 64 * 64;
            return p;
        };
        k = take(padded(N) * pitch), v = take(padded(N) * pitch), q = take(QUERIES * pitch), row = take(QUERIES * pitch);
        qt = take(pitch * QUERIES), column = take(pitch * QUERIES), s = take(padded(N) * QUERIES);
        if (backward) {
            dk = take(N * sum_pitch()), dv = take(N * sum_pitch());
            dout = take(QUERIES * pitch), doutt = take(pitch * QUERIES), ds = take(padded(N) * QUERIES);
        }
        mask.bits = reinterpret_cast<uint8_t*>(take(dropout ? mask_bytes(QUERIES * N) / 4 + 1 : 0));
        return used;
    }
};

// NARROW: head_dim 8 beside 16 lanes. Then two rows share a vector, and O^T and dQ^T, not O and dQ, fill the lanes.
constexpr long NARROW_D = 8;
inline bool is_narrow(long D) { return LANES == 16 && D == NARROW_D; }

inline Head make_head(const Attention& call) {
    Head h{};
    h.N = call.N, h.D = call.D, h.pitch = is_narrow(call.D) ? NARROW_D : padded(call.D);
    return h;
}

// Calls part(first, depth, is it an addition) for equal parts of at most 80 keys (66 stay whole): the rounding error of
// one sum over 270 keys is 2.5 x the reference's, that of sums of parts is below it.
template <class Part> inline void in_parts(long N, Part part) {
    const long parts = (N + 79) / 80, size = (N + parts - 1) / parts;
    part(0, std::min(N, size), std::false_type());
    for (long j = size; j < N; j += size) part(j, std::min(N - j, size), std::true_type());
}

#if defined(__AVX512F__)
// Two rows of 8 in one vector: one store, which later loads of both rows can forward from (masked stores of a row each
// took as long as a tenth of the forward pass).
inline Vec load2(const float* a, const float* b) {
    return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
}
inline Vec load2(const bf16* a, const bf16* b) {
    return widen((HalfVec)_mm256_set_m128i(_mm_loadu_si128((const __m128i*)b), _mm_loadu_si128((const __m128i*)a)));
}
inline void store2(float* a, float* b, Vec v) {
    _mm256_storeu_ps(a, _mm512_castps512_ps256((__m512)v));
    _mm256_storeu_ps(b, _mm512_extractf32x8_ps((__m512)v, 1));
}
inline void store2(bf16* a, bf16* b, Vec rows) {
    const __m256i v = (__m256i)narrow(rows);
    _mm_storeu_si128((__m128i*)a, _mm256_castsi256_si128(v));
    _mm_storeu_si128((__m128i*)b, _mm256_extracti128_si256(v, 1));
}

// Elements d of both rows side by side.
inline Vec interleaved(Vec rows) {
    return interleave<0>(rows, (Vec)_mm512_shuffle_f32x4((__m512)rows, (__m512)rows, 0xEE));
}

// p[0] p[1] p[0] p[1] ...
inline Vec twice(const float* p) {
    double two;
    std::memcpy(&two, p, 8);
    return (Vec)_mm512_set1_pd(two);
}

// Two rows of 8 from two sums whose lanes 2 d and 2 d + 1 belong together.
inline Vec fold(Vec a, Vec b) { return every_other<0>(a, b) + every_other<1>(a, b); }
#else
// Only 16 lanes are too wide for 8 columns: these are never called.
Vec load2(const void*, const void*);
void store2(const void*, const void*, Vec);
Vec interleaved(Vec), twice(const float*), fold(Vec, Vec);
#endif

// What queries in the lanes and keys in the lanes share: rows of the head, as fp32 `pitch` apart.
template <bool NARROW> struct Rows {
    // Staged rows (rows, pitch) = factor * rows of T `stride` apart; zeros beyond D and up to a multiple of LANES rows.
    template <class T> static void stage(const Head& h, const T* from, long stride, long rows, float factor, float* to) {
        if constexpr (NARROW) {
            long i = 0;
            for (; i + 2 <= rows; i += 2)
                store(to + i * NARROW_D, load2(from + i * stride, from + (i + 1) * stride) * factor);
            if (i < rows) store(to + i * NARROW_D, load(from + i * stride, NARROW_D) * factor), i += 2;
            for (; i < padded(rows); i += 2) store(to + i * NARROW_D, Vec{});
        } else {
            for (long i = 0; i < rows; ++i) {
                long d = 0;
                for (; d + LANES <= h.D; d += LANES) store(to + i * h.pitch + d, load(from + i * stride + d) * factor);
                if (d < h.D) store(to + i * h.pitch + d, load(from + i * stride + d, int(h.D - d)) * factor);
            }
            std::fill(to + rows * h.pitch, to + padded(rows) * h.pitch, 0.0f);
        }
    }

    // Rows of T `stride` apart = factor * staged rows.
    template <class T> static void unstage(const Head& h, const float* from, long rows, float factor, T* to, long stride) {
        if constexpr (NARROW) {
            long i = 0;
            for (; i + 2 <= rows; i += 2)
                store2(to + i * stride, to + (i + 1) * stride, load(from + i * NARROW_D) * factor);
            if (i < rows) store(to + i * stride, load(from + i * NARROW_D) * factor, NARROW_D);
        } else {
            for (long i = 0; i < rows; ++i) {
                long d = 0;
                for (; d + LANES <= h.D; d += LANES) store(to + i * stride + d, load(from + i * h.pitch + d) * factor);
                if (d < h.D) store(to + i * stride + d, load(from + i * h.pitch + d) * factor, int(h.D - d));
            }
        }
    }

    // The same from the sums of dK or dV.
    template <class T> static void unstage_sums(const Head& h, const float* from, float factor, T* to, long stride) {
        if constexpr (NARROW) {
            long j = 0;
            for (; j + 2 <= h.N; j += 2)
                store2(to + j * stride, to + (j + 1) * stride,
                       fold(load(from + j * LANES), load(from + (j + 1) * LANES)) * factor);
            if (j < h.N) store(to + j * stride, fold(load(from + j * LANES), Vec{}) * factor, NARROW_D);
        } else {
            unstage(h, from, h.N, factor, to, stride);
        }
    }
};

}  // namespace deit
