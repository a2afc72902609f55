// Python's view of attention: an object per call, which names the bytes of workspace that it needs and then runs in it.
// Module-local, because two instruction sets are imported side by side. Pointers are integers.
#include <pybind11/pybind11.h>

#include "attention.h"

namespace py = pybind11;
using namespace deit;

void bind_attention(py::module_& m) {
    using Pointer = uintptr_t;
    using NoGil = py::call_guard<py::gil_scoped_release>;
    py::class_<Attention>(m, "Attention", py::module_local())
        .def(py::init([](bool is_bf16, long B, long N, long H, long D, double scale, double dropout_p, int64_t seed,
                         Pointer qkv, Pointer lse, int threads) {
            return Attention{is_bf16, B, N, H, D, scale, dropout_p, seed, reinterpret_cast<const void*>(qkv),
                             reinterpret_cast<float*>(lse), threads, nullptr};
        }))
        .def("workspace", &attention_workspace)
        .def("forward", [](Attention call, Pointer workspace, Pointer out) {
            call.workspace = reinterpret_cast<void*>(workspace);
            attention_forward(call, reinterpret_cast<void*>(out));
        }, NoGil())
        .def("backward", [](Attention call, Pointer workspace, Pointer grad, Pointer dqkv) {
            call.workspace = reinterpret_cast<void*>(workspace);
            attention_backward(call, reinterpret_cast<const void*>(grad), reinterpret_cast<void*>(dqkv));
        }, NoGil());
}
