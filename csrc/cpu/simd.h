// One vector of LANES fp32 numbers, for AVX-512 (16), AVX2 (8) and anything else (4, left to the compiler's vectors).
//
// Arithmetic is written with the compiler's own vector operators (+, *, <, ?:), so that only what they cannot say is an
// intrinsic here: fused multiply-add, masked loads, bf16 conversion. bf16 lives in memory only; registers hold fp32,
// but for the operands of `mac`, whose 32-bit words are one fp32 number or a pair of bf16.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#pragma GCC diagnostic push
// GCC 12's own headers: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace deit {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};

inline Vec set1(float x) { return x - Vec{}; }  // x - 0 is x, also for -0: the compiler makes it a broadcast
inline UVec set1(uint32_t x) { return x - UVec{}; }
inline Vec as_float(IVec x) { return (Vec)x; }
inline Vec as_float(UVec x) { return (Vec)x; }
inline IVec as_int(Vec x) { return (IVec)x; }
inline UVec as_uint(Vec x) { return (UVec)x; }

// a b + c in one rounding where the processor has it.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// 1 / a to fp32 accuracy. A 512-bit division costs 16 cycles, the 14-bit estimate and one Newton step 3 instructions.
inline Vec reciprocal(Vec a) {
#if defined(__AVX512F__)
    const Vec r = (Vec)_mm512_rcp14_ps((__m512)a);
    return r * fma(-a, r, set1(2.0f));
#else
    return 1.0f / a;
#endif
}

inline float sum(Vec a) {  // halves added pairwise: the same order on every call
    float lane[LANES];
    std::memcpy(lane, &a, sizeof a);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}

inline float max_lane(Vec a) {
    float lane[LANES];
    std::memcpy(lane, &a, sizeof a);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
    return lane[0];
}

// ---- Memory. The first n lanes only: the rest read as zero and are not written.

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec load(const float* p, int n) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#else
    Vec v{};
    std::memcpy(&v, p, 4 * n);
    return v;
#endif
}

inline void store(float* p, Vec v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
#else
    std::memcpy(p, &v, 4 * n);
#endif
}

inline Vec widen(HalfVec h) {
#if defined(__AVX512F__)
    return as_float((UVec)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif defined(__AVX2__)
    return as_float((UVec)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
    return as_float(__builtin_convertvector(h, UVec) << 16);
#endif
}

inline HalfVec narrow(Vec v) {  // round to nearest even; a NaN stays one
#if defined(__AVX512BF16__)
    return (HalfVec)_mm512_cvtneps_pbh((__m512)v);
#else
    const UVec u = as_uint(v);
    const UVec even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const UVec rounded = v == v ? even : (u >> 16) | 0x40;
#if defined(__AVX512F__)
    return (HalfVec)_mm512_cvtepi32_epi16((__m512i)rounded);
#else
    return __builtin_convertvector(rounded, HalfVec);
#endif
#endif
}

inline Vec load(const bf16* p) {
    HalfVec h;
    std::memcpy(&h, p, sizeof h);
    return widen(h);
}

inline void store(bf16* p, Vec v) {
    const HalfVec h = narrow(v);
    std::memcpy(p, &h, sizeof h);
}

inline Vec load(const bf16* p, int n) {
    HalfVec h{};
    std::memcpy(&h, p, 2 * n);
    return widen(h);
}

inline void store(bf16* p, Vec v, int n) {
    const HalfVec h = narrow(v);
    std::memcpy(p, &h, 2 * n);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// ---- Transpositions.

// In each 128-bit lane: the 4 x 4 matrix whose rows are w[0..3], transposed.
inline void transpose4(UVec w[4]) {
#if defined(__AVX512F__)
    const __m512i a = _mm512_unpacklo_epi32((__m512i)w[0], (__m512i)w[1]), b = _mm512_unpackhi_epi32((__m512i)w[0],
        (__m512i)w[1]);
    const __m512i c = _mm512_unpacklo_epi32((__m512i)w[2], (__m512i)w[3]), d = _mm512_unpackhi_epi32((__m512i)w[2],
        (__m512i)w[3]);
    w[0] = (UVec)_mm512_unpacklo_epi64(a, c), w[1] = (UVec)_mm512_unpackhi_epi64(a, c);
    w[2] = (UVec)_mm512_unpacklo_epi64(b, d), w[3] = (UVec)_mm512_unpackhi_epi64(b, d);
#elif defined(__AVX2__)
    const __m256i a = _mm256_unpacklo_epi32((__m256i)w[0], (__m256i)w[1]), b = _mm256_unpackhi_epi32((__m256i)w[0],
        (__m256i)w[1]);
    const __m256i c = _mm256_unpacklo_epi32((__m256i)w[2], (__m256i)w[3]), d = _mm256_unpackhi_epi32((__m256i)w[2],
        (__m256i)w[3]);
    w[0] = (UVec)_mm256_unpacklo_epi64(a, c), w[1] = (UVec)_mm256_unpackhi_epi64(a, c);
    w[2] = (UVec)_mm256_unpacklo_epi64(b, d), w[3] = (UVec)_mm256_unpackhi_epi64(b, d);
#else
    uint32_t from[4][4], to[4][4];
    std::memcpy(from, w, sizeof from);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) to[i][j] = from[j][i];
    std::memcpy(w, to, sizeof to);
#endif
}

// to (LANES, LANES) = from (LANES, LANES) transposed; rows are `row` words apart.
inline void transpose(const float* from, long from_row, float* to, long to_row) {
    UVec w[LANES];  // w[4 i + q], 128-bit lane l: rows 4 i .. 4 i + 3 of column 4 l + q
    for (int i = 0; i < LANES; ++i) w[i] = as_uint(load(from + i * from_row));
    for (int i = 0; i < LANES; i += 4) transpose4(w + i);
#if defined(__AVX512F__)
    for (int q = 0; q < 4; ++q) {
        const __m512i a = (__m512i)w[q], b = (__m512i)w[4 + q], c = (__m512i)w[8 + q], d = (__m512i)w[12 + q];
        const __m512i ab02 = _mm512_shuffle_i32x4(a, b, 0x88), ab13 = _mm512_shuffle_i32x4(a, b, 0xdd);
        const __m512i cd02 = _mm512_shuffle_i32x4(c, d, 0x88), cd13 = _mm512_shuffle_i32x4(c, d, 0xdd);
        store(to + q * to_row, as_float((UVec)_mm512_shuffle_i32x4(ab02, cd02, 0x88)));
        store(to + (4 + q) * to_row, as_float((UVec)_mm512_shuffle_i32x4(ab13, cd13, 0x88)));
        store(to + (8 + q) * to_row, as_float((UVec)_mm512_shuffle_i32x4(ab02, cd02, 0xdd)));
        store(to + (12 + q) * to_row, as_float((UVec)_mm512_shuffle_i32x4(ab13, cd13, 0xdd)));
    }
#elif defined(__AVX2__)
    for (int q = 0; q < 4; ++q) {
        const __m256i a = (__m256i)w[q], b = (__m256i)w[4 + q];
        store(to + q * to_row, as_float((UVec)_mm256_permute2x128_si256(a, b, 0x20)));
        store(to + (4 + q) * to_row, as_float((UVec)_mm256_permute2x128_si256(a, b, 0x31)));
    }
#else
    for (int q = 0; q < 4; ++q) store(to + q * to_row, as_float(w[q]));
#endif
}

// ---- Functions.

// e^x with 2 ulp, for x in [-87.3, 88.3]; below it is about 1e-38, above about 2e38. x = n ln 2 + r with |r| <= ln(2) /
// 2; a polynomial of degree 6 gives e^r (minimax, relative error 3e-9), and n goes into the exponent.
inline Vec exp(Vec x) {
    x = max(min(x, set1(88.3f)), set1(-87.3f));
    const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    const Vec shifted = fma(x, set1(1.44269504f), magic);
    const Vec n = shifted - magic;
    Vec r = fma(n, set1(-0.693359375f), x);  // ln 2 in two parts: the first has few bits, so that the product is exact
    r = fma(n, set1(2.12194440e-4f), r);
    Vec p = fma(set1(1.3814467e-3f), r, set1(8.3687808e-3f));
    p = fma(p, r, set1(4.1668393e-2f));
    p = fma(p, r, set1(1.6666520e-1f));
    p = fma(p, r, set1(4.9999994e-1f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return as_float(as_int(p) + (as_int(shifted) << 23));  // the shift drops magic's own bits
}

// Phi(x), the normal distribution function, with an absolute error of 1.5e-7 (rounding; the fit's own is 7e-9):
// 1/2 + x P(x^2) / Q(x^2), both of degree 5 with positive coefficients, so nothing cancels; 0 or 1 beyond 5.5.
inline Vec normal_cdf(Vec x) {
    const Vec u = x * x;
    Vec p = fma(set1(2.2749028e-8f), u, set1(6.3517409e-6f));
    p = fma(p, u, set1(1.6880763e-4f));
    p = fma(p, u, set1(4.6771490e-3f));
    p = fma(p, u, set1(3.3851158e-2f));
    p = fma(p, u, set1(3.9894223e-1f));
    Vec q = fma(set1(1.1974658e-6f), u, set1(7.3640367e-5f));
    q = fma(q, u, set1(1.8843445e-3f));
    q = fma(q, u, set1(2.8644966e-2f));
    q = fma(q, u, set1(2.5151819e-1f));
    q = fma(q, u, set1(1.0f));
    const Vec inside = fma(x * p, reciprocal(q), set1(0.5f));
    const Vec outside = x > 0.0f ? set1(1.0f) : set1(0.0f);
    return u > 30.25f ? outside : inside;
}

// The exact GELU, x Phi(x), and its derivative, Phi(x) + x phi(x).
inline Vec gelu(Vec x) { return x * normal_cdf(x); }

inline Vec gelu(Vec x, Vec& derivative) {
    const Vec cdf = normal_cdf(x);
    derivative = fma(x * set1(0.398942280f), exp(x * x * -0.5f), cdf);
    return x * cdf;
}

}  // namespace deit
