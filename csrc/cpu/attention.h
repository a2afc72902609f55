// attention(qkv) = softmax(Q K^T scale) V on packed qkv (B, N, 3, H, D), forward and backward.
#pragma once

#include <cstdint>

namespace deit {

struct Attention {
    bool is_bf16;  // the type of qkv, out and their gradients; arithmetic is fp32
    long B, N, H, D;
    double scale, dropout_p;
    int64_t seed;
    const void* qkv;  // (B, N, 3, H, D)
    float* lse;       // (B, H, N): log2 of a row's sum of 2^(logit log2 e); forward writes it where not null
    int threads;
    void* workspace;  // of attention_workspace bytes, aligned to 64
};

long attention_workspace(const Attention& call, bool backward);
void attention_forward(const Attention& call, void* out);                      // out (B, N, H, D)
void attention_backward(const Attention& call, const void* grad, void* dqkv);  // grad (B, N, H, D), dqkv like qkv

}  // namespace deit
