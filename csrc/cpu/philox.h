// Philox4x32-10 on vectors, and the dropout multipliers drawn from it: bit-equal to deit_fast/reference/philox.py.
//
// Element i of a mask is word i % 4 of the counter (i / 4, site) under the key `seed`; it is kept iff the word is at
// least round(p 2^32). One call draws 4 LANES consecutive elements.
//
// A counter's four words lie in the low halves of four vectors of 64-bit lanes, because that is where the processor
// takes factors from and leaves a product's low half: the high halves hold what is left over, and nothing needs to be
// moved but a product's high half down. A round is 8 instructions for LANES / 2 counters (6 on AVX-512, which joins two
// xors). With W = LANES / 2, lane l holds counter l / 2 + l % 2 * W / 2, so that lane_pairs leaves all words in order.
#pragma once

#include "simd.h"

namespace deit {

struct Dropout {
    uint64_t seed;
    uint32_t threshold;  // round(p 2^32)
    float scale;         // 1 / (1 - p); 0 where p rounds to 1 and nothing is kept
    bool on;             // p > 0
};

inline Dropout make_dropout(double p, int64_t seed) {
    const double words = __builtin_nearbyint(p * 4294967296.0);
    const bool all = words >= 4294967296.0;
    return {uint64_t(seed), all ? 0u : uint32_t(words), all ? 0.0f : float(1.0 / (1.0 - p)), p > 0.0};
}

constexpr int PHILOX_WORDS = 4 * LANES;  // elements that one call draws

typedef uint64_t WideVec __attribute__((vector_size(4 * LANES)));
constexpr int WIDE_LANES = LANES / 2;

// The product of the low half of each lane and m.
inline WideVec multiply_low(WideVec a, uint32_t m) {
#if defined(__AVX512F__)
    return (WideVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (WideVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
    return (a & 0xffffffffu) * m;
#endif
}

// Lanes whose low halves are those of `low`, and whose high halves are the low ones of `high`.
inline WideVec join(WideVec low, WideVec high) {
#if defined(__AVX512F__)
    return (WideVec)_mm512_mask_shuffle_epi32((__m512i)low, 0xAAAA, (__m512i)high, _MM_PERM_CCAA);
#elif defined(__AVX2__)
    return (WideVec)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xAA);
#else
    return (low & 0xffffffffu) | (high << 32);
#endif
}

// The even (or, from 1, the odd) lanes of a, each followed by the same lane of b.
template <int FROM> inline UVec lane_pairs(WideVec a, WideVec b) {
#if defined(__AVX512F__)
    return (UVec)(FROM ? _mm512_unpackhi_epi64((__m512i)a, (__m512i)b) : _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
    return (UVec)(FROM ? _mm256_unpackhi_epi64((__m256i)a, (__m256i)b) : _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
#else
    return (UVec)WideVec{a[FROM], b[FROM]};
#endif
}

// The words of elements 4 block .. 4 block + PHILOX_WORDS - 1, in order: words[v] holds LANES of them.
inline void philox(uint64_t block, uint32_t site, uint64_t seed, UVec words[4]) {
    uint64_t offset[WIDE_LANES];
    for (int i = 0; i < WIDE_LANES; ++i) offset[i] = i / 2 + i % 2 * (WIDE_LANES / 2);
    WideVec first;
    std::memcpy(&first, offset, sizeof first);
    WideVec c0[2], c1[2], c2[2], c3[2];  // two sets of counters, in which the processor works at the same time
    for (int s = 0; s < 2; ++s) {
        c0[s] = first + (block + s * WIDE_LANES), c1[s] = c0[s] >> 32;
        c2[s] = WideVec{} + site, c3[s] = WideVec{};
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        for (int s = 0; s < 2; ++s) {
            const WideVec product0 = multiply_low(c0[s], 0xD2511F53u), product1 = multiply_low(c2[s], 0xCD9E8D57u);
            c0[s] = (product1 >> 32) ^ (c1[s] ^ uint64_t(k0)), c1[s] = product1;
            c2[s] = (product0 >> 32) ^ (c3[s] ^ uint64_t(k1)), c3[s] = product0;
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int s = 0; s < 2; ++s) {
        const WideVec front = join(c0[s], c1[s]), back = join(c2[s], c3[s]);
        words[2 * s] = lane_pairs<0>(front, back), words[2 * s + 1] = lane_pairs<1>(front, back);
    }
}

// What dropout multiplies an element by, given its word: scale or 0.
inline Vec multiplier(const Dropout& drop, UVec word) {
    return word >= drop.threshold ? set1(drop.scale) : set1(0.0f);
}

// The multipliers of elements first .. first + n - 1, returned as a pointer into `room`, which holds at least
// n + 2 PHILOX_WORDS floats. The elements beyond n up to the next vector may be read.
inline const float* dropout_row(const Dropout& drop, uint32_t site, uint64_t first, long n, float* room) {
    const long skip = long(first % 4);
    for (long i = 0; i < n + skip; i += PHILOX_WORDS) {
        UVec words[4];
        philox((first - skip + i) / 4, site, drop.seed, words);
        for (int v = 0; v < 4; ++v) store(room + i + v * LANES, multiplier(drop, words[v]));
    }
    return room + skip;
}

}  // namespace deit
