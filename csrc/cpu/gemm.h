// Products of small matrices in cache: one register tile, weight panels, and tiles of token rows.
//
// Everything is a matrix of 32-bit words. A word is one fp32 number or, where the processor multiplies bf16, two bf16
// numbers that follow each other along the contracted dimension K; `Operand<T>` says which for activations of type T.
// Elsewhere bf16 is widened on its way into a tile (on Intel's AVX-512 a bf16 pair product runs at the rate of two fp32
// ones anyway).
//
//   a  (M, K)  words broadcast from anywhere: a[m * row + k * step]
//   b  (K, N)  panels of NR columns, zero-padded: a packed weight, or a tile of tokens that lies there already
//   c  (M, N)  fp32, set or added to
//
// The register tile is MR x NR = 6 x 64 on AVX-512: 24 accumulators, 4 of b, 1 of a. All widths are padded to NR with
// zeros.
#pragma once

#include <algorithm>

#include "simd.h"

namespace deit {

constexpr int NV = LANES == 16 ? 4 : 2;       // vectors in a row of the register tile
constexpr int NR = NV * LANES;                // 64, 16, 8
constexpr int MR = 6;
// words of K at a time: a panel's part is 32 KB on AVX-512 and stays in L1
constexpr long KC = 128;

template <class T> struct OperandOf { using type = float; };
#if defined(__AVX512BF16__)
template <> struct OperandOf<bf16> { using type = bf16; };
#endif
template <class T> using Operand = typename OperandOf<T>::type;
template <class E> constexpr int PER_WORD = 4 / sizeof(E);  // elements in a word

inline long padded(long n, long to = NR) { return (n + to - 1) / to * to; }

template <class E> inline Vec mac(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
#if defined(__AVX512BF16__)
template <> inline Vec mac<bf16>(Vec acc, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

struct Words {  // a matrix operand: element (m, k) is p[m * row + k * step]
    const float* p;
    long row, step;
};

struct Panels {  // b: panel j's row k begins at p + j * panel + k * step
    const float* p;
    long panel, step;

    Panels from(long j) const { return {p + j * panel, panel, step}; }
};

// c (ROWS, NR) = or += a (ROWS, K) b (K, NR), in registers. The sum starts from zero and joins c at the end: a long K
// in parts of KC is then rounded like a sum of KC terms.
template <class E, int ROWS>
inline void register_tile(Words a, const float* b, long b_step, long K, float* c, long c_row, bool add) {
    Vec acc[ROWS][NV];
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < NV; ++v) acc[i][v] = set1(0.0f);
    for (long k = 0; k < K; ++k) {
        Vec row[NV];
        for (int v = 0; v < NV; ++v) row[v] = load(b + k * b_step + v * LANES);
        for (int i = 0; i < ROWS; ++i) {
            const Vec value = set1(a.p[i * a.row + k * a.step]);
            for (int v = 0; v < NV; ++v) acc[i][v] = mac<E>(acc[i][v], value, row[v]);
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < NV; ++v) {
            float* to = c + i * c_row + v * LANES;
            store(to, add ? load(to) + acc[i][v] : acc[i][v]);
        }
}

// c (M, panels * NR) = or += a (M, K) b (K, panels * NR); K in words. An element's sum runs over k in order, whatever
// M.
template <class E>
inline void multiply(long M, long panels, long K, Words a, Panels b, float* c, long c_row, bool add) {
    for (long j = 0; j < panels; ++j)
        for (long k = 0; k < K; k += KC) {
            const long depth = std::min(KC, K - k);
            const float* panel = b.p + j * b.panel + k * b.step;
            for (long i = 0; i < M; i += MR) {
                const Words rows{a.p + i * a.row + k * a.step, a.row, a.step};
                float* out = c + i * c_row + j * NR;
                const bool more = add || k > 0;
                switch (std::min<long>(MR, M - i)) {
                    case 1: register_tile<E, 1>(rows, panel, b.step, depth, out, c_row, more); break;
                    case 2: register_tile<E, 2>(rows, panel, b.step, depth, out, c_row, more); break;
                    case 3: register_tile<E, 3>(rows, panel, b.step, depth, out, c_row, more); break;
                    case 4: register_tile<E, 4>(rows, panel, b.step, depth, out, c_row, more); break;
                    case 5: register_tile<E, 5>(rows, panel, b.step, depth, out, c_row, more); break;
                    default: register_tile<E, 6>(rows, panel, b.step, depth, out, c_row, more);
                }
            }
        }
}

// What a thread holds while it multiplies operands of type E; something only where there are tile registers (amx.h).
template <class E> struct TileRegisters {
    TileRegisters() {}
};

}  // namespace deit
