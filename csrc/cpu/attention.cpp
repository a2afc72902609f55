// Attention with the queries in the lanes: a tile holds S^T, (N keys, QUERIES queries), so a row of the softmax lies along one lane, and
// maximum, sum and weights need no reduction across lanes. K is broadcast element by element, and so is the tile when it
// multiplies V: no operand but Q is ever transposed, and all products are the one of attention_product.h.
//
// One thread takes a head of an image: K and V are staged once as fp32, then blocks of QUERIES queries see all keys, so memory grows
// with N, not N^2, and each (image, head) is computed in one order whatever the number of threads.
//
// Backward draws P again from S and the saved row sums (4 bytes per token and head). With dO the gradient of the output:
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = dS K scale,  dK = dS^T Q scale.
//
// Instructions for 16 queries and one key at D = 8 on AVX-512, two a cycle (the roofline): forward 8 multiply-adds for S,
// 8 for P V, 1 max, 1 subtraction, 8 for 2^x, 1 sum = 27; backward 8 each for S, dP, dQ, dV, dK, 10 for P, 3 for dS = 53;
// dropout's Philox about 35 more in each. 66 tokens fill 80 lanes, 21 % more.
#include "attention.h"

#include <omp.h>

#include <cmath>
#include <type_traits>

#include "attention_math.h"
#include "attention_product.h"

namespace deit {
namespace {

constexpr long QUERIES = 4 * LANES;
constexpr uint32_t SITE = 0;

long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

// softmax(scale q k) = softmax in base 2 of (sign q) k times `base`. Q is staged times the sign alone, which is exact.
struct Logits {
    float sign, base;
};

Logits make_logits(double scale) { return {scale < 0 ? -1.0f : 1.0f, float(std::fabs(scale) * 1.4426950408889634)}; }

// Buffers of one thread, carved out of the workspace. `pitch` is the floats of a staged row: D padded to whole vectors, or 8.
struct Head {
    long N, D, pitch;
    float *k, *v, *dk, *dv;       // (N, pitch); dk and dv (N, max(pitch, LANES))
    float *q, *dout, *row;        // (QUERIES, pitch)
    float *qt, *doutt, *column;   // (pitch, QUERIES)
    float *s, *ds;                // (N, QUERIES)
    Mask mask;

    // Lays the buffers out from `base`; returns the bytes that they take.
    long lay_out(char* base, bool backward, bool dropout) {
        long used = 0;
        auto take = [&](long floats) {
            float* p = reinterpret_cast<float*>(base + used);
            used += (4 * floats + 63) / 64 * 64;
            return p;
        };
        k = take(N * pitch), v = take(N * pitch), q = take(QUERIES * pitch), row = take(QUERIES * pitch);
        qt = take(pitch * QUERIES), column = take(pitch * QUERIES), s = take(N * QUERIES);
        if (backward) {
            dk = take(N * std::max<long>(pitch, LANES)), dv = take(N * std::max<long>(pitch, LANES));
            dout = take(QUERIES * pitch), doutt = take(pitch * QUERIES), ds = take(N * QUERIES);
        }
        mask.bits = reinterpret_cast<uint8_t*>(take(dropout ? mask_bytes(QUERIES * N) / 4 + 1 : 0));
        return used;
    }
};

// NARROW: head_dim 8 beside 16 lanes. Then two rows share a vector, and O^T and dQ^T, not O and dQ, fill the lanes.
constexpr long NARROW_D = 8;
bool is_narrow(long D) { return LANES == 16 && D == NARROW_D; }

Head make_head(const Attention& call) {
    Head h{};
    h.N = call.N, h.D = call.D, h.pitch = is_narrow(call.D) ? NARROW_D : padded(call.D);
    return h;
}

template <bool NARROW> struct Kernel {
    // Staged row `to` = factor * row `from`, zero beyond D.
    template <class T> static void stage_row(const T* from, long D, float factor, float* to) {
        if (NARROW) return store(to, load(from, NARROW_D) * factor, NARROW_D);
        long d = 0;
        for (; d + LANES <= D; d += LANES) store(to + d, load(from + d) * factor);
        if (d < D) store(to + d, load(from + d, int(D - d)) * factor);
    }

    // Staged rows (rows, pitch) from rows of T `stride` apart; zeros up to `filled` rows.
    template <class T> static void stage(const Head& h, const T* from, long stride, long rows, long filled, float factor, float* to) {
        for (long i = 0; i < rows; ++i) stage_row(from + i * stride, h.D, factor, to + i * h.pitch);
        std::fill(to + rows * h.pitch, to + filled * h.pitch, 0.0f);
    }

    template <class T> static void unstage(const Head& h, const float* from, long rows, T* to, long stride) {
        for (long i = 0; i < rows; ++i, from += h.pitch, to += stride) {
            if (NARROW) {
                store(to, load(from, NARROW_D), NARROW_D);
                continue;
            }
            long d = 0;
            for (; d + LANES <= h.D; d += LANES) store(to + d, load(from + d));
            if (d < h.D) store(to + d, load(from + d, int(h.D - d)), int(h.D - d));
        }
    }

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

    // Calls part(first, depth, is it an addition) for every PART keys: one sum over 1,000 keys has 2.5 x the reference's error.
    template <class Part> static void in_parts(long N, Part part) {
        constexpr long PART = 256;
        part(0, std::min(N, PART), std::false_type());
        for (long j = PART; j < N; j += PART) part(j, std::min(N - j, PART), std::true_type());
    }

    // O or dQ: row (live, pitch) = tile^T (live, N) times keys (N, pitch), times `scale`, one per query.
    static void gather(const Head& h, const float* tile, const float* keys, long live, long vecs, const Vec* scale) {
        if constexpr (NARROW) {
            in_parts(h.N, [&](long j, long depth, auto add) {
                product<add, NARROW_D, 2>({keys + j * NARROW_D, 1, NARROW_D, tile + j * QUERIES, QUERIES, depth, h.column, QUERIES},
                                          NARROW_D, vecs);
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

    // dV += P^T dO, dK += dS^T Q: to (N, ...) += tile (N, queries) times rows (queries, pitch).
    static void scatter(const Head& h, const float* tile, const float* rows, long live, float* to) {
        if constexpr (NARROW) {
            pairs<11>(h, tile, rows, (live + 1) / 2, to);
        } else {
            product<true>({tile, QUERIES, 1, rows, h.pitch, live, to, h.pitch}, h.N, h.pitch / LANES);
        }
    }

    // The same for 8 columns and 16 lanes: lane 2 d + p takes the queries of parity p, so that one 64-bit broadcast of the tile
    // brings two queries and no lane idles; 66 keys are 6 x 11.
    template <int R> static void pairs(const Head& h, const float* tile, const float* rows, long depth, float* to) {
        long j = 0;
        for (; j + R <= h.N; j += R) {
            const float* a = tile + j * QUERIES;
            Vec sum[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[r] = load(to + (j + r) * LANES);
            for (long t = 0; t < depth; ++t) {
                const Vec x = interleaved(load(rows + t * LANES));
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

    static Vec interleaved(Vec rows) {  // two rows of 8: elements d of both side by side
        Vec upper = rows;
#if defined(__AVX512F__)
        upper = (Vec)_mm512_shuffle_f32x4((__m512)rows, (__m512)rows, 0xEE);
#endif
        return interleave<0>(rows, upper);
    }

    static Vec twice(const float* p) {  // p[0] p[1] p[0] p[1] ...
        double two;
        std::memcpy(&two, p, 8);
        typedef double Doubles __attribute__((vector_size(4 * LANES)));
        return (Vec)(two - Doubles{});
    }

    // Staged gradient rows from the sums of `scatter`, times factor.
    static void fold(const Head& h, float* sums, float factor) {
        for (long j = 0; j < h.N; j += NARROW ? 2 : 1) {
            if (NARROW) {
                const Vec a = load(sums + j * LANES), b = j + 1 < h.N ? load(sums + (j + 1) * LANES) : Vec{};
                const Vec folded = (every_other<0>(a, b) + every_other<1>(a, b)) * factor;
                store(sums + j * NARROW_D, folded);
            } else {
                for (long d = 0; d < h.pitch; d += LANES) store(sums + j * h.pitch + d, load(sums + j * h.pitch + d) * factor);
            }
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
        Vec total[2] = {};
        for (j = 0; j < N; ++j) {
            const Vec p = exp2(fma(load(s + j * QUERIES), base, -peak));
            total[j % 2] += p;
            store(s + j * QUERIES, p);
        }
        return total[0] + total[1];
    }

    // Turns logits into weights P = 2^(s base - lse) and dP into dS = P (dP - rowsum(P dP)). lse is rounded, so a row of P sums to 1 + e
    // with e up to 1e-5 at logits of 100; dP - delta cancels where one key takes all, so delta is divided by that sum (undivided, the
    // error of dQ is 3 x the reference's).
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

    template <class T> static void forward(const Attention& call, Head& h, long b, long head, T* out) {
        const long N = h.N, C = call.H * h.D, stride = 3 * C;
        const T* q = static_cast<const T*>(call.qkv) + b * N * stride + head * h.D;
        const Dropout drop = make_dropout(call.dropout_p, call.seed);
        const Logits logits = make_logits(call.scale);
        stage(h, q + C, stride, N, N, 1.0f, h.k);
        stage(h, q + 2 * C, stride, N, N, 1.0f, h.v);
        for (long i = 0; i < N; i += QUERIES) {
            const long live = std::min(QUERIES, N - i), filled = padded(live), vecs = filled / LANES;
            stage(h, q + i * stride, stride, live, filled, logits.sign, h.q);
            transpose(h, h.q, vecs, h.qt);
            scores(h, h.k, h.qt, vecs, h.s);
            Vec inverse[QUERIES / LANES];
            for (long v = 0; v < vecs; ++v) {
                Vec peak;
                const Vec total = softmax(h.s + v * LANES, N, set1(logits.base), peak);
                inverse[v] = 1.0f / total;
                if (call.lse)
                    store(call.lse + (b * call.H + head) * N + i + v * LANES, peak + log2(total),
                          int(std::min<long>(LANES, live - v * LANES)));
            }
            if (drop.on) {
                h.mask.draw(drop, SITE, uint64_t((b * call.H + head) * N + i) * N, live * N);
                h.mask.apply(h.s, QUERIES, N, vecs, drop.scale);
            }
            gather(h, h.s, h.v, live, vecs, inverse);
            unstage(h, h.row, live, out + (b * N + i) * C + head * h.D, C);
        }
    }

    template <class T> static void backward(const Attention& call, Head& h, long b, long head, const T* grad, T* dqkv) {
        const long N = h.N, C = call.H * h.D, stride = 3 * C, first = b * N * stride + head * h.D;
        const T* q = static_cast<const T*>(call.qkv) + first;
        const T* dout = grad + b * N * C + head * h.D;
        T* dq = dqkv + first;
        const Dropout drop = make_dropout(call.dropout_p, call.seed);
        const Logits logits = make_logits(call.scale);
        stage(h, q + C, stride, N, N, 1.0f, h.k);
        stage(h, q + 2 * C, stride, N, N, 1.0f, h.v);
        const long width = std::max<long>(h.pitch, LANES);
        std::fill(h.dk, h.dk + N * width, 0.0f);
        std::fill(h.dv, h.dv + N * width, 0.0f);
        for (long i = 0; i < N; i += QUERIES) {
            const long live = std::min(QUERIES, N - i), filled = padded(live), vecs = filled / LANES;
            stage(h, q + i * stride, stride, live, filled, logits.sign, h.q);
            stage(h, dout + i * C, C, live, filled, 1.0f, h.dout);
            transpose(h, h.q, vecs, h.qt);
            transpose(h, h.dout, vecs, h.doutt);
            scores(h, h.k, h.qt, vecs, h.s);
            scores(h, h.v, h.doutt, vecs, h.ds);
            if (drop.on) {
                h.mask.draw(drop, SITE, uint64_t((b * call.H + head) * N + i) * N, live * N);
                h.mask.apply(h.ds, QUERIES, N, vecs, drop.scale);
            }
            const float* lse = call.lse + (b * call.H + head) * N + i;
            for (long v = 0; v < vecs; ++v)
                softmax_backward(h.s + v * LANES, h.ds + v * LANES, N, set1(logits.base),
                                 load(lse + v * LANES, int(std::min<long>(LANES, live - v * LANES))));
            if (drop.on) h.mask.apply(h.s, QUERIES, N, vecs, drop.scale);
            Vec scale[QUERIES / LANES];
            for (Vec& x : scale) x = set1(float(call.scale));
            gather(h, h.ds, h.k, live, vecs, scale);
            unstage(h, h.row, live, dq + i * stride, stride);
            scatter(h, h.ds, h.q, live, h.dk);
            scatter(h, h.s, h.dout, live, h.dv);
        }
        fold(h, h.dk, logits.sign * float(call.scale));
        fold(h, h.dv, 1.0f);
        unstage(h, h.dk, N, dq + C, stride);
        unstage(h, h.dv, N, dq + 2 * C, stride);
    }
};

// Calls task(head's buffers, image, head) for every head of every image, on all threads.
template <class Task> void for_each_head(const Attention& call, bool backward, Task task) {
    const long bytes = make_head(call).lay_out(nullptr, backward, call.dropout_p > 0.0);
#pragma omp parallel num_threads(call.threads)
    {
        Head h = make_head(call);
        h.lay_out(static_cast<char*>(call.workspace) + omp_get_thread_num() * bytes, backward, call.dropout_p > 0.0);
#pragma omp for schedule(static)
        for (long task_id = 0; task_id < call.B * call.H; ++task_id) task(h, task_id / call.H, task_id % call.H);
    }
}

template <class T> void forward(const Attention& call, T* out) {
    for_each_head(call, false, [&](Head& h, long b, long head) {
        if (is_narrow(h.D))
            Kernel<LANES == 16>::forward(call, h, b, head, out);
        else
            Kernel<false>::forward(call, h, b, head, out);
    });
}

template <class T> void backward(const Attention& call, const T* grad, T* dqkv) {
    for_each_head(call, true, [&](Head& h, long b, long head) {
        if (is_narrow(h.D))
            Kernel<LANES == 16>::backward(call, h, b, head, grad, dqkv);
        else
            Kernel<false>::backward(call, h, b, head, grad, dqkv);
    });
}

}  // namespace

long attention_workspace(const Attention& call, bool backward) {
    return call.threads * make_head(call).lay_out(nullptr, backward, call.dropout_p > 0.0);
}

void attention_forward(const Attention& call, void* out) {
    call.is_bf16 ? forward(call, static_cast<bf16*>(out)) : forward(call, static_cast<float*>(out));
}

void attention_backward(const Attention& call, const void* grad, void* dqkv) {
    call.is_bf16 ? backward(call, static_cast<const bf16*>(grad), static_cast<bf16*>(dqkv))
                 : backward(call, static_cast<const float*>(grad), static_cast<float*>(dqkv));
}

}  // namespace deit
