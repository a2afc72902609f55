// Python's view of the GEMM ops: an object per call, which names the bytes of workspace that it needs and then runs in
// it.
#include "bind.h"

namespace py = pybind11;
using namespace deit;

namespace {

template <class E> void pack(Param weight, long K, long N, void* to) {
    for (long j = 0; j < padded(N) / NR; ++j) pack_transposed<E>(weight, K, N, j, static_cast<float*>(to));
}

template <class Call> Call in(Call call, Pointer workspace) {
    call.workspace = at(workspace);
    return call;
}

}  // namespace

void bind_gemm_ops(py::module_& m) {
    m.def("multiply_rate", &multiply_rate, NoGil());
    m.def("packed_bytes", [](bool is_bf16, long K, long N) {
        return 4 * (is_bf16 ? packed_words<Operand<bf16>>(K, N) : packed_words<float>(K, N));
    });
    m.def("pack", [](bool is_bf16, long K, long N, ParamArg weight, Pointer to) {
        if (is_bf16) pack<Operand<bf16>>(param(weight), K, N, at(to));
        else pack<float>(param(weight), K, N, at(to));
    });
    py::class_<LayerNormLinear>(m, "LayerNormLinear", py::module_local())
        .def(py::init([](bool is_bf16, long M, long C, long F, double eps, Pointer x, Pointer mean, Pointer rstd,
                         ParamArg ln_weight, ParamArg ln_bias, ParamArg weight, ParamArg bias, int threads) {
            return LayerNormLinear{is_bf16, M, C, F, eps, at(x), at(mean), at(rstd), param(ln_weight), param(ln_bias),
                                   param(weight), param(bias), nullptr, threads};
        }))
        .def("workspace", &layernorm_linear_workspace)
        .def("forward", [](const LayerNormLinear& call, Pointer workspace, Pointer out) {
            layernorm_linear_forward(in(call, workspace), at(out));
        }, NoGil())
        .def("backward", [](const LayerNormLinear& call, Pointer workspace, Pointer grad, Pointer dx,
                            ParamArg dln_weight,
                            ParamArg dln_bias, ParamArg dweight, ParamArg dbias) {
            layernorm_linear_backward(in(call, workspace), at(grad), at(dx), param(dln_weight), param(dln_bias),
                                      param(dweight), param(dbias));
        }, NoGil());
    py::class_<LinearResidual>(m, "LinearResidual", py::module_local())
        .def(py::init([](bool is_bf16, long M, long C, long F, Pointer x, ParamArg weight, ParamArg bias, double p,
                         int64_t seed,
                         Pointer row_scale, long rows_per_sample, int threads) {
            return LinearResidual{is_bf16, M, C, F, at(x), param(weight), param(bias),
                                  residual(p, seed, row_scale, rows_per_sample), nullptr, threads};
        }))
        .def("workspace", &linear_residual_workspace)
        .def("forward", [](const LinearResidual& call, Pointer workspace, Pointer residual, Pointer out) {
            linear_residual_forward(in(call, workspace), at(residual), at(out));
        }, NoGil())
        .def("backward", [](const LinearResidual& call, Pointer workspace, Pointer grad, Pointer dx, ParamArg dweight,
                            ParamArg dbias) {
            linear_residual_backward(in(call, workspace), at(grad), at(dx), param(dweight), param(dbias));
        }, NoGil());
    py::class_<LayerNormMlp>(m, "LayerNormMlp", py::module_local())
        .def(py::init([](bool is_bf16, long M, long C, long F, double eps, Pointer x, Pointer mean, Pointer rstd,
                         ParamArg ln_weight, ParamArg ln_bias, ParamArg fc1_weight, ParamArg fc1_bias,
                             ParamArg fc2_weight,
                         ParamArg fc2_bias, double p, int64_t seed, Pointer row_scale, long rows_per_sample,
                             int threads) {
            return LayerNormMlp{is_bf16, M, C, F, eps, at(x), at(mean), at(rstd), param(ln_weight), param(ln_bias),
                                param(fc1_weight), param(fc1_bias), param(fc2_weight), param(fc2_bias),
                                residual(p, seed, row_scale, rows_per_sample), nullptr, threads};
        }))
        .def("workspace", &layernorm_mlp_workspace)
        .def("forward", [](const LayerNormMlp& call, Pointer workspace, Pointer out) {
            layernorm_mlp_forward(in(call, workspace), at(out));
        }, NoGil())
        .def("backward", [](const LayerNormMlp& call, Pointer workspace, Pointer grad, Pointer dx, ParamArg dln_weight,
                            ParamArg dln_bias, ParamArg dfc1_weight, ParamArg dfc1_bias, ParamArg dfc2_weight,
                                ParamArg dfc2_bias) {
            layernorm_mlp_backward(in(call, workspace), at(grad), at(dx), param(dln_weight), param(dln_bias),
                                   param(dfc1_weight),
                                   param(dfc1_bias), param(dfc2_weight), param(dfc2_bias));
        }, NoGil());
}
