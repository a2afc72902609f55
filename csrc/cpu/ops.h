// The kernels' arguments. Sizes: M rows (tokens of all images), C width, F output or hidden features. Tensors are
// contiguous; activations are of one type (`bf16` or not), parameters and their gradients each fp32 or bf16. A null
// pointer is an argument left out, or a gradient not asked for. `workspace` is a block of the bytes that the op's
// `..._workspace` names, aligned to 64.
#pragma once

#include "tile.h"

namespace deit {

// what happens to a residual branch: dropout with probability p, then row_scale (M / rows_per_sample,) fp32
struct Residual {
    double p;
    int64_t seed;
    const float* row_scale;
    long rows_per_sample;

    Branch branch(uint32_t site, long width) const {
        return {make_dropout(p, seed), site, row_scale, std::max(1L, rows_per_sample), width};
    }
};

struct LayerNormLinear {
    bool is_bf16;
    long M, C, F;
    double eps;
    void *x, *mean, *rstd;  // (M, C) and the rows' statistics (M,) fp32
    Param ln_weight, ln_bias, weight, bias;
    void* workspace;
    int threads;
};

struct LinearResidual {
    bool is_bf16;
    long M, C, F;
    void* x;  // (M, C)
    Param weight, bias;
    Residual residual;
    void* workspace;
    int threads;
};

struct LayerNormMlp {
    bool is_bf16;
    long M, C, F;
    double eps;
    void *x, *mean, *rstd;
    Param ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
    Residual residual;
    void* workspace;
    int threads;
};

// ..._workspace: bytes for forward, or for backward. forward: mean and rstd are written where not null. backward: reads
// them.
long layernorm_linear_workspace(const LayerNormLinear& call, bool backward);
void layernorm_linear_forward(const LayerNormLinear& call, void* out);
void layernorm_linear_backward(const LayerNormLinear& call, const void* grad, void* dx, Param dln_weight,
                               Param dln_bias,
                               Param dweight, Param dbias);

long linear_residual_workspace(const LinearResidual& call, bool backward);
void linear_residual_forward(const LinearResidual& call, const void* residual, void* out);
void linear_residual_backward(const LinearResidual& call, const void* grad, void* dx, Param dweight, Param dbias);

long layernorm_mlp_workspace(const LayerNormMlp& call, bool backward);
void layernorm_mlp_forward(const LayerNormMlp& call, void* out);
void layernorm_mlp_backward(const LayerNormMlp& call, const void* grad, void* dx, Param dln_weight, Param dln_bias,
                            Param dfc1_weight, Param dfc1_bias, Param dfc2_weight, Param dfc2_bias);

// Multiplications and additions a second from registers alone, all threads together: the peak that the products are
// compared with.
double multiply_rate(bool is_bf16, int threads, long passes);

}  // namespace deit
