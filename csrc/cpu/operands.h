// The operands of gemm.h's products: tiles of token rows, packed weights, and the workspace that they lie in.
#pragma once

#include "gemm.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace deit {

// ---- Tiles: a few dozen token rows of one width.

// (rows, width) elements of type E, rows `stride` words apart. A vector's width of padding keeps rows that are a power
// of two wide out of the same cache sets.
template <class E> struct Tile {
    float* p;
    long stride;

    static long stride_for(long width) { return padded(width) / PER_WORD<E> + (width > NR ? LANES : 0); }
    E* row(long r) const { return reinterpret_cast<E*>(p + r * stride); }
    Words rows() const { return {p, stride, 1}; }  // as a, contracted over the width
};

// Products contracted over tokens need words that run along the tokens: word (r / 2, c) holds rows r and r + 1. For
// fp32 that is the tile itself. Rows up to the next multiple of TOKENS must be zero.
#if defined(__AMX_BF16__)
template <class E> constexpr int TOKENS = PER_WORD<E> == 1 ? 1 : 32;
#else
template <class E> constexpr int TOKENS = PER_WORD<E>;
#endif
template <class E> inline long token_words(long rows) { return padded(rows, TOKENS<E>) / PER_WORD<E>; }
inline long token_room(long rows, long width) {  // words that either of the next two needs at most
    return rows * padded(width) + LANES * (rows + padded(width));
}

// As b (tokens, width).
inline Panels token_panels(Tile<float> tile, long, long, float*) { return {tile.p, NR, tile.stride}; }
// As a (width, tokens).
inline Words token_columns(Tile<float> tile, long, long, float*) { return {tile.p, 1, tile.stride}; }

#if defined(__AVX512BF16__)
inline Panels token_panels(Tile<bf16> tile, long rows, long width, float* room) {
    const long stride = padded(width) + (width > NR ? LANES : 0);
    for (long r = 0; r < padded(rows, TOKENS<bf16>); r += 2)
        for (long c = 0; c < padded(width); c += LANES) {
            const UVec low = as_uint(load(tile.row(r) + c)) >> 16, high = as_uint(load(tile.row(r + 1) + c));
            store(room + r / 2 * stride + c, as_float(low | high));
        }
    return {room, NR, stride};
}
inline Words token_columns(Tile<bf16> tile, long rows, long width, float* room) {
    const Panels pairs = token_panels(tile, rows, width, room);
#if defined(__AMX_BF16__)
    const long count = token_words<bf16>(rows), stride = count + LANES;  // rows of a in order: tiles are not broadcast
    float* turned = room + padded(rows, TOKENS<bf16>) / 2 * pairs.step;
    for (long k = 0; k < count; k += LANES)
        for (long c = 0; c < padded(width); c += LANES) transpose(room + k * pairs.step + c, pairs.step,
                                                                  turned + c * stride + k, stride);
    return {turned, stride, 1};
#else
    return {pairs.p, 1, pairs.step};
#endif
}
#endif

// ---- Parameters: fp32 or bf16 behind a void pointer.

// The first n lanes of LANES: almost always all of them, and without masks a part is a call of memcpy.
template <class T> inline Vec load_first(const T* p, int n) { return n == LANES ? load(p) : load(p, n); }
template <class T> inline void store_first(T* p, Vec v, int n) {
    if (n == LANES) store(p, v);
    else store(p, v, n);
}

struct Param {
    void* p;      // null: left out
    bool is_bf16;
    bool is_packed = false;  // a weight (N, K) as pack_transposed leaves it, which forward then uses as it is

    Vec load_at(long i, int n) const {
        return is_bf16 ? load_first(static_cast<const bf16*>(p) + i, n) : load_first(static_cast<const float*>(p) + i, n);
    }
    void store_at(long i, Vec v, int n) const {
        if (is_bf16) store_first(static_cast<bf16*>(p) + i, v, n);
        else store_first(static_cast<float*>(p) + i, v, n);
    }
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

// Panel j of b (K, N) = weight (N, K) transposed, by square blocks of words.
template <class E> inline void pack_transposed(Param weight, long K, long N, long j, float* to) {
    float* panel = to + j * packed<E>(to, K).panel;
    alignas(64) float block[LANES * LANES], turned[LANES * LANES];
    for (long n = j * NR; n < (j + 1) * NR; n += LANES)
        for (long k = 0; k < padded(K); k += LANES * PER_WORD<E>) {
            for (int i = 0; i < LANES; ++i)
                for (int v = 0; v < PER_WORD<E>; ++v) {
                    const long at = k + v * LANES;
                    const bool inside = n + i < N && at < K;
                    store(reinterpret_cast<E*>(block + i * LANES) + v * LANES,
                          inside ? weight.load_at((n + i) * K + at, lanes_left(K, at)) : set1(0.0f));
                }
            transpose(block, LANES, turned, LANES);
            const long count = std::min<long>(LANES, (padded(K) - k) / PER_WORD<E>);
            for (long w = 0; w < count; ++w) store(panel + (k / PER_WORD<E> + w) * NR + n - j * NR,
                                                   load(turned + w * LANES));
        }
}

// A forward product's weight: packed already, or in `room`, by all threads of the region. It takes `packing_words`.
template <class E> inline long packing_words(Param weight, long K, long N) {
    return weight.is_packed ? 0 : packed_words<E>(K, N);
}
template <class E> inline Panels panels(Param weight, long K, const float* room) {
    return packed<E>(weight.is_packed ? static_cast<const float*>(weight.p) : room, K);
}
inline long panels_to_pack(Param weight, long N) { return weight.is_packed ? 0 : padded(N) / NR; }

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
