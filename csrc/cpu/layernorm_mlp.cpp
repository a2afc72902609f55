// x + row_scale dropout(W2 dropout(gelu(W1 LN(x) + b1)) + b2) and its gradients, with the hidden activations only in
// cache.
//
// A tile of token rows goes through LayerNorm, then for each block of hidden features through W1, GELU, dropout and
// that block's part of W2. Backward walks the same way, computing the hidden activations again (one product of the six)
// instead of keeping them (4 F bytes a token written and read): for each block
//
//   u = W1 LN(x) + b1         h = mask gelu(u)              dW2 += d^T h        (d: gradient entering the branch)
//   dh = d W2                 du = mask dh gelu'(u)         dW1^T += LN(x)^T du  db1 += sum du      dLN += du W1
#include <omp.h>

#include "ops.h"

namespace deit {
namespace {

constexpr long FORWARD_TILE = 48;  // rows
constexpr long BLOCK = 256;                            // hidden features at a time
constexpr uint32_t SITE_HIDDEN = 2, SITE_OUTPUT = 3;

long block_width(long F) { return std::min(BLOCK / NR * NR, padded(F)); }

struct Shared {  // parameters, converted and packed; w1_direct and w2_direct for backward
    float *ln_weight, *ln_bias, *b1, *b2, *w1, *w2, *w1_direct;
    Shared(Arena& arena, long C, long F, long w1_words, long w2_words, long w1_direct_words)
        : ln_weight(arena.take(padded(C))), ln_bias(arena.take(padded(C))), b1(arena.take(padded(F))),
            b2(arena.take(padded(C))),
          w1(arena.take(w1_words)), w2(arena.take(w2_words)), w1_direct(arena.take(w1_direct_words)) {}
    template <class E> static Shared forward(Arena& arena, const LayerNormMlp& a) {
        return Shared(arena, a.C, a.F, packing_words<E>(a.fc1_weight, a.C, a.F),
                      packing_words<E>(a.fc2_weight, a.F, a.C), 0);
    }
    template <class E> static Shared backward(Arena& arena, long C, long F) {
        return Shared(arena, C, F, packed_words<E>(C, F), packed_words<E>(C, F), packed_words<E>(F, C));
    }
    LayerNorm load(const LayerNormMlp& a) const {
        copy_vector(a.ln_weight, a.C, ln_weight);
        copy_vector(a.ln_bias, a.C, ln_bias);
        copy_vector(a.fc1_bias, a.F, b1);
        copy_vector(a.fc2_bias, a.C, b2);
        return {ln_weight, ln_bias, a.C, float(a.eps)};
    }
};

template <class E> struct ForwardScratch {
    Tile<E> normal, h;
    float *u, *y, *room;  // u (TILE, GROUP), y (TILE, C)
    ForwardScratch(Arena& arena, long C, long F)
        : normal(arena.tile<E>(FORWARD_TILE, C)), h(arena.tile<E>(FORWARD_TILE, block_width(F))),
          u(arena.take(FORWARD_TILE * GROUP)), y(arena.take(FORWARD_TILE * padded(C))),
          room(arena.take(Branch::room(std::max(C, GROUP)))) {}
};

template <class E> struct BackwardScratch {
    Tile<E> normal, grad, h, du;
    // u, dh (R, GROUP), dnormal (R, C)
    float *normal_tokens, *grad_tokens, *h_tokens, *du_tokens, *u, *dh, *dnormal, *room;
    BackwardScratch(Arena& arena, long C, long F, long R)
        : normal(arena.tile<E>(R, C)), grad(arena.tile<E>(R, C)),
          h(arena.tile<E>(R, block_width(F))), du(arena.tile<E>(R, block_width(F))),
          normal_tokens(tokens(arena, R, C)), grad_tokens(tokens(arena, R, C)), h_tokens(tokens(arena, R,
              block_width(F))),
          du_tokens(tokens(arena, R, block_width(F))), u(arena.take(R * GROUP)), dh(arena.take(R * GROUP)),
          dnormal(arena.take(R * padded(C))), room(arena.take(Branch::room(std::max(C, GROUP)))) {}
    static float* tokens(Arena& arena, long rows, long width) { return arena.take(token_room(rows, width)); }
};

struct Partial {  // one chunk's sums: dfc1 is (C, F), transposed; dfc2 (C, F)
    long C, F;
    long dln_weight = 0, dln_bias = padded(C), db1 = 2 * padded(C), db2 = db1 + padded(F);
    long sums = db2 + padded(C), dfc1 = sums;
    long dfc2 = dfc1 + padded(C) * padded(F), words = dfc2 + padded(C) * padded(F);
};

// h = mask gelu(u + b1) for the `cols` features from `col` of the rows row .. row + rows - 1; u (rows, GROUP).
template <class E>
void activate(const Branch& hidden, long row, long rows, long col, long cols, const float* u, const float* b1,
              Tile<E> h, long at, float* room) {
    for (long r = 0; r < rows; ++r) {
        const float* keep = hidden.drop.on ? dropout_row(hidden.drop, SITE_HIDDEN,
                                                         uint64_t(row + r) * hidden.width + col, cols, room) : nullptr;
        for (long c = 0; c < cols; c += LANES) {
            Vec v = gelu(load(u + r * GROUP + c) + load(b1 + col + c));
            if (keep) v *= load(keep + c);
            store(h.row(r) + at + c, v);
        }
    }
}

// The same with the gradient: du = mask dh gelu'(u + b1).
template <class E>
void activate_backward(const Branch& hidden, long row, long rows, long col, long cols, const float* u, const float* b1,
                       const float* dh, Tile<E> h, Tile<E> du, long at, float* room) {
    for (long r = 0; r < rows; ++r) {
        const float* keep = hidden.drop.on ? dropout_row(hidden.drop, SITE_HIDDEN,
                                                         uint64_t(row + r) * hidden.width + col, cols, room) : nullptr;
        for (long c = 0; c < cols; c += LANES) {
            Vec slope, v = gelu(load(u + r * GROUP + c) + load(b1 + col + c), slope);
            slope *= load(dh + r * GROUP + c);
            if (keep) v *= load(keep + c), slope *= load(keep + c);
            store(h.row(r) + at + c, v);
            store(du.row(r) + at + c, slope);
        }
    }
}

template <class T> void forward(const LayerNormMlp& a, T* out) {
    using E = Operand<T>;
    const long C = a.C, F = a.F, width = block_width(F);
    const T* x = static_cast<const T*>(a.x);
    float *means = static_cast<float*>(a.mean), *rstds = static_cast<float*>(a.rstd);
    const Branch hidden = a.residual.branch(SITE_HIDDEN, F), output = a.residual.branch(SITE_OUTPUT, C);
    Arena arena(a.workspace);
    const Shared shared = Shared::forward<E>(arena, a);
    const LayerNorm ln = shared.load(a);
    const Panels w1 = panels<E>(a.fc1_weight, C, shared.w1), w2 = panels<E>(a.fc2_weight, F, shared.w2);
    const long tile = std::min(FORWARD_TILE, padded((a.M + a.threads - 1) / a.threads, MR));
#pragma omp parallel num_threads(a.threads)
    {
        const TileRegisters<E> registers;
        const auto s = scratch<ForwardScratch<E>>(arena, omp_get_thread_num(), C, F);
        float mean[FORWARD_TILE], rstd[FORWARD_TILE];
#pragma omp for nowait
        for (long j = 0; j < panels_to_pack(a.fc1_weight, F); ++j) pack_transposed<E>(a.fc1_weight, C, F, j, shared.w1);
#pragma omp for
        for (long j = 0; j < panels_to_pack(a.fc2_weight, C); ++j) pack_transposed<E>(a.fc2_weight, F, C, j, shared.w2);
#pragma omp for schedule(dynamic)
        for (long row = 0; row < a.M; row += tile) {
            const long rows = std::min(tile, a.M - row);
            for (long r = 0; r < rows; ++r) row_statistics(ln, x + (row + r) * C, mean[r], rstd[r]);
            if (means) std::copy(mean, mean + rows, means + row), std::copy(rstd, rstd + rows, rstds + row);
            normalise(ln, x + row * C, rows, mean, rstd, s.normal);
            for (long block = 0; block < padded(F); block += width) {
                const long cols = std::min(width, padded(F) - block);
                for (long c = 0; c < cols; c += GROUP) {
                    const long group = std::min(GROUP, cols - c);
                    multiply<E>(rows, group / NR, padded(C) / PER_WORD<E>, s.normal.rows(), w1.from((block + c) / NR),
                                s.u, GROUP, false);
                    activate(hidden, row, rows, block + c, group, s.u, shared.b1, s.h, c, s.room);
                }
                multiply<E>(rows, padded(C) / NR, cols / PER_WORD<E>, s.h.rows(),
                            {w2.p + block / PER_WORD<E> * NR, w2.panel, NR}, s.y, padded(C), block > 0);
            }
            add_branch(output, row, rows, 0, padded(C), s.y, padded(C), shared.b2, x, out, s.room);
        }
    }
}

struct Grads {
    Param ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};

template <class T> void backward(const LayerNormMlp& a, const T* grad, T* dx, const Grads& to) {
    using E = Operand<T>;
    const long C = a.C, F = a.F, width = block_width(F);
    const T* x = static_cast<const T*>(a.x);
    const float *means = static_cast<const float*>(a.mean), *rstds = static_cast<const float*>(a.rstd);
    const Branch hidden = a.residual.branch(SITE_HIDDEN, F), output = a.residual.branch(SITE_OUTPUT, C);
    const Partial at{C, F};
    const Chunks chunks(a.M, at.words);
    const bool weights = to.fc1_weight.p || to.fc2_weight.p;
    Arena arena(a.workspace);
    const Shared shared = Shared::backward<E>(arena, C, F);
    const LayerNorm ln = shared.load(a);
    const Panels w1 = packed<E>(shared.w1, C), w2 = packed<E>(shared.w2, C), w1_direct = packed<E>(shared.w1_direct, F);
    float* partials = arena.take(chunks.count * at.words);
    const long tile = backward_tile(C);
#pragma omp parallel num_threads(a.threads)
    {
        const TileRegisters<E> registers;
        const auto s = scratch<BackwardScratch<E>>(arena, omp_get_thread_num(), C, F, tile);
#pragma omp for nowait
        for (long j = 0; j < padded(F) / NR; ++j) {
            pack_transposed<E>(a.fc1_weight, C, F, j, shared.w1);
            pack_direct<E>(a.fc2_weight, C, F, j, shared.w2);
        }
#pragma omp for
        for (long j = 0; j < padded(C) / NR; ++j) pack_direct<E>(a.fc1_weight, F, C, j, shared.w1_direct);
#pragma omp for schedule(dynamic)
        for (long chunk = 0; chunk < chunks.count; ++chunk) {
            float* partial = partials + chunk * at.words;
            const long begin = chunks.begin(chunk), end = chunks.begin(chunk + 1);
            // the first tile sets the weights' part
            std::fill(partial, partial + (begin < end ? at.sums : at.words), 0.0f);
            for (long row = begin; row < end; row += tile) {
                const long rows = std::min(tile, end - row), tokens = token_words<E>(rows);
                normalise(ln, x + row * C, rows, means + row, rstds + row, s.normal);
                zero_rest(s.normal, rows, C);
                branch_gradient(output, row, rows, grad, s.grad, partial + at.db2, s.room);
                const Words normal = token_columns(s.normal, rows, C, s.normal_tokens), d = token_columns(s.grad,
                    rows, C, s.grad_tokens);
                for (long block = 0; block < padded(F); block += width) {
                    const long cols = std::min(width, padded(F) - block);
                    for (long c = 0; c < cols; c += GROUP) {
                        const long j = (block + c) / NR, group = std::min(GROUP, cols - c);
                        multiply<E>(rows, group / NR, padded(C) / PER_WORD<E>, s.normal.rows(), w1.from(j), s.u, GROUP,
                                    false);
                        multiply<E>(rows, group / NR, padded(C) / PER_WORD<E>, s.grad.rows(), w2.from(j), s.dh, GROUP,
                                    false);
                        activate_backward(hidden, row, rows, block + c, group, s.u, shared.b1, s.dh, s.h, s.du, c,
                                          s.room);
                    }
                    add_column_sums(s.du, rows, cols, partial + at.db1 + block);
                    if (weights) {
                        zero_rest(s.h, rows, cols), zero_rest(s.du, rows, cols);
                        multiply<E>(C, cols / NR, tokens, d, token_panels(s.h, rows, cols, s.h_tokens),
                                    partial + at.dfc2 + block, padded(F), row > begin);
                        multiply<E>(C, cols / NR, tokens, normal, token_panels(s.du, rows, cols, s.du_tokens),
                                    partial + at.dfc1 + block, padded(F), row > begin);
                    }
                    multiply<E>(rows, padded(C) / NR, cols / PER_WORD<E>, s.du.rows(),
                                {w1_direct.p + block / PER_WORD<E> * NR, w1_direct.panel, NR}, s.dnormal, padded(C),
                                    block > 0);
                }
                layernorm_gradient<T>(ln, x + row * C, rows, means + row, rstds + row, s.dnormal, padded(C),
                                      grad + row * C,
                                      dx + row * C, partial + at.dln_weight, partial + at.dln_bias);
            }
        }
#pragma omp for nowait
        for (long f = 0; f < F; f += LANES)
            if (to.fc1_weight.p) sum_transposed(partials + at.dfc1, chunks, at.words, f, padded(F), F, C,
                                                to.fc1_weight);
#pragma omp for nowait
        for (long c = 0; c < C; ++c)
            if (to.fc2_weight.p) sum_row(partials + at.dfc2, chunks, at.words, c, padded(F), F, to.fc2_weight);
#pragma omp single
        {
            if (to.ln_weight.p) sum_row(partials + at.dln_weight, chunks, at.words, 0, 0, C, to.ln_weight);
            if (to.ln_bias.p) sum_row(partials + at.dln_bias, chunks, at.words, 0, 0, C, to.ln_bias);
            if (to.fc1_bias.p) sum_row(partials + at.db1, chunks, at.words, 0, 0, F, to.fc1_bias);
            if (to.fc2_bias.p) sum_row(partials + at.db2, chunks, at.words, 0, 0, C, to.fc2_bias);
        }
    }
}

template <class E> long workspace(const LayerNormMlp& a, bool backward) {
    Arena arena(nullptr);
    if (backward) {
        Shared::backward<E>(arena, a.C, a.F);
        const Partial at{a.C, a.F};
        arena.take(Chunks(a.M, at.words).count * at.words);
    } else {
        Shared::forward<E>(arena, a);
    }
    for (int t = 0; t < a.threads; ++t) {
        if (backward) BackwardScratch<E>(arena, a.C, a.F, backward_tile(a.C));
        else ForwardScratch<E>(arena, a.C, a.F);
    }
    return arena.used();
}

}  // namespace

long layernorm_mlp_workspace(const LayerNormMlp& a, bool backward) {
    return a.is_bf16 ? workspace<Operand<bf16>>(a, backward) : workspace<float>(a, backward);
}

void layernorm_mlp_forward(const LayerNormMlp& a, void* out) {
    if (a.is_bf16) forward(a, static_cast<bf16*>(out));
    else forward(a, static_cast<float*>(out));
}

void layernorm_mlp_backward(const LayerNormMlp& a, const void* grad, void* dx, Param dln_weight, Param dln_bias,
                            Param dfc1_weight,
                            Param dfc1_bias, Param dfc2_weight, Param dfc2_bias) {
    const Grads to{dln_weight, dln_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias};
    if (a.is_bf16) backward(a, static_cast<const bf16*>(grad), static_cast<bf16*>(dx), to);
    else backward(a, static_cast<const float*>(grad), static_cast<float*>(dx), to);
}

}  // namespace deit
