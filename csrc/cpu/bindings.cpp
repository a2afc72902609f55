// The face of one CPU extension module: every kernel takes raw pointers (as integers), sizes, workspace and num_threads.
// The same file is compiled once per instruction set; DEIT_FAST_MODULE is the module's name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "augment_bindings.h"

namespace {

// The instruction sets of setup.py that this processor and its operating system run, best first.
std::vector<std::string> supported_isas() {
    std::vector<std::string> isas;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) isas.push_back("avx512bf16");
    if (avx512) isas.push_back("avx512");
    if (avx2) isas.push_back("avx2");
#endif
    isas.push_back("generic");
    return isas;
}

}  // namespace

void bind_attention(pybind11::module_& m);

PYBIND11_MODULE(DEIT_FAST_MODULE, m) {
    m.def("supported_isas", &supported_isas);
    bind_attention(m);
    m.def("augment_workspace", &augment_workspace);
    bind_augment(m, [](const augment::Args& args, void* workspace, int num_threads) {
        const bool valid = augment_valid(args);
        if (valid) augment_fwd(args, workspace, num_threads);
        return valid;
    });
}
