// LN(x) W^T + b and its gradients. A tile of token rows is normalised into operands once and meets all panels of W in
// cache.
//
// Backward, for each tile: d = grad; dW^T += LN(x)^T d and db += sum d (per chunk of rows); dLN = d W; then
// LayerNorm's gradient.
#include <omp.h>

#include "ops.h"

namespace deit {
namespace {

constexpr long TILE = 96;  // rows of a forward tile: W's panels are read from L2 once for each

struct Shared {  // parameters, converted and packed
    float *ln_weight, *ln_bias, *bias, *weight;
    Shared(Arena& arena, long C, long F, long weight_words)
        : ln_weight(arena.take(padded(C))), ln_bias(arena.take(padded(C))), bias(arena.take(padded(F))),
          weight(arena.take(weight_words)) {}
    LayerNorm load(const LayerNormLinear& a) const {
        copy_vector(a.ln_weight, a.C, ln_weight);
        copy_vector(a.ln_bias, a.C, ln_bias);
        copy_vector(a.bias, a.F, bias);
        return {ln_weight, ln_bias, a.C, float(a.eps)};
    }
};

template <class E> struct ForwardScratch {
    Tile<E> normal;
    float* y;  // (TILE, NR)
    ForwardScratch(Arena& arena, long C) : normal(arena.tile<E>(TILE, C)), y(arena.take(TILE * NR)) {}
};

template <class E> struct BackwardScratch {
    Tile<E> normal, grad;
    float *normal_tokens, *grad_tokens, *dnormal;  // dnormal (R, C)
    BackwardScratch(Arena& arena, long C, long F, long R)
        : normal(arena.tile<E>(R, C)), grad(arena.tile<E>(R, F)), normal_tokens(arena.take(token_room(R, C))),
          grad_tokens(arena.take(token_room(R, F))), dnormal(arena.take(R * padded(C))) {}
};

struct Partial {  // one chunk's sums
    long C, F;
    // dweight (C, F)
    long dln_weight = 0, dln_bias = padded(C), dbias = 2 * padded(C), sums = dbias + padded(F), dweight = sums;
    long words = dweight + padded(C) * padded(F);
};

template <class T> void forward(const LayerNormLinear& a, T* out) {
    using E = Operand<T>;
    const long C = a.C, F = a.F;
    const T* x = static_cast<const T*>(a.x);
    float *means = static_cast<float*>(a.mean), *rstds = static_cast<float*>(a.rstd);
    Arena arena(a.workspace);
    const Shared shared(arena, C, F, packing_words<E>(a.weight, C, F));
    const LayerNorm ln = shared.load(a);
    const Panels weight = panels<E>(a.weight, C, shared.weight);
    const long tile = std::min(TILE, padded((a.M + a.threads - 1) / a.threads, MR));
#pragma omp parallel num_threads(a.threads)
    {
        const TileRegisters<E> registers;
        const auto s = scratch<ForwardScratch<E>>(arena, omp_get_thread_num(), C);
        float mean[TILE], rstd[TILE];
#pragma omp for
        for (long j = 0; j < panels_to_pack(a.weight, F); ++j) pack_transposed<E>(a.weight, C, F, j, shared.weight);
#pragma omp for schedule(dynamic)
        for (long row = 0; row < a.M; row += tile) {
            const long rows = std::min(tile, a.M - row);
            for (long r = 0; r < rows; ++r) row_statistics(ln, x + (row + r) * C, mean[r], rstd[r]);
            if (means) std::copy(mean, mean + rows, means + row), std::copy(rstd, rstd + rows, rstds + row);
            normalise(ln, x + row * C, rows, mean, rstd, s.normal);
            for (long j = 0; j < padded(F) / NR; ++j) {
                multiply<E>(rows, 1, padded(C) / PER_WORD<E>, s.normal.rows(), {weight.p + j * weight.panel, 0, NR},
                            s.y, NR, false);
                for (long r = 0; r < rows; ++r)
                    for (int v = 0; v < NV; ++v)
                        store_in(out + (row + r) * F, j * NR + v * LANES, F,
                                 load(s.y + r * NR + v * LANES) + load(shared.bias + j * NR + v * LANES));
            }
        }
    }
}

template <class T>
void backward(const LayerNormLinear& a, const T* grad, T* dx, Param dln_weight, Param dln_bias, Param dweight,
              Param dbias) {
    using E = Operand<T>;
    const long C = a.C, F = a.F;
    const T* x = static_cast<const T*>(a.x);
    const float *means = static_cast<const float*>(a.mean), *rstds = static_cast<const float*>(a.rstd);
    const Partial at{C, F};
    const Chunks chunks(a.M, at.words);
    Arena arena(a.workspace);
    const Shared shared(arena, C, F, packed_words<E>(F, C));
    const LayerNorm ln = shared.load(a);
    const Panels weight = packed<E>(shared.weight, F);
    float* partials = arena.take(chunks.count * at.words);
    const long tile = backward_tile(C);
#pragma omp parallel num_threads(a.threads)
    {
        const TileRegisters<E> registers;
        const auto s = scratch<BackwardScratch<E>>(arena, omp_get_thread_num(), C, F, tile);
#pragma omp for
        for (long j = 0; j < padded(C) / NR; ++j) pack_direct<E>(a.weight, F, C, j, shared.weight);
#pragma omp for schedule(dynamic)
        for (long chunk = 0; chunk < chunks.count; ++chunk) {
            float* partial = partials + chunk * at.words;
            const long begin = chunks.begin(chunk), end = chunks.begin(chunk + 1);
            // the first tile sets the weights' part
            std::fill(partial, partial + (begin < end ? at.sums : at.words), 0.0f);
            for (long row = begin; row < end; row += tile) {
                const long rows = std::min(tile, end - row);
                const Tile<E> d = tile_of(grad + row * F, rows, F, s.grad);
                add_column_sums(d, rows, F, partial + at.dbias);
                if (dweight.p) {
                    normalise(ln, x + row * C, rows, means + row, rstds + row, s.normal);
                    zero_rest(s.normal, rows, C), zero_rest(d, rows, F);
                    multiply<E>(C, padded(F) / NR, token_words<E>(rows), token_columns(s.normal, rows, C,
                        s.normal_tokens),
                                token_panels(d, rows, F, s.grad_tokens), partial + at.dweight, padded(F), row > begin);
                }
                multiply<E>(rows, padded(C) / NR, padded(F) / PER_WORD<E>, d.rows(), weight, s.dnormal, padded(C),
                            false);
                layernorm_gradient<T>(ln, x + row * C, rows, means + row, rstds + row, s.dnormal, padded(C), nullptr,
                                      dx + row * C, partial + at.dln_weight, partial + at.dln_bias);
            }
        }
#pragma omp for nowait
        for (long f = 0; f < F; f += LANES)
            if (dweight.p) sum_transposed(partials + at.dweight, chunks, at.words, f, padded(F), F, C, dweight);
#pragma omp single
        {
            if (dln_weight.p) sum_row(partials + at.dln_weight, chunks, at.words, 0, 0, C, dln_weight);
            if (dln_bias.p) sum_row(partials + at.dln_bias, chunks, at.words, 0, 0, C, dln_bias);
            if (dbias.p) sum_row(partials + at.dbias, chunks, at.words, 0, 0, F, dbias);
        }
    }
}

template <class E> long workspace(const LayerNormLinear& a, bool backward) {
    Arena arena(nullptr);
    Shared(arena, a.C, a.F, backward ? packed_words<E>(a.F, a.C) : packing_words<E>(a.weight, a.C, a.F));
    if (backward) {
        const Partial at{a.C, a.F};
        arena.take(Chunks(a.M, at.words).count * at.words);
    }
    for (int t = 0; t < a.threads; ++t) {
        if (backward) BackwardScratch<E>(arena, a.C, a.F, backward_tile(a.C));
        else ForwardScratch<E>(arena, a.C);
    }
    return arena.used();
}

}  // namespace

long layernorm_linear_workspace(const LayerNormLinear& a, bool backward) {
    return a.is_bf16 ? workspace<Operand<bf16>>(a, backward) : workspace<float>(a, backward);
}

void layernorm_linear_forward(const LayerNormLinear& a, void* out) {
    if (a.is_bf16) forward(a, static_cast<bf16*>(out));
    else forward(a, static_cast<float*>(out));
}

void layernorm_linear_backward(const LayerNormLinear& a, const void* grad, void* dx, Param dln_weight, Param dln_bias,
                               Param dweight, Param dbias) {
    if (a.is_bf16)
        backward(a, static_cast<const bf16*>(grad), static_cast<bf16*>(dx), dln_weight, dln_bias, dweight, dbias);
    else
        backward(a, static_cast<const float*>(grad), static_cast<float*>(dx), dln_weight, dln_bias, dweight, dbias);
}

}  // namespace deit
