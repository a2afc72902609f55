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

inline Logits make_logits(double scale) { return {scale < 0 ? -1.0f : 1.0f, float(std::fabs(scale) * 1.4426950408889634)}; }

// A block of rows of the softmax: `live` queries of a head.
struct Queries {
    long live;
    Logits logits;
    Dropout drop;
    uint64_t first;  // linear index of the block's first element in the (B, H, N, N) mask
    float* lse;      // (live,), or null in a forward pass that saves nothing
    float scale;
};

// Buffers of one thread, carved out of the workspace. `pitch` is the floats of a staged row: D padded to whole vectors, or 8.
struct Head {
    long N, D, pitch;
    float *k, *v;                 // (padded N, pitch), zeros beyond N
    float *dk, *dv;               // (N, max(pitch, LANES)), sums
    float *q, *dout, *row;        // (QUERIES, pitch)
    float *qt, *doutt, *column;   // (pitch, QUERIES)
    float *s, *ds;                // (N, QUERIES), or (TAIL, padded N)
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

// Calls part(first, depth, is it an addition) for every PART keys: one sum over 1,000 keys has 2.5 x the reference's error.
template <class Part> inline void in_parts(long N, Part part) {
    constexpr long PART = 256;
    part(0, std::min(N, PART), std::false_type());
    for (long j = PART; j < N; j += PART) part(j, std::min(N - j, PART), std::true_type());
}

// What queries in the lanes and keys in the lanes share: rows of the head, as fp32 `pitch` apart.
template <bool NARROW> struct Rows {
    // Staged row `to` = factor * row `from`, zero beyond D.
    template <class T> static void stage_row(const T* from, long D, float factor, float* to) {
        if (NARROW) return store(to, load(from, NARROW_D) * factor, NARROW_D);
        long d = 0;
        for (; d + LANES <= D; d += LANES) store(to + d, load(from + d) * factor);
        if (d < D) store(to + d, load(from + d, int(D - d)) * factor);
    }

    // Staged rows (rows, pitch) from rows of T `stride` apart; zeros up to a multiple of LANES rows.
    template <class T> static void stage(const Head& h, const T* from, long stride, long rows, float factor, float* to) {
        for (long i = 0; i < rows; ++i) stage_row(from + i * stride, h.D, factor, to + i * h.pitch);
        std::fill(to + rows * h.pitch, to + padded(rows) * h.pitch, 0.0f);
    }

    template <class T> static void unstage(const Head& h, const float* from, long rows, T* to, long stride) {
        for (long i = 0; i < rows; ++i, from += h.pitch, to += stride) {
            if (NARROW) {
                store(to, load(from, NARROW_D), NARROW_D);
                continue;
            }
            long d = 0;
            for (; d + LANES <= h.D; d += LANES) store(to + d, load(from + d));
            if (d < h.D) store(to + d, load(from + d, int(h.D - d)), int(h.D - d));
        }
    }

    static Vec interleaved(Vec rows) {  // two rows of 8: elements d of both side by side
        Vec upper = rows;
#if defined(__AVX512F__)
        upper = (Vec)_mm512_shuffle_f32x4((__m512)rows, (__m512)rows, 0xEE);
#endif
        return interleave<0>(rows, upper);
    }

    static Vec twice(const float* p) {  // p[0] p[1] p[0] p[1] ...
        double two;
        std::memcpy(&two, p, 8);
        typedef double Doubles __attribute__((vector_size(4 * LANES)));
        return (Vec)(two - Doubles{});
    }

    // Staged gradient rows from the sums of `scatter`, times factor.
    static void fold(const Head& h, float* sums, float factor) {
        for (long j = 0; j < h.N; j += NARROW ? 2 : 1) {
            if (NARROW) {
                const Vec a = load(sums + j * LANES), b = j + 1 < h.N ? load(sums + (j + 1) * LANES) : Vec{};
                const Vec folded = (every_other<0>(a, b) + every_other<1>(a, b)) * factor;
                store(sums + j * NARROW_D, folded);
            } else {
                for (long d = 0; d < h.pitch; d += LANES) store(sums + j * h.pitch + d, load(sums + j * h.pitch + d) * factor);
            }
        }
    }
};

}  // namespace deit
