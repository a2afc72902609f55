// Rows of erased pixels: Philox and Box-Muller, a vector of pixels at a time. The numbers are augment::noise's.
#pragma once

#include <algorithm>

#include "augment.h"
#include "simd.h"  // the intrinsics

namespace {

using namespace augment;

constexpr int kLanes = 16;  // boxes are narrow: rounding their rows up to whole vectors beats a scalar rest

// Wide holds 64-bit lanes of which only the low halves count: what the processors' 32 x 32 -> 64 bit product reads.
// Compilers make three times slower 64-bit products of the plain expression.
#if defined(__AVX512F__)
typedef uint64_t Wide __attribute__((vector_size(64)));
AUGMENT_FN Wide multiply(Wide a, uint32_t m) { return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m)); }
#elif defined(__AVX2__)
typedef uint64_t Wide __attribute__((vector_size(32)));
AUGMENT_FN Wide multiply(Wide a, uint32_t m) { return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m)); }
#else
typedef uint64_t Wide __attribute__((vector_size(16)));
AUGMENT_FN Wide multiply(Wide a, uint32_t m) { return (a & 0xffffffffull) * uint64_t(m); }
#endif

// Words 0 to 3 of augment::philox for pixels first .. first + kLanes - 1.
inline void philox_row(uint32_t first, uint32_t key_low, uint32_t key_high, uint32_t words[4][kLanes]) {
    static constexpr uint64_t lanes[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    constexpr int n = sizeof(Wide) / 8;
    typedef uint32_t Narrow __attribute__((vector_size(4 * n)));
    for (int from = 0; from < kLanes; from += n) {
        Wide c[4] = {};
        memcpy(&c[0], lanes + from, sizeof(Wide));
        c[0] += uint64_t(first);
        uint32_t k0 = key_low, k1 = key_high;
        for (int round = 0; round < 10; ++round) {
            const Wide p0 = multiply(c[0], kPhiloxM0), p1 = multiply(c[2], kPhiloxM1);
            c[0] = (p1 >> 32) ^ c[1] ^ uint64_t(k0);
            c[1] = p1;
            c[2] = (p0 >> 32) ^ c[3] ^ uint64_t(k1);
            c[3] = p0;
            k0 += kPhiloxW0;
            k1 += kPhiloxW1;
        }
        for (int word = 0; word < 4; ++word) {
            const Narrow low = __builtin_convertvector(c[word], Narrow);
            memcpy(words[word] + from, &low, sizeof low);
        }
    }
}

// Fills w pixels from (y, x) of the strip's planes with noise; touches, unchanged, up to kLanes - 1 floats more.
inline void erase_row(const Args& a, int64_t i, float* red, float* green, float* blue, int32_t y, int32_t x,
                      int32_t w) {
    const uint64_t key = uint64_t(a.noise_key[i]);
    const uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
    for (int32_t from = 0; from < w; from += kLanes) {
        const int32_t n = std::min(w - from, int32_t(kLanes));
        float radius[2][kLanes], cosine[2][kLanes], sine[2][kLanes];
        uint32_t words[4][kLanes];
        philox_row(uint32_t(y) * uint32_t(a.width) + uint32_t(x + from), low, high, words);
        for (int pair = 0; pair < 2; ++pair) {  // small loops: GCC gives up on larger ones
#pragma omp simd
            for (int k = 0; k < kLanes; ++k) radius[pair][k] = noise_radius(words[2 * pair][k]);
#pragma omp simd
            for (int k = 0; k < kLanes; ++k) noise_angle(words[2 * pair + 1][k], cosine[pair][k], sine[pair][k]);
        }
#pragma omp simd
        for (int k = 0; k < kLanes; ++k) {  // whole vectors again: lanes beyond the box write what they read
            red[from + k] = k < n ? radius[0][k] * cosine[0][k] : red[from + k];
            green[from + k] = k < n ? radius[0][k] * sine[0][k] : green[from + k];
            blue[from + k] = k < n ? radius[1][k] * cosine[1][k] : blue[from + k];
        }
    }
}

}  // namespace
