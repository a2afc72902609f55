// Python's view of the encoder block: an object per call, which names the bytes of workspace that it needs and then runs
// in it.
#include <array>

#include "bind.h"
#include "encoder_block.h"

namespace py = pybind11;
using namespace deit;

// parameters: LN1, qkv, proj, LN2, fc1, fc2, each weight then bias. saved: mean and rstd of LN1, lse, mean and rstd of
// LN2, then qkv, y and h.
void bind_encoder_block(py::module_& m) {
    py::class_<EncoderBlock>(m, "EncoderBlock", py::module_local())
        .def(py::init([](bool is_bf16, long B, long N, long C, long H, long F, double eps, Pointer x,
                         const std::array<ParamArg, 12>& p, double dropout_p, double attn_dropout_p, int64_t seed,
                         Pointer attn_row_scale, Pointer mlp_row_scale, const std::array<Pointer, 8>& saved, int threads) {
            const long M = B * N, D = C / H;
            return EncoderBlock{
                {is_bf16, M, C, 3 * C, eps, nullptr, at(saved[0]), at(saved[1]), param(p[0]), param(p[1]), param(p[2]),
                 param(p[3]), nullptr, threads},
                {is_bf16, B, N, H, D, 1.0 / std::sqrt(double(D)), attn_dropout_p, seed, nullptr,
                 static_cast<float*>(at(saved[2])), threads, nullptr},
                {is_bf16, M, C, C, nullptr, param(p[4]), param(p[5]), residual(dropout_p, seed, attn_row_scale, N), nullptr,
                 threads},
                {is_bf16, M, C, F, eps, nullptr, at(saved[3]), at(saved[4]), param(p[6]), param(p[7]), param(p[8]),
                 param(p[9]), param(p[10]), param(p[11]), residual(dropout_p, seed, mlp_row_scale, N), nullptr, threads},
                at(x), at(saved[5]), at(saved[6]), at(saved[7])};
        }))
        .def("workspace", [](const EncoderBlock& call, bool) { return encoder_block_workspace(call); })
        .def("forward", [](const EncoderBlock& call, Pointer workspace, Pointer out) {
            encoder_block_forward(call, at(workspace), at(out));
        }, NoGil());
}
