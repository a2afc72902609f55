// residual + row_scale dropout(x W^T + b) and its gradients; bias, dropout, drop-path and addition are the product's
// epilogue.
//
// Backward, for each tile: d = grad row_scale mask / (1 - p), the mask drawn again; dW += d^T x and db += sum d (per
// chunk of rows); dx = d W. The residual's gradient is grad itself.
#include <omp.h>

#include "ops.h"

namespace deit {
namespace {

constexpr long TILE = 96;  // rows of a forward tile
constexpr uint32_t SITE = 1;

struct Shared {
    float *bias, *weight;
    Shared(Arena& arena, long F, long weight_words) : bias(arena.take(padded(F))), weight(arena.take(weight_words)) {}
};

template <class E> struct ForwardScratch {
    Tile<E> x;
    float *y, *room;  // y (TILE, GROUP)
    ForwardScratch(Arena& arena, long C)
        : x(arena.tile<E>(TILE, C)), y(arena.take(TILE * GROUP)), room(arena.take(Branch::room(GROUP))) {}
};

template <class E> struct BackwardScratch {
    Tile<E> x, grad;
    float *x_tokens, *grad_tokens, *dx, *room;  // dx (R, NR)
    BackwardScratch(Arena& arena, long C, long F, long R)
        : x(arena.tile<E>(R, C)), grad(arena.tile<E>(R, F)), x_tokens(arena.take(token_room(R, C))),
          grad_tokens(arena.take(token_room(R, F))), dx(arena.take(R * NR)), room(arena.take(Branch::room(F))) {}
};

struct Partial {
    long C, F;
    long dbias = 0, sums = padded(F), dweight = sums;  // dweight (F, C)
    long words = dweight + padded(F) * padded(C);
};

template <class T> void forward(const LinearResidual& a, const T* residual, T* out) {
    using E = Operand<T>;
    const long C = a.C, F = a.F;
    const T* x = static_cast<const T*>(a.x);
    const Branch branch = a.residual.branch(SITE, F);
    Arena arena(a.workspace);
    const Shared shared(arena, F, packing_words<E>(a.weight, C, F));
    copy_vector(a.bias, F, shared.bias);
    const Panels weight = panels<E>(a.weight, C, shared.weight);
    const long tile = std::min(TILE, padded((a.M + a.threads - 1) / a.threads, MR));
#pragma omp parallel num_threads(a.threads)
    {
        const TileRegisters<E> registers;
        const auto s = scratch<ForwardScratch<E>>(arena, omp_get_thread_num(), C);
#pragma omp for
        for (long j = 0; j < panels_to_pack(a.weight, F); ++j) pack_transposed<E>(a.weight, C, F, j, shared.weight);
#pragma omp for schedule(dynamic)
        for (long row = 0; row < a.M; row += tile) {
            const long rows = std::min(tile, a.M - row);
            const Tile<E> tile_x = tile_of(x + row * C, rows, C, s.x);
            for (long col = 0; col < padded(F); col += GROUP) {
                const long cols = std::min(GROUP, padded(F) - col);
                multiply<E>(rows, cols / NR, padded(C) / PER_WORD<E>, tile_x.rows(), weight.from(col / NR), s.y, GROUP,
                            false);
                add_branch(branch, row, rows, col, cols, s.y, GROUP, shared.bias, residual, out, s.room);
            }
        }
    }
}

template <class T> void backward(const LinearResidual& a, const T* grad, T* dx, Param dweight, Param dbias) {
    using E = Operand<T>;
    const long C = a.C, F = a.F;
    const T* x = static_cast<const T*>(a.x);
    const Branch branch = a.residual.branch(SITE, F);
    const Partial at{C, F};
    const Chunks chunks(a.M, at.words);
    Arena arena(a.workspace);
    const Shared shared(arena, F, packed_words<E>(F, C));
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
                branch_gradient(branch, row, rows, grad, s.grad, partial + at.dbias, s.room);
                if (dweight.p) {
                    const Tile<E> tile_x = tile_of(x + row * C, rows, C, s.x);
                    zero_rest(tile_x, rows, C);
                    multiply<E>(F, padded(C) / NR, token_words<E>(rows), token_columns(s.grad, rows, F, s.grad_tokens),
                                token_panels(tile_x, rows, C, s.x_tokens), partial + at.dweight, padded(C),
                                    row > begin);
                }
                for (long j = 0; dx && j < padded(C) / NR; ++j) {
                    multiply<E>(rows, 1, padded(F) / PER_WORD<E>, s.grad.rows(), {weight.p + j * weight.panel, 0, NR},
                                s.dx, NR, false);
                    for (long r = 0; r < rows; ++r)
                        for (int v = 0; v < NV; ++v)
                            store_in(dx + (row + r) * C, j * NR + v * LANES, C, load(s.dx + r * NR + v * LANES));
                }
            }
        }
#pragma omp for nowait
        for (long f = 0; f < F; ++f)
            if (dweight.p) sum_row(partials + at.dweight, chunks, at.words, f, padded(C), C, dweight);
#pragma omp single
        if (dbias.p) sum_row(partials + at.dbias, chunks, at.words, 0, 0, F, dbias);
    }
}

template <class E> long workspace(const LinearResidual& a, bool backward) {
    Arena arena(nullptr);
    Shared(arena, a.F, backward ? packed_words<E>(a.F, a.C) : packing_words<E>(a.weight, a.C, a.F));
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

long linear_residual_workspace(const LinearResidual& a, bool backward) {
    return a.is_bf16 ? workspace<Operand<bf16>>(a, backward) : workspace<float>(a, backward);
}

void linear_residual_forward(const LinearResidual& a, const void* residual, void* out) {
    if (a.is_bf16) forward(a, static_cast<const bf16*>(residual), static_cast<bf16*>(out));
    else forward(a, static_cast<const float*>(residual), static_cast<float*>(out));
}

void linear_residual_backward(const LinearResidual& a, const void* grad, void* dx, Param dweight, Param dbias) {
    if (a.is_bf16) backward(a, static_cast<const bf16*>(grad), static_cast<bf16*>(dx), dweight, dbias);
    else backward(a, static_cast<const float*>(grad), static_cast<float*>(dx), dweight, dbias);
}

}  // namespace deit
