// What happens to a tile of token rows between its products: LayerNorm and its gradient, the end of a residual branch
// and its gradient, and the ordered sum of gradients over chunks of rows.
#pragma once

#include <cmath>

#include "operands.h"
#include "philox.h"

namespace deit {

// The vector at p + c of a row of n elements; zeros beyond it.
template <class T> inline Vec load_in(const T* p, long c, long n) {
    return n - c >= LANES ? load(p + c) : n > c ? load(p + c, int(n - c)) : set1(0.0f);
}

template <class T> inline void store_in(T* p, long c, long n, Vec v) {
    if (n - c >= LANES) store(p + c, v);
    else if (n > c) store(p + c, v, int(n - c));
}

inline void add_to(float* p, Vec v) { store(p, load(p) + v); }

// ---- Whole tiles

// The rows of x (rows, width) as operands, zeros behind the width.
template <class T, class E> inline void copy_tile(const T* x, long rows, long width, Tile<E> to) {
    for (long r = 0; r < rows; ++r)
        for (long c = 0; c < padded(width); c += LANES) store(to.row(r) + c, load_in(x + r * width, c, width));
}

// The same without a copy where the rows lie in memory as operands already (a multiple of 128 features apart they would
// fall into the same cache sets as a panel).
template <class T, class E> inline Tile<E> tile_of(const T* x, long rows, long width, Tile<E> room) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (width == NR || (width % NR == 0 && width % 128 != 0)) return {const_cast<float*>(x), width};
    }
    copy_tile(x, rows, width, room);
    return room;
}

// Zeros the rows from `rows` to the next multiple of TOKENS, for products contracted over tokens.
template <class E> inline void zero_rest(Tile<E> tile, long rows, long width) {
    for (long r = rows; r < padded(rows, TOKENS<E>); ++r)
        for (long c = 0; c < padded(width); c += LANES) store(tile.row(r) + c, set1(0.0f));
}

// sum over rows of tile (rows, width), added to total (padded width); by 16 rows, so that rounding grows with rows /
// 16.
template <class E> inline void add_column_sums(Tile<E> tile, long rows, long width, float* total) {
    for (long c = 0; c < padded(width); c += LANES)
        for (long first = 0; first < rows; first += 16) {
            Vec sum = set1(0.0f);
            for (long r = first; r < std::min(rows, first + 16); ++r) sum += load(tile.row(r) + c);
            add_to(total + c, sum);
        }
}

// ---- LayerNorm

struct LayerNorm {
    const float* weight;  // (C,) zero-padded
    const float* bias;
    long width;
    float eps;
};

// Mean and 1 / standard deviation of a row, in two passes: a large mean must not eat the variance's digits.
template <class T> inline void row_statistics(const LayerNorm& ln, const T* x, float& mean, float& rstd) {
    const long C = ln.width;
    Vec total = set1(0.0f), square = set1(0.0f);
    for (long c = 0; c < C; c += LANES) total += load_in(x, c, C);
    mean = sum(total) / float(C);
    for (long c = 0; c + LANES <= C; c += LANES) {
        const Vec d = load(x + c) - mean;
        square = fma(d, d, square);
    }
    float rest = 0.0f;
    for (long c = C / LANES * LANES; c < C; ++c) {
        const float d = to_float(x[c]) - mean;
        rest += d * d;
    }
    rstd = 1.0f / std::sqrt((sum(square) + rest) / float(C) + ln.eps);
}

// LN(x) of x (rows, C) with known statistics.
template <class T, class E>
inline void normalise(const LayerNorm& ln, const T* x, long rows, const float* mean, const float* rstd, Tile<E> to) {
    const long C = ln.width;
    for (long r = 0; r < rows; ++r)
        for (long c = 0; c < padded(C); c += LANES) {
            const Vec normal = (load_in(x + r * C, c, C) - mean[r]) * rstd[r];
            store(to.row(r) + c, fma(normal, load(ln.weight + c), load(ln.bias + c)));
        }
}

// dx = added + rstd (g - mean(g) - n mean(g n)) with g = dy weight and n the normalised x; dweight += sum dy n, dbias
// += sum dy. dy (rows, dy_row) fp32 with zeros behind C; `added` may be null.
template <class T>
inline void layernorm_gradient(const LayerNorm& ln, const T* x, long rows, const float* mean, const float* rstd,
                               const float* dy, long dy_row, const T* added, T* dx, float* dweight, float* dbias) {
    const long C = ln.width;
    for (long r = 0; r < rows; ++r, x += C, dy += dy_row, dx += C) {
        Vec sum_g = set1(0.0f), sum_gn = set1(0.0f);
        for (long c = 0; c < padded(C); c += LANES) {
            const Vec n = (load_in(x, c, C) - mean[r]) * rstd[r], d = load(dy + c);
            const Vec g = d * load(ln.weight + c);
            sum_g += g, sum_gn = fma(g, n, sum_gn);
            add_to(dbias + c, d);
            store(dweight + c, fma(d, n, load(dweight + c)));
        }
        const float mean_g = sum(sum_g) / float(C), mean_gn = sum(sum_gn) / float(C);
        for (long c = 0; c < C; c += LANES) {
            const Vec n = (load_in(x, c, C) - mean[r]) * rstd[r], g = load(dy + c) * load(ln.weight + c);
            const Vec through = (g - mean_g - n * mean_gn) * rstd[r];
            store_in(dx, c, C, added ? load_in(added + r * C, c, C) + through : through);
        }
    }
}

// Columns that dropout goes over at a time: whole panels and whole draws of Philox (16 columns would waste half of 32
// words on AVX2).
constexpr long GROUP = 64;
static_assert(GROUP % NR == 0 && GROUP % PHILOX_WORDS == 0, "");

// ---- A residual branch's end: dropout, drop-path, addition

struct Branch {
    Dropout drop;
    uint32_t site;
    const float* row_scale;  // (B,) or null
    long rows_per_sample;
    long width;

    float factor(long row) const { return row_scale ? row_scale[row / rows_per_sample] : 1.0f; }
    static long room(long width) { return padded(width) + 2 * PHILOX_WORDS; }
};

// out = residual + row_scale dropout(y + bias) for columns col .. col + cols - 1 of the rows row .. row + rows - 1; y
// points at the first of them, residual and out (all rows, width) at their beginnings.
template <class T>
inline void add_branch(const Branch& branch, long row, long rows, long col, long cols, const float* y, long y_row,
                       const float* bias, const T* residual, T* out, float* room) {
    const long width = branch.width;
    for (long r = row; r < row + rows; ++r, y += y_row) {
        const Vec factor = set1(branch.factor(r));
        const float* keep = branch.drop.on ? dropout_row(branch.drop, branch.site, uint64_t(r) * width + col, cols,
                                                         room) : nullptr;
        for (long c = 0; c < cols; c += LANES) {
            Vec v = load(y + c) + load(bias + col + c);
            if (keep) v *= load(keep + c);
            store_in(out + r * width, col + c, width, fma(v, factor, load_in(residual + r * width, col + c, width)));
        }
    }
}

// The gradient that enters the branch: grad row_scale mask / (1 - p), zeros behind the width; its column sums go to
// dbias.
template <class T, class E>
inline void branch_gradient(const Branch& branch, long row, long rows, const T* grad, Tile<E> to, float* dbias,
                            float* room) {
    const long width = branch.width;
    for (long r = 0; r < rows; ++r) {
        const T* from = grad + (row + r) * width;
        const Vec factor = set1(branch.factor(row + r));
        const float* keep = branch.drop.on ? dropout_row(branch.drop, branch.site, uint64_t(row + r) * width, width,
                                                         room) : nullptr;
        for (long c = 0; c < padded(width); c += LANES) {
            Vec v = load_in(from, c, width) * factor;
            if (keep) v *= load_in(keep, c, width);
            store(to.row(r) + c, v);
        }
    }
    add_column_sums(to, rows, width, dbias);
    zero_rest(to, rows, width);
}

// ---- Sums over rows: each chunk of rows has its own partial sums, which are then added in the chunks' order. The
// partition depends on the shape only, so the result does not depend on the number of threads.

struct Chunks {
    long rows, count;

    // About 264 rows each for 4224 (64 images of 66 tokens): 16 partial sums of a (64, 256) weight are 1 MB, and adding
    // them costs a twentieth of computing them. At most 64, and at most 64 MB.
    Chunks(long rows_, long partial_words)
        : rows(rows_), count(std::max<long>(1, std::min({rows_ / 256, 64L, (16L << 20) / std::max(1L,
            partial_words)}))) {}
    long begin(long i) const { return rows * i / count; }
};

// Rows of a backward tile. Each reads and writes all partial sums once, so that wide layers want it long (288 rows of
// width 192 and 256 hidden features are 1.4 MB, in L2), narrow ones small (96 rows).
inline long backward_tile(long C) { return C > 128 ? 288 : 96; }

// Row r of `to` (any rows, cols) = the sum over chunks of row r of the partials (rows, row), `chunk` words apart.
inline void sum_row(const float* partial, const Chunks& chunks, long chunk, long r, long row, long cols, Param to) {
    for (long c = 0; c < cols; c += LANES) {
        Vec total = load(partial + r * row + c);
        for (long i = 1; i < chunks.count; ++i) total += load(partial + i * chunk + r * row + c);
        to.store_at(r * cols + c, total, lanes_left(cols, c));
    }
}

// Rows f .. f + LANES - 1 of `to` (F, C) from partials of its transpose (C, row).
inline void sum_transposed(const float* partial, const Chunks& chunks, long chunk, long f, long row, long F, long C,
                           Param to) {
    alignas(64) float block[LANES * LANES], turned[LANES * LANES];
    for (long c = 0; c < C; c += LANES) {
        for (int k = 0; k < lanes_left(C, c); ++k) {
            const float* from = partial + (c + k) * row + f;
            Vec total = load(from);
            for (long i = 1; i < chunks.count; ++i) total += load(from + i * chunk);
            store(block + k * LANES, total);
        }
        transpose(block, LANES, turned, LANES);
        for (int i = 0; i < lanes_left(F, f); ++i) to.store_at((f + i) * C + c, load(turned + i * LANES),
                                                               lanes_left(C, c));
    }
}

}  // namespace deit
