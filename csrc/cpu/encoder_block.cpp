// qkv = LN1(x) W_qkv^T + b;  y = attention(qkv);  h = x + drop(y W_proj^T + b);  out = h + MLP(LN2(h)).
//
// The kernels are those of the four ops, and so is every bit of the result. For one image of 66 tokens of width 64 four
// calls from Python take longer than the kernels do.
#include "encoder_block.h"

namespace deit {
namespace {

// Gives what lies between the kernels its place where the caller has none, and returns the bytes used.
long place_activations(EncoderBlock& call, void* workspace) {
    Arena arena(workspace);
    const auto place = [&](void*& p, long width) {
        if (!p) p = arena.take((call.proj.M * width + 1) / (call.proj.is_bf16 ? 2 : 1));
    };
    place(call.qkv_out, call.qkv.F), place(call.y, call.proj.C), place(call.h, call.proj.F);
    return arena.used();
}

}  // namespace

long encoder_block_workspace(const EncoderBlock& call) {
    EncoderBlock placed = call;
    return place_activations(placed, nullptr) +
           std::max({layernorm_linear_workspace(call.qkv, false), attention_workspace(call.attention, false),
                     linear_residual_workspace(call.proj, false), layernorm_mlp_workspace(call.mlp, false)});
}

void encoder_block_forward(EncoderBlock call, void* workspace, void* out) {
    void* rest = static_cast<char*>(workspace) + place_activations(call, workspace);
    call.qkv.workspace = call.attention.workspace = call.proj.workspace = call.mlp.workspace = rest;
    call.qkv.x = call.x, call.attention.qkv = call.qkv_out, call.proj.x = call.y, call.mlp.x = call.h;
    layernorm_linear_forward(call.qkv, call.qkv_out);
    attention_forward(call.attention, call.y);
    linear_residual_forward(call.proj, call.x, call.h);
    layernorm_mlp_forward(call.mlp, out);
}

}  // namespace deit
