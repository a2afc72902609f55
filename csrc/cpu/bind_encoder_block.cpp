// Python's view of an encoder block and of an encoder, its blocks one after the other: objects for a call, which name
// the bytes of workspace that it needs and then run in it.
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

struct Encoder {
    std::vector<EncoderBlock> blocks;

    long workspace() const {
        long most = 0;
        for (const EncoderBlock& block : blocks) most = std::max(most, encoder_block_workspace(block));
        return most;
    }
    // Each block but the first works in place: its last kernel reads no x.
    void forward(void* workspace, void* out) const {
        for (EncoderBlock block : blocks) {
            if (!block.x) block.x = out;
            encoder_block_forward(block, workspace, out);
        }
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
        .def(py::init([](bool is_bf16, long B, long N, long C, long H, double eps, Pointer x,
                         const std::vector<ParamArg>& parameters, const std::vector<long>& features, int threads) {
            Encoder encoder;
            for (size_t i = 0; i < features.size(); ++i)
                encoder.blocks.push_back(make_block({is_bf16, B, N, C, H, eps, threads}, features[i], i ? nullptr : at(x),
                                                    &parameters.at(12 * i + 11) - 11, {}, {}));
            return encoder;
        }))
        .def("workspace", [](const Encoder& call, bool) { return call.workspace(); })
        .def("forward", [](const Encoder& call, Pointer workspace, Pointer out) {
            call.forward(at(workspace), at(out));
        }, NoGil());
}
