// Products of small matrices in cache: one register tile, weight panels, and tiles of token rows.
//
// Everything is a matrix of 32-bit words. A word is one fp32 number or, where the processor multiplies bf16, two bf16 numbers
// that follow each other along the contracted dimension K; `Operand<T>` says which for activations of type T. Elsewhere
// bf16 is widened on its way into a tile (on Intel's AVX-512 a bf16 pair product runs at the rate of two fp32 ones anyway).
//
//   a  (M, K)  words broadcast from anywhere: a[m * row + k * step]
//   b  (K, N)  panels of NR columns, zero-padded: a packed weight, or a tile of tokens that lies there already
//   c  (M, N)  fp32, set or added to
//
// The register tile is MR x NR = 6 x 64 on AVX-512: 24 accumulators, 4 of b, 1 of a. All widths are padded to NR with zeros.
#pragma once

#include <algorithm>

#include "simd.h"

namespace deit {

constexpr int NV = LANES == 16 ? 4 : 2;       // vectors in a row of the register tile
constexpr int NR = NV * LANES;                // 64, 16, 8
constexpr int MR = 6;
constexpr long KC = 128;                      // words of K at a time: a panel's part is 32 KB on AVX-512 and stays in L1

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
};

// c (ROWS, NR) (+)= a (ROWS, K) b (K, NR), in registers.
template <class E, int ROWS>
inline void register_tile(Words a, const float* b, long b_step, long K, float* c, long c_row, bool add) {
    Vec acc[ROWS][NV];
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < NV; ++v) acc[i][v] = add ? load(c + i * c_row + v * LANES) : set1(0.0f);
    for (long k = 0; k < K; ++k) {
        Vec row[NV];
        for (int v = 0; v < NV; ++v) row[v] = load(b + k * b_step + v * LANES);
        for (int i = 0; i < ROWS; ++i) {
            const Vec value = set1(a.p[i * a.row + k * a.step]);
            for (int v = 0; v < NV; ++v) acc[i][v] = mac<E>(acc[i][v], value, row[v]);
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < NV; ++v) store(c + i * c_row + v * LANES, acc[i][v]);
}

// c (M, panels * NR) = or += a (M, K) b (K, panels * NR); K in words. An element's sum runs over k in order, whatever M.
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

// ---- Tiles: a few dozen token rows of one width.

// (rows, width) elements of type E, rows `stride` words apart. A vector's width of padding keeps rows that are a power of two
// wide out of the same cache sets.
template <class E> struct Tile {
    float* p;
    long stride;

    static long stride_for(long width) { return padded(width) / PER_WORD<E> + (width > NR ? LANES : 0); }
    E* row(long r) const { return reinterpret_cast<E*>(p + r * stride); }
    Words rows() const { return {p, stride, 1}; }          // as a: contracted over the width
    Words columns() const { return {p, 1, stride}; }       // as a, transposed: contracted over tokens (of a paired tile)
    Panels panels() const { return {p, NR, stride}; }      // as b: contracted over tokens (of a paired tile)
};

// A tile whose words run along the tokens, for products contracted over tokens: word (r / 2, c) holds rows r and r + 1.
// For fp32 that is the tile itself. `rows` is even or the row behind the last is zero.
inline Tile<float> pair_rows(Tile<float> tile, long, long, float*) { return tile; }
#if defined(__AVX512BF16__)
inline Tile<bf16> pair_rows(Tile<bf16> tile, long rows, long width, float* room) {
    const Tile<bf16> paired{room, padded(width) + (width > NR ? LANES : 0)};
    for (long r = 0; r < rows; r += 2)
        for (long c = 0; c < padded(width); c += LANES) {
            const UVec low = as_uint(load(tile.row(r) + c)) >> 16, high = as_uint(load(tile.row(r + 1) + c));
            store(paired.p + r / 2 * paired.stride + c, as_float(low | high));
        }
    return paired;
}
#endif
template <class E> inline long words(long rows) { return (rows + PER_WORD<E> - 1) / PER_WORD<E>; }

// ---- Parameters: fp32 or bf16 behind a void pointer.

struct Param {
    void* p;      // null: left out
    bool is_bf16;

    Vec load_at(long i, int n) const {
        return is_bf16 ? load(static_cast<const bf16*>(p) + i, n) : load(static_cast<const float*>(p) + i, n);
    }
    void store_at(long i, Vec v, int n) const {
        if (is_bf16) store(static_cast<bf16*>(p) + i, v, n);
        else store(static_cast<float*>(p) + i, v, n);
    }
    void set(long i, float v) const { store_at(i, set1(v), 1); }
};

inline int lanes_left(long n, long i) { return int(std::min<long>(LANES, n - i)); }

// A vector parameter as fp32, zero-padded to NR; zeros when it is left out.
inline void copy_vector(Param from, long n, float* to) {
    for (long i = 0; i < padded(n); i += LANES)
        store(to + i, from.p && i < n ? from.load_at(i, lanes_left(n, i)) : set1(0.0f));
}

// Words of a packed (K, N) weight.
template <class E> inline long packed_words(long K, long N) { return padded(K) / PER_WORD<E> * padded(N); }

template <class E> inline Panels packed(const float* p, long K) { return {p, padded(K) / PER_WORD<E> * NR, NR}; }

// Panel j of b (K, N) = weight (N, K) transposed.
template <class E> inline void pack_transposed(Param weight, long K, long N, long j, float* to) {
    float* panel = to + j * packed<E>(to, K).panel;
    alignas(64) float line[LANES];  // words of one row
    constexpr int STEP = LANES * PER_WORD<E>;
    for (long n = 0; n < NR; ++n)
        for (long k = 0; k < padded(K); k += STEP) {
            E* element = reinterpret_cast<E*>(line);
            for (int v = 0; v < PER_WORD<E>; ++v) {
                const long at = k + v * LANES;
                const bool inside = j * NR + n < N && at < K;
                store(element + v * LANES, inside ? weight.load_at((j * NR + n) * K + at, lanes_left(K, at)) : set1(0.0f));
            }
            const long count = std::min<long>(LANES, (padded(K) - k) / PER_WORD<E>);
            for (long w = 0; w < count; ++w) panel[(k / PER_WORD<E> + w) * NR + n] = line[w];
        }
}

// Panel j of b (K, N) = weight (K, N) as it is.
template <class E> inline void pack_direct(Param weight, long K, long N, long j, float* to) {
    float* panel = to + j * packed<E>(to, K).panel;
    const auto row = [&](long k, long n) {
        return k < K && n < N ? weight.load_at(k * N + n, lanes_left(N, n)) : set1(0.0f);
    };
    for (long k = 0; k < padded(K); k += PER_WORD<E>)
        for (int v = 0; v < NV; ++v) {
            const long n = j * NR + v * LANES;
            float* word = panel + k / PER_WORD<E> * NR + v * LANES;
            if constexpr (PER_WORD<E> == 1) {
                store(word, row(k, n));
            } else {
                bf16 low[LANES], high[LANES];
                store(low, row(k, n)), store(high, row(k + 1, n));
                store(word, as_float(as_uint(load(low)) >> 16 | as_uint(load(high))));
            }
        }
}

// ---- Workspace: pieces of one block that the launcher allocated, each on a cache line of its own.

class Arena {
public:
    explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
    float* take(long words) {
        float* piece = reinterpret_cast<float*>(base_ + used_);
        used_ += padded(4 * words, 64);
        return piece;
    }
    template <class E> Tile<E> tile(long rows, long width) {
        const long stride = Tile<E>::stride_for(width);
        return {take(rows * stride), stride};
    }
    long used() const { return used_; }  // bytes; with a null base this is how the size is found

private:
    uintptr_t base_;
    long used_ = 0;
};

// The scratch S of one thread, behind those of the threads before it.
template <class S, class... Sizes> S scratch(Arena arena, int thread, Sizes... sizes) {
    for (int t = 0; t < thread; ++t) S(arena, sizes...);
    return S(arena, sizes...);
}

}  // namespace deit
