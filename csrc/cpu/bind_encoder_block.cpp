// Python's view of an encoder block, an object for a call as of the GEMM ops, and of an encoder, its blocks one after
// the other, which may serve many calls.
#include "bind.h"
#include "encoder_block.h"

namespace py = pybind11;
using namespace deit;

namespace {

struct Sizes {
    bool is_bf16;
    long B, N, C, H;
    double eps;
    int threads;
};

struct Dropped {  // all zero in inference
    double p, attention_p;
    int64_t seed;
    Pointer attn_row_scale, mlp_row_scale;
};

// parameters: LN1, qkv, proj, LN2, fc1, fc2, each weight then bias. saved: mean and rstd of LN1, lse, mean and rstd of
// LN2, then qkv, y and h.
EncoderBlock make_block(const Sizes& s, long F, void* x, const ParamArg* p, const Dropped& d,
                        const std::array<Pointer, 8>& saved) {
    const long M = s.B * s.N, C = s.C, D = C / s.H;
    return EncoderBlock{
        {s.is_bf16, M, C, 3 * C, s.eps, nullptr, at(saved[0]), at(saved[1]), param(p[0]), param(p[1]), param(p[2]),
         param(p[3]), nullptr, s.threads},
        {s.is_bf16, s.B, s.N, s.H, D, 1.0 / std::sqrt(double(D)), d.attention_p, d.seed, nullptr,
         static_cast<float*>(at(saved[2])), s.threads, nullptr},
        {s.is_bf16, M, C, C, nullptr, param(p[4]), param(p[5]), residual(d.p, d.seed, d.attn_row_scale, s.N), nullptr,
         s.threads},
        {s.is_bf16, M, C, F, s.eps, nullptr, at(saved[3]), at(saved[4]), param(p[6]), param(p[7]), param(p[8]),
         param(p[9]), param(p[10]), param(p[11]), residual(d.p, d.seed, d.mlp_row_scale, s.N), nullptr, s.threads},
        x, at(saved[5]), at(saved[6]), at(saved[7])};
}

// All blocks, for inference, of any batch: parameters (12 for each block) and widths stay from call to call.
struct Encoder {
    bool is_bf16;
    long C, H;
    double eps;
    std::vector<ParamArg> parameters;
    std::vector<long> features;  // a block's hidden ones

    EncoderBlock block(size_t i, long B, long N, int threads, void* x) const {
        const ParamArg* first = &parameters.at(12 * i + 11) - 11;
        return make_block({is_bf16, B, N, C, H, eps, threads}, features[i], x, first, {}, {});
    }
    long workspace(long B, long N, int threads) const {
        long most = 0;
        for (size_t i = 0; i < features.size(); ++i)
            most = std::max(most, encoder_block_workspace(block(i, B, N, threads, nullptr)));
        return most;
    }
    // Each block but the first works in place: its last kernel reads no x.
    void forward(long B, long N, int threads, void* workspace, void* x, void* out) const {
        for (size_t i = 0; i < features.size(); ++i)
            encoder_block_forward(block(i, B, N, threads, i ? out : x), workspace, out);
    }
};

}  // namespace

void bind_encoder_block(py::module_& m) {
    py::class_<EncoderBlock>(m, "EncoderBlock", py::module_local())
        .def(py::init([](bool is_bf16, long B, long N, long C, long H, long F, double eps, Pointer x,
                         const std::array<ParamArg, 12>& parameters, double dropout_p, double attn_dropout_p,
                         int64_t seed, Pointer attn_row_scale, Pointer mlp_row_scale,
                         const std::array<Pointer, 8>& saved, int threads) {
            return make_block({is_bf16, B, N, C, H, eps, threads}, F, at(x), parameters.data(),
                              {dropout_p, attn_dropout_p, seed, attn_row_scale, mlp_row_scale}, saved);
        }))
        .def("workspace", [](const EncoderBlock& call, bool) { return encoder_block_workspace(call); })
        .def("forward", [](const EncoderBlock& call, Pointer workspace, Pointer out) {
            encoder_block_forward(call, at(workspace), at(out));
        }, NoGil());
    py::class_<Encoder>(m, "Encoder", py::module_local())
        .def(py::init([](bool is_bf16, long C, long H, double eps, std::vector<ParamArg> parameters,
                         std::vector<long> features) {
            return Encoder{is_bf16, C, H, eps, std::move(parameters), std::move(features)};
        }))
        .def("workspace", &Encoder::workspace)
        .def("forward", [](const Encoder& encoder, long B, long N, int threads, Pointer workspace, Pointer x,
                           Pointer out) { encoder.forward(B, N, threads, at(workspace), at(x), at(out)); }, NoGil());
}
