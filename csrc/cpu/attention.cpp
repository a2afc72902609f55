// Attention with the queries in the lanes: a tile holds S^T, (N keys, QUERIES queries), so a row of the softmax lies
// along one lane, and maximum, sum and weights need no reduction across lanes. K is broadcast element by element, and
// so is the tile when it multiplies V: no operand but Q is ever transposed, and all products are the one of
// attention_product.h.
//
// One thread takes a head of an image: K and V are staged once as fp32, then blocks of QUERIES queries see all keys, so
// memory grows with N, not N^2, and each (image, head) is computed in one order whatever the number of threads.
//
// Backward draws P again from S and the saved row sums (4 bytes per token and head). With dO the gradient of the
// output:
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(P dP)),  dQ = dS K scale,  dK = dS^T Q scale.
//
// The roofline: instructions of the two vector ports for 16 queries and one key at D = 8 on AVX-512. Forward 8
// multiply-adds for S, 8 for P V, 1 max, 1 to shift, 8 for 2^x, 1 sum = 27; backward 8 each for S, dP, dQ, dV, dK, 10
// for P, 4 for dS = 54; dropout's Philox about 35 more in each. For D = 64: 139 and 334. At 3.8 GHz 66 tokens of D = 8
// (272 such units a head) then take 0.97 and 1.94 us; measured 1.7 and 3.5 (57 and 54 %; 49 and 43 % when the qkv of 64
// images comes from beyond L2); D = 64 runs at 55 to 65 %. The 64 queries that fill their lanes run at 77 %; the rest
// is staging and the last 2 queries.
#include "attention.h"

#include <omp.h>

#include "attention_head.h"
#include "attention_lanes.h"
#include "attention_tail.h"

namespace deit {
namespace {

// Calls visit(first query, block) for the blocks of a head's queries.
template <class Visit> void for_each_block(const Attention& call, long b, long head, Visit visit) {
    const long row = (b * call.H + head) * call.N;
    const Dropout drop = make_dropout(call.dropout_p, call.seed);
    for (long i = 0; i < call.N; i += QUERIES) {
        const Queries block{std::min(QUERIES, call.N - i), make_logits(call.scale), drop, uint64_t(row + i) * call.N,
                            call.lse ? call.lse + row + i : nullptr, float(call.scale)};
        visit(i, block);
    }
}

template <bool NARROW, class T> void forward_head(const Attention& call, Head& h, long b, long head, T* out) {
    using R = Rows<NARROW>;
    const long N = h.N, C = call.H * h.D, stride = 3 * C;
    const T* q = static_cast<const T*>(call.qkv) + b * N * stride + head * h.D;
    R::stage(h, q + C, stride, N, 1.0f, h.k);
    R::stage(h, q + 2 * C, stride, N, 1.0f, h.v);
    for_each_block(call, b, head, [&](long i, const Queries& block) {
        R::stage(h, q + i * stride, stride, block.live, block.logits.sign, h.q);
        block.live <= KeysInLanes<NARROW>::MOST ? KeysInLanes<NARROW>::forward(h, block)
                                                : QueriesInLanes<NARROW>::forward(h, block);
        R::unstage(h, h.row, block.live, 1.0f, out + (b * N + i) * C + head * h.D, C);
    });
}

template <bool NARROW, class T>
void backward_head(const Attention& call, Head& h, long b, long head, const T* grad, T* dqkv) {
    using R = Rows<NARROW>;
    const long N = h.N, C = call.H * h.D, stride = 3 * C, first = b * N * stride + head * h.D;
    const T* q = static_cast<const T*>(call.qkv) + first;
    const T* dout = grad + b * N * C + head * h.D;
    T* dq = dqkv + first;
    R::stage(h, q + C, stride, N, 1.0f, h.k);
    R::stage(h, q + 2 * C, stride, N, 1.0f, h.v);
    std::fill(h.dk, h.dk + N * h.sum_pitch(), 0.0f);
    std::fill(h.dv, h.dv + N * h.sum_pitch(), 0.0f);
    for_each_block(call, b, head, [&](long i, const Queries& block) {
        R::stage(h, q + i * stride, stride, block.live, block.logits.sign, h.q);
        R::stage(h, dout + i * C, C, block.live, 1.0f, h.dout);
        block.live <= KeysInLanes<NARROW>::MOST ? KeysInLanes<NARROW>::backward(h, block)
                                                : QueriesInLanes<NARROW>::backward(h, block);
        R::unstage(h, h.row, block.live, 1.0f, dq + i * stride, stride);
    });
    R::unstage_sums(h, h.dk, make_logits(call.scale).sign * float(call.scale), dq + C, stride);
    R::unstage_sums(h, h.dv, 1.0f, dq + 2 * C, stride);
}

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
            forward_head<LANES == 16>(call, h, b, head, out);
        else
            forward_head<false>(call, h, b, head, out);
    });
}

template <class T> void backward(const Attention& call, const T* grad, T* dqkv) {
    for_each_head(call, true, [&](Head& h, long b, long head) {
        if (is_narrow(h.D))
            backward_head<LANES == 16>(call, h, b, head, grad, dqkv);
        else
            backward_head<false>(call, h, b, head, grad, dqkv);
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
