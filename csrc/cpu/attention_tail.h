// Attention of a few queries, whose keys lie in the lanes: the tile is S, (queries, padded N).
//
// 66 tokens are four vectors of 16 queries and 2 more; those two would fill a fifth vector with 14 idle lanes and cost
// as much as 14 do. Here a row of S is products along the head's dimension, whose vectors are then added up across
// lanes, 16 keys at a time.
#pragma once

#include "attention_head.h"

namespace deit {

template <bool NARROW> struct KeysInLanes {
    // For more queries than this, queries in the lanes are faster (measured at 66 and 198 keys).
    static constexpr long MOST = NARROW ? 4 : 3 * LANES / 8;

    // h.row = softmax(Q K^T) V for the staged h.q.
    static void forward(Head& h, const Queries& block) {
        if (block.drop.on) h.mask.draw(block.drop, SITE, block.first, block.live * h.N);
        float inverse[MOST] = {};
        for (long i = 0; i < block.live; ++i) {
            float* s = tile(h, h.s, i);
            scores(h, h.k, h.q + i * h.pitch, s);
            float peak;
            const float total = softmax(s, h.N, block.logits.base, peak);
            inverse[i] = 1.0f / total;
            if (block.lse) block.lse[i] = peak + log2(set1(total))[0];
            if (block.drop.on) h.mask.apply_row(s, i, h.N, block.drop.scale);
        }
        gather(h, h.s, h.v, block.live, inverse);
    }

    // h.row = dQ, h.dk += dK / scale, h.dv += dV for the staged h.q and h.dout.
    static void backward(Head& h, const Queries& block) {
        if (block.drop.on) h.mask.draw(block.drop, SITE, block.first, block.live * h.N);
        float scale[MOST] = {};
        for (long i = 0; i < block.live; ++i) {
            float *s = tile(h, h.s, i), *ds = tile(h, h.ds, i);
            scores(h, h.k, h.q + i * h.pitch, s);
            scores(h, h.v, h.dout + i * h.pitch, ds);
            if (block.drop.on) h.mask.apply_row(ds, i, h.N, block.drop.scale);
            softmax_backward(s, ds, h.N, block.logits.base, block.lse[i]);
            if (block.drop.on) h.mask.apply_row(s, i, h.N, block.drop.scale);
            scale[i] = block.scale;
        }
        gather(h, h.ds, h.k, block.live, scale);
        scatter(h, h.ds, h.q, block.live, h.dk);
        scatter(h, h.s, h.dout, block.live, h.dv);
    }

private:
    static float* tile(const Head& h, float* rows, long i) { return rows + i * padded(h.N); }

    // s[j] = row . keys[j] for all keys, zeros beyond N.
    static void scores(const Head& h, const float* keys, const float* row, float* s) {
        for (long j = 0; j < h.N; j += LANES) {
            if constexpr (NARROW) {
                const Vec q = load2(row, row);
                Vec x[NARROW_D];  // two keys each
                for (int i = 0; i < NARROW_D; ++i) x[i] = load(keys + j * NARROW_D + i * LANES) * q;
                store(s + j, add_up(x));
            } else {
                Vec x[LANES] = {};
                for (long d = 0; d < h.pitch; d += LANES) {
                    const Vec q = load(row + d);
#pragma GCC unroll 16
                    for (int i = 0; i < LANES; ++i) x[i] = fma(load(keys + (j + i) * h.pitch + d), q, x[i]);
                }
                store(s + j, add_up(x));
            }
        }
    }

    // The sums of C vectors' groups of C lanes, in order: neighbours are added log2(C) times.
    template <int C> static Vec add_up(Vec (&x)[C]) {
#pragma GCC unroll 4
        for (int n = C / 2; n > 0; n /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < n; ++i)
                x[i] = every_other<0>(x[2 * i], x[2 * i + 1]) + every_other<1>(x[2 * i], x[2 * i + 1]);
        return x[0];
    }

    // v in the first n lanes, `other` in the rest.
    static Vec first(long n, Vec v, float other) {
        int32_t lane[LANES];
        for (int i = 0; i < LANES; ++i) lane[i] = i;
        IVec number;
        std::memcpy(&number, lane, sizeof number);
        return number < int32_t(std::min<long>(n, LANES)) ? v : set1(other);
    }

    static float softmax(float* s, long N, float base, float& peak) {
        Vec most = set1(-INFINITY), total{};
        for (long j = 0; j < N; j += LANES) most = max(first(N - j, load(s + j), -INFINITY), most);
        peak = max_lane(most) * base;
        for (long j = 0; j < N; j += LANES) {
            const Vec p = first(N - j, exp2(fma(load(s + j), set1(base), set1(-peak))), 0.0f);
            total += p;
            store(s + j, p);
        }
        return sum(total);
    }

    static void softmax_backward(float* s, float* ds, long N, float base, float lse) {
        Vec dot{}, total{};
        for (long j = 0; j < N; j += LANES) {
            const Vec p = first(N - j, exp2(fma(load(s + j), set1(base), set1(-lse))), 0.0f);
            dot = fma(p, load(ds + j), dot);
            total += p;
            store(s + j, p);
        }
        const Vec delta = set1(sum(dot) / sum(total));
        for (long j = 0; j < N; j += LANES) store(ds + j, load(s + j) * (load(ds + j) - delta));
    }

    // O or dQ: row (live, pitch) = tile (live, N) times keys (N, pitch), times `scale`, one per query.
    static void gather(const Head& h, float* rows, const float* keys, long live, const float* scale) {
        if constexpr (NARROW) {
            for (long i = 0; i < live; i += 2) {
                const float *a = tile(h, rows, i), *b = tile(h, rows, std::min(i + 1, live - 1));
                Vec x[4] = {};  // two queries, two chains of additions each
                for (long j = 0; j < h.N; j += 4)
                    for (int u = 0; u < 2; ++u) {
                        const Vec pair = interleaved(load(keys + (j + 2 * u) * NARROW_D));
                        x[u] = fma(twice(a + j + 2 * u), pair, x[u]);
                        x[2 + u] = fma(twice(b + j + 2 * u), pair, x[2 + u]);
                    }
                const Vec first = (x[0] + x[1]) * scale[i], second = (x[2] + x[3]) * scale[std::min(i + 1, live - 1)];
                store(h.row + i * NARROW_D, fold(first, second));
            }
        } else {
            in_parts(h.N, [&](long j, long depth, auto add) {
                product<add>({rows + j, padded(h.N), 1, keys + j * h.pitch, h.pitch, depth, h.row, h.pitch}, live,
                             h.pitch / LANES);
            });
            for (long i = 0; i < live; ++i)
                for (long d = i * h.pitch; d < (i + 1) * h.pitch; d += LANES)
                    store(h.row + d, load(h.row + d) * scale[i]);
        }
    }

    // dV += P^T dO, dK += dS^T Q: to (N, ...) += tile^T (N, live) times rows (live, pitch).
    static void scatter(const Head& h, float* tiles, const float* rows, long live, float* to) {
        if constexpr (NARROW) {
            for (long i = 0; i < live; i += 2) {
                const float *a = tile(h, tiles, i), *b = tile(h, tiles, i + 1);
                const Vec x = interleaved(load(rows + i * NARROW_D));
                for (long j = 0; j < h.N; j += LANES) {
                    const Vec p = load(a + j), q = i + 1 < live ? load(b + j) : Vec{};
                    float pairs[2 * LANES];
                    store(pairs, interleave<0>(p, q)), store(pairs + LANES, interleave<1>(p, q));
                    for (long r = 0; r < std::min<long>(LANES, h.N - j); ++r) {
                        float* sum = to + (j + r) * LANES;
                        store(sum, fma(twice(pairs + 2 * r), x, load(sum)));
                    }
                }
            }
        } else {
            product<true>({tiles, 1, padded(h.N), rows, h.pitch, live, to, h.pitch}, h.N, h.pitch / LANES);
        }
    }
};

}  // namespace deit
