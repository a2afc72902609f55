// Small matrix products in registers, for matrices that fit in cache: C (rows x vecs) = or += A B.
//
// B and C are rows of vectors; A's elements are broadcast one at a time, so A may lie in any order (`a_row`, `a_k` are
// its strides): a tile of softmax weights serves as itself and as its transpose. A block of R x COLUMNS vectors of C
// stays in registers for the whole depth; at 6 x 4 that is 24 of AVX-512's 32, and 10 loads feed 24 multiply-adds, of
// which the processor does two a cycle, as it does loads. `=` or `+=` happens at the end, so a long depth taken in
// parts is also summed in parts.
#pragma once

#include "simd.h"

namespace deit {

#if defined(__AVX512F__)
constexpr int ROWS = 6, COLUMNS = 4;
#else
constexpr int ROWS = 6, COLUMNS = 2;  // 16 registers
#endif
// Rows of a block of one column: two multiply-adds a cycle of a latency of 4 need 8 independent sums; 66 = 6 x 11.
constexpr int TALL = 11;

struct Product {
    const float* a;  // (rows, depth)
    long a_row, a_k;
    const float* b;  // (depth, vecs * LANES), rows b_k apart
    long b_k;
    long depth;
    float* c;  // (rows, vecs * LANES), rows c_row apart
    long c_row;
};

template <int R, int C, bool ADD> [[gnu::always_inline]] inline void product_block(const Product& p, long row, long column) {
    const float* a = p.a + row * p.a_row;
    const float* b = p.b + column * LANES;
    float* c = p.c + row * p.c_row + column * LANES;
    Vec sum[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) sum[r][v] = Vec{};
    for (long k = 0; k < p.depth; ++k) {
        Vec x[C];
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) x[v] = load(b + k * p.b_k + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec y = set1(a[r * p.a_row + k * p.a_k]);
#pragma GCC unroll 4
            for (int v = 0; v < C; ++v) sum[r][v] = fma(y, x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < C; ++v) {
            float* to = c + r * p.c_row + v * LANES;
            store(to, ADD ? load(to) + sum[r][v] : sum[r][v]);
        }
}

// Rows from `row` on, in blocks of R rows and the rest in smaller ones.
template <int R, int C, bool ADD> [[gnu::always_inline]] inline void product_columns(const Product& p, long row, long rows, long column) {
    for (; row + R <= rows; row += R) product_block<R, C, ADD>(p, row, column);
    if constexpr (R > 1)
        if (row < rows) product_columns<R / 2, C, ADD>(p, row, rows, column);
}

// All `rows` x `vecs` of the product, in blocks of R x C.
template <bool ADD, int R = ROWS, int C = COLUMNS> [[gnu::always_inline]] inline void product(const Product& p, long rows, long vecs) {
    long column = 0;
    for (; column + C <= vecs; column += C) product_columns<R, C, ADD>(p, 0, rows, column);
    if constexpr (C > 2)
        if (column + 2 <= vecs) product_columns<R, 2, ADD>(p, 0, rows, column), column += 2;
    if (column < vecs) product_columns<TALL, 1, ADD>(p, 0, rows, column);
}

}  // namespace deit
