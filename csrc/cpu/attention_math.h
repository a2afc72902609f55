// What attention needs beyond simd.h: 2^x and log2, transpositions in registers, dropout masks as bits.
#pragma once

#include <algorithm>

#include "philox.h"
#include "simd.h"

namespace deit {

// 2^x for x up to about 0 (a softmax weight), within 2.4 ulp; exactly 1 at 0; 0 or about 1e-38 far below. x = n + f
// with f in [0, 1); 2^f is a minimax polynomial of degree 5 with relative error 8e-8. 8 instructions on AVX-512, whose
// scalef takes the floor and underflows by itself. A NaN stays one.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
    const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#else
    x = max(set1(-126.0f), x);
    const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    const Vec shifted = (x - 0.5f) + magic;
    const Vec f = x - (shifted - magic);
#endif
    Vec p = fma(set1(1.86713011e-3f), f, set1(9.01703022e-3f));
    p = fma(p, f, set1(5.57999132e-2f));
    p = fma(p, f, set1(2.4016445e-1f));
    p = fma(p, f, set1(6.93151312e-1f));
    p = fma(p, f, set1(1.0f));
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return as_float(as_int(p) + (as_int(shifted) << 23));  // the shift drops magic's own bits
#endif
}

// log2(x) for normal x > 0: x = m 2^e with m in [0.7, 1.4), and the series of 2 atanh(s), s = (m - 1) / (m + 1), |s| <
// 0.18. NaN for NaN and infinity, whose bits are not of that form: x - x tells them.
inline Vec log2(Vec x) {
    const IVec e = (as_int(x) - 0x3f3504f3) >> 23;  // the constant is sqrt(1/2)
    const Vec m = as_float(as_int(x) - (e << 23));
    const Vec s = (m - 1.0f) / (m + 1.0f), u = s * s;
    Vec p = fma(set1(0.3205989f), u, set1(0.41219859f));  // 2 / ln 2 times 1/9, 1/7, 1/5, 1/3, 1
    p = fma(p, u, set1(0.57707802f));
    p = fma(p, u, set1(0.96179669f));
    p = fma(p, u, set1(2.8853901f));
    return fma(p, s, __builtin_convertvector(e, Vec) + (x - x));
}

// ---- Transpositions. Elements of C vectors, read as one sequence, are numbered (row, column) for C columns; taking
// the even ones before the odd ones moves the number's lowest bit to the top, so log2(C) such steps make it (column,
// row).

// The even (or, from 1, the odd) elements of a and b.
template <int FROM> inline Vec every_other(Vec a, Vec b) {
#if defined(__AVX512F__)
    const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return (Vec)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(from, _mm512_set1_epi32(FROM)), (__m512)b);
#elif defined(__AVX2__)
    const __m256 halves = _mm256_shuffle_ps((__m256)a, (__m256)b, FROM ? 0xDD : 0x88);
    return (Vec)_mm256_permute4x64_pd((__m256d)halves, 0xD8);
#else
    return FROM ? Vec{a[1], a[3], b[1], b[3]} : Vec{a[0], a[2], b[0], b[2]};
#endif
}

// The first (or, from 1, the second) half of a0 b0 a1 b1 ...
template <int FROM> inline Vec interleave(Vec a, Vec b) {
#if defined(__AVX512F__)
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return (Vec)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(from, _mm512_set1_epi32(8 * FROM)), (__m512)b);
#elif defined(__AVX2__)
    const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    return (Vec)(FROM ? _mm256_permute2f128_ps(low, high, 0x31) : _mm256_permute2f128_ps(low, high, 0x20));
#else
    return FROM ? Vec{a[2], b[2], a[3], b[3]} : Vec{a[0], b[0], a[1], b[1]};
#endif
}

// (LANES, C) -> (C, LANES)
template <int C> inline void columns_to_rows(Vec (&v)[C]) {
    Vec t[C];
#pragma GCC unroll 4
    for (int step = 1; step < C; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < C / 2; ++i) {
            t[i] = every_other<0>(v[2 * i], v[2 * i + 1]);
            t[i + C / 2] = every_other<1>(v[2 * i], v[2 * i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < C; ++i) v[i] = t[i];
    }
}

// (C, LANES) -> (LANES, C)
template <int C> inline void rows_to_columns(Vec (&v)[C]) {
    Vec t[C];
#pragma GCC unroll 4
    for (int step = 1; step < C; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < C / 2; ++i) {
            t[2 * i] = interleave<0>(v[i], v[i + C / 2]);
            t[2 * i + 1] = interleave<1>(v[i], v[i + C / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < C; ++i) v[i] = t[i];
    }
}

// ---- Dropout of a block of rows of an (N, N) matrix whose tile holds it transposed, (N keys, queries in the lanes).

// One bit per element of the mask, in the order of the logical tensor: room for `elements` of them.
inline long mask_bytes(long elements) { return elements / 8 + PHILOX_WORDS + 8; }

struct Mask {
    uint8_t* bits;
    long skip;  // the stream starts at a multiple of 4; the block's first element is this bit

    // Draws elements first .. first + n - 1. Philox costs about as much as the rest of a forward pass.
    void draw(const Dropout& drop, uint32_t site, uint64_t first, long n) {
        skip = long(first % 4);
        for (long i = 0; i < n + skip; i += PHILOX_WORDS) {
            UVec words[4];
            philox((first - skip + i) / 4, site, drop.seed, words);
            uint64_t kept = 0;
            for (int v = 0; v < 4; ++v) kept |= kept_lanes(words[v], drop.threshold) << (v * LANES);
            std::memcpy(bits + i / 8, &kept, PHILOX_WORDS / 8);
        }
    }

    static uint64_t kept_lanes(UVec word, uint32_t threshold) {
#if defined(__AVX512F__)
        return _mm512_cmpge_epu32_mask((__m512i)word, _mm512_set1_epi32(int(threshold)));
#elif defined(__AVX2__)
        return uint32_t(_mm256_movemask_ps((__m256)(word >= threshold)));
#else
        uint64_t kept = 0;
        for (int i = 0; i < LANES; ++i) kept |= uint64_t(word[i] >= threshold) << i;
        return kept;
#endif
    }

    // Multiplies a tile (N, vecs * LANES), rows `pitch` apart, by scale or 0. A lane's row of the mask is read 32 bits
    // at a time.
    void apply(float* tile, long pitch, long N, long vecs, float scale) const {
        for (long v = 0; v < vecs; ++v)
            for (long j0 = 0; j0 < N; j0 += 32) {
                uint32_t window[LANES];
                for (int lane = 0; lane < LANES; ++lane) {
                    const long bit = skip + (v * LANES + lane) * N + j0;
                    uint64_t word;
                    std::memcpy(&word, bits + bit / 8, 8);
                    window[lane] = uint32_t(word >> (bit % 8));
                }
                UVec keep;
                std::memcpy(&keep, window, sizeof keep);
                for (long j = j0; j < std::min(N, j0 + 32); ++j) {
                    float* p = tile + j * pitch + v * LANES;
                    store(p, (keep & (1u << (j - j0))) != 0 ? load(p) * scale : Vec{});
                }
            }
    }

    // The same for one row of the mask and its keys in the lanes.
    void apply_row(float* row, long i, long N, float scale) const {
        uint32_t bit[LANES];
        for (int lane = 0; lane < LANES; ++lane) bit[lane] = 1u << lane;
        UVec lanes;
        std::memcpy(&lanes, bit, sizeof lanes);
        for (long j = 0; j < N; j += LANES) {
            const long at = skip + i * N + j;
            uint32_t word;
            std::memcpy(&word, bits + at / 8, 4);
            store(row + j, (lanes & (word >> (at % 8))) != 0 ? load(row + j) * scale : Vec{});
        }
    }
};

}  // namespace deit
