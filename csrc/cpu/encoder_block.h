// A whole encoder block, forward: layernorm_linear, attention, linear_residual and layernorm_mlp in one call.
#pragma once

#include "attention.h"
#include "ops.h"

namespace deit {

// The four calls with their sizes, parameters and what they save; the pointers of x are set by forward.
struct EncoderBlock {
    LayerNormLinear qkv;
    Attention attention;
    LinearResidual proj;
    LayerNormMlp mlp;
    void *x, *qkv_out, *y, *h;  // x (B, N, C); qkv (B, N, 3C), y and h (B, N, C), or null: they lie in the workspace
};

long encoder_block_workspace(const EncoderBlock& call);
void encoder_block_forward(EncoderBlock call, void* workspace, void* out);  // out (B, N, C)

}  // namespace deit
