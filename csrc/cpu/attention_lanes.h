// Attention of up to QUERIES queries, which lie in the lanes: the tile is S^T, (N keys, QUERIES).
#pragma once

#include "attention_head.h"

namespace deit {

template <bool NARROW> struct QueriesInLanes {
    // h.row = softmax(Q K^T) V for the staged h.q.
    static void forward(Head& h, const Queries& block) {
        const long vecs = padded(block.live) / LANES;
        transpose(h, h.q, vecs, h.qt);
        scores(h, h.k, h.qt, vecs, h.s);
        Vec inverse[QUERIES / LANES];
        for (long v = 0; v < vecs; ++v) {
            Vec peak;
            const Vec total = softmax(h.s + v * LANES, h.N, set1(block.logits.base), peak);
            inverse[v] = 1.0f / total;
            if (block.lse) store(block.lse + v * LANES, peak + log2(total), lanes_of(block, v));
        }
        if (block.drop.on) {
            h.mask.draw(block.drop, SITE, block.first, block.live * h.N);
            h.mask.apply(h.s, QUERIES, h.N, vecs, block.drop.scale);
        }
        gather(h, h.s, h.v, block.live, vecs, inverse);
    }

    // h.row = dQ, h.dk += dK / scale, h.dv += dV for the staged h.q and h.dout.
    static void backward(Head& h, const Queries& block) {
        const long vecs = padded(block.live) / LANES;
        transpose(h, h.q, vecs, h.qt);
        transpose(h, h.dout, vecs, h.doutt);
        scores(h, h.k, h.qt, vecs, h.s);
        scores(h, h.v, h.doutt, vecs, h.ds);
        if (block.drop.on) {
            h.mask.draw(block.drop, SITE, block.first, block.live * h.N);
            h.mask.apply(h.ds, QUERIES, h.N, vecs, block.drop.scale);
        }
        for (long v = 0; v < vecs; ++v)
            softmax_backward(h.s + v * LANES, h.ds + v * LANES, h.N, set1(block.logits.base),
                             load(block.lse + v * LANES, lanes_of(block, v)));
        if (block.drop.on) h.mask.apply(h.s, QUERIES, h.N, vecs, block.drop.scale);
        Vec scale[QUERIES / LANES];
        for (Vec& x : scale) x = set1(block.scale);
        gather(h, h.ds, h.k, block.live, vecs, scale);
        scatter(h, h.ds, h.q, block.live, h.dk);
        scatter(h, h.s, h.dout, block.live, h.dv);
    }

private:
    static int lanes_of(const Queries& block, long v) { return int(std::min<long>(LANES, block.live - v * LANES)); }

    // (vecs * LANES, pitch) -> (pitch, QUERIES)
    static void transpose(const Head& h, const float* from, long vecs, float* to) {
        constexpr int C = NARROW ? NARROW_D : LANES;
        for (long i = 0; i < vecs * LANES; i += LANES)
            for (long d = 0; d < h.pitch; d += C) {
                Vec x[C];
                for (int c = 0; c < C; ++c) x[c] = load(NARROW ? from + i * C + c * LANES : from + (i + c) * h.pitch + d);
                columns_to_rows(x);
                for (int c = 0; c < C; ++c) store(to + (d + c) * QUERIES + i, x[c]);
            }
    }

    // S^T or dP^T: tile (N, vecs) = rows (N, D) times columns (D, vecs).
    static void scores(const Head& h, const float* rows, const float* columns, long vecs, float* tile) {
        product<false>({rows, h.pitch, 1, columns, QUERIES, h.D, tile, QUERIES}, h.N, vecs);
    }

    // O or dQ: row (live, pitch) = tile^T (live, N) times keys (N, pitch), times `scale`, one per query.
    static void gather(const Head& h, const float* tile, const float* keys, long live, long vecs, const Vec* scale) {
        if constexpr (NARROW) {
            in_parts(h.N, [&](long j, long depth, auto add) {
                product<add, 4, 4>({keys + j * NARROW_D, 1, NARROW_D, tile + j * QUERIES, QUERIES, depth, h.column,
                                    QUERIES}, NARROW_D, vecs);
            });
            for (long v = 0; v < vecs; ++v) {
                Vec x[NARROW_D];
                for (int d = 0; d < NARROW_D; ++d) x[d] = load(h.column + d * QUERIES + v * LANES) * scale[v];
                rows_to_columns(x);
                for (int i = 0; i < NARROW_D; ++i) store(h.row + v * LANES * NARROW_D + i * LANES, x[i]);
            }
        } else {
            in_parts(h.N, [&](long j, long depth, auto add) {
                product<add>({tile + j * QUERIES, 1, QUERIES, keys + j * h.pitch, h.pitch, depth, h.row, h.pitch}, live,
                             h.pitch / LANES);
            });
            for (long i = 0; i < live; ++i)
                for (long d = 0; d < h.pitch; d += LANES) {
                    float* p = h.row + i * h.pitch + d;
                    store(p, load(p) * scale[i / LANES][i % LANES]);
                }
        }
    }

    // dV += P^T dO, dK += dS^T Q (h.qt is free by then): to (N, ...) += tile (N, queries) times rows (queries, pitch).
    static void scatter(const Head& h, const float* tile, const float* rows, long live, float* to) {
        if constexpr (NARROW) {
            for (long t = 0; t < live; t += 2) store(h.qt + t * NARROW_D, interleaved(load(rows + t * NARROW_D)));
            pairs<11>(h, tile, h.qt, (live + 1) / 2, to);
        } else {
            product<true>({tile, QUERIES, 1, rows, h.pitch, live, to, h.pitch}, h.N, h.pitch / LANES);
        }
    }

    // The same for 8 columns and 16 lanes: lane 2 d + p takes the queries of parity p, so that one 64-bit broadcast of
    // the tile brings two queries and no lane idles; 66 keys are 6 x 11.
    template <int R> static void pairs(const Head& h, const float* tile, const float* rows, long depth, float* to) {
        long j = 0;
        for (; j + R <= h.N; j += R) {
            const float* a = tile + j * QUERIES;
            Vec sum[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[r] = load(to + (j + r) * LANES);
            for (long t = 0; t < depth; ++t) {
                const Vec x = load(rows + t * LANES);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) sum[r] = fma(twice(a + r * QUERIES + 2 * t), x, sum[r]);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) store(to + (j + r) * LANES, sum[r]);
        }
        if constexpr (R > 1) {
            Head rest = h;
            rest.N -= j;
            pairs<(R > 2 ? 2 : 1)>(rest, tile + j * QUERIES, rows, depth, to + j * LANES);
        }
    }

    // Turns logits s into weights 2^(s base - peak), peak being the largest s base; returns their sum per query.
    static Vec softmax(float* s, long N, Vec base, Vec& peak) {
        Vec m[4];
        for (Vec& x : m) x = load(s);
        long j = 0;
        for (; j + 4 <= N; j += 4)
            for (int u = 0; u < 4; ++u) m[u] = max(m[u], load(s + (j + u) * QUERIES));
        for (; j < N; ++j) m[0] = max(m[0], load(s + j * QUERIES));
        peak = max(max(m[0], m[1]), max(m[2], m[3])) * base;
        Vec total{}, other{};  // two chains of additions
        auto weight = [&](long key) {
            const Vec p = exp2(fma(load(s + key * QUERIES), base, -peak));
            store(s + key * QUERIES, p);
            return p;
        };
        for (j = 0; j + 2 <= N; j += 2) total += weight(j), other += weight(j + 1);
        if (j < N) total += weight(j);
        return total + other;
    }

    // Turns logits into weights P = 2^(s base - lse) and dP into dS = P (dP - rowsum(P dP)). lse is rounded, so a row
    // of P sums to 1 + e with e up to 1e-5 at logits of 100; dP - delta cancels where one key takes all, so delta is
    // divided by that sum (undivided, the error of dQ is 3 x the reference's).
    static void softmax_backward(float* s, float* ds, long N, Vec base, Vec lse) {
        Vec dot{}, total{};
        for (long j = 0; j < N; ++j) {
            const Vec p = exp2(fma(load(s + j * QUERIES), base, -lse));
            dot = fma(p, load(ds + j * QUERIES), dot);
            total += p;
            store(s + j * QUERIES, p);
        }
        const Vec delta = dot / total;
        for (long j = 0; j < N; ++j)
            store(ds + j * QUERIES, load(s + j * QUERIES) * (load(ds + j * QUERIES) - delta));
    }
};

}  // namespace deit
