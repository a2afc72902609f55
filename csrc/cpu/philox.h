// Philox4x32-10 on vectors, and the dropout multipliers drawn from it: bit-equal to deit_fast/reference/philox.py.
//
// Element i of a mask is word i % 4 of the counter (i / 4, site) under the key `seed`; it is kept iff the word is at
// least round(p 2^32). One call draws 4 LANES consecutive elements. The lanes take the counters in an order that leaves
// only 4 x 4 transpositions within 128 bits: with L = LANES / 4, position q of 128-bit lane l holds counter L q + l.
// Cost on AVX-512: 12 instructions a round for 64 words, about 30 for each vector of 16 elements.
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

// The high and low halves of a * m, lane by lane.
inline void multiply(UVec a, uint32_t m, UVec& high, UVec& low) {
#if defined(__AVX512F__)
    const __m512i x = (__m512i)a, k = _mm512_set1_epi32(int(m));
    const __m512i even = _mm512_mul_epu32(x, k), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), k);
    high = (UVec)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
    low = (UVec)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
    const __m256i x = (__m256i)a, k = _mm256_set1_epi32(int(m));
    const __m256i even = _mm256_mul_epu32(x, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), k);
    high = (UVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    low = (UVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
    typedef uint64_t Wide __attribute__((vector_size(8 * LANES)));
    const Wide product = __builtin_convertvector(a, Wide) * uint64_t(m);
    high = __builtin_convertvector(product >> 32, UVec);
    low = __builtin_convertvector(product, UVec);
#endif
}

constexpr int PHILOX_WORDS = 4 * LANES;  // elements that one call draws

// The words of elements 4 block .. 4 block + PHILOX_WORDS - 1, in order: words[v] holds LANES of them.
inline void philox(uint64_t block, uint32_t site, uint64_t seed, UVec words[4]) {
    constexpr int L = LANES / 4;
    uint32_t offset[LANES];
    for (int i = 0; i < LANES; ++i) offset[i] = uint32_t(L * (i % 4) + i / 4);
    UVec c0;
    std::memcpy(&c0, offset, sizeof c0);
    c0 += uint32_t(block);
    UVec c1 = set1(uint32_t(block >> 32));
    if (uint32_t(block) > 0xffffffffu - LANES) c1 -= UVec(c0 < uint32_t(block));  // a carry; true is -1
    UVec c2 = set1(site), c3 = set1(0u);
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        UVec high0, low0, high1, low1;
        multiply(c0, 0xD2511F53u, high0, low0);
        multiply(c2, 0xCD9E8D57u, high1, low1);
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
    transpose4(words);
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
