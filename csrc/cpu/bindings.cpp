// The face of one CPU extension module: every kernel takes raw pointers (as integers), sizes, workspace and num_threads.
// The same file is compiled once per instruction set; DEIT_FAST_MODULE is the module's name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "augment_bindings.h"

namespace {

// Whether this processor multiplies bf16 tiles and Linux lets the process use them (asked for once, for all its threads).
bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;         // CPUID leaf 7, EDX
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;  // Linux: Documentation/arch/x86/xstate.rst
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

// The instruction sets of setup.py that this processor and its operating system run, best first.
std::vector<std::string> supported_isas() {
    std::vector<std::string> isas;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (bf16 && tiles_allowed()) isas.push_back("amx");
    if (bf16) isas.push_back("avx512bf16");
    if (avx512) isas.push_back("avx512");
    if (avx2) isas.push_back("avx2");
#endif
    isas.push_back("generic");
    return isas;
}

}  // namespace

void bind_gemm_ops(pybind11::module_& m);  // layernorm_linear, linear_residual, layernorm_mlp
void bind_attention(pybind11::module_& m);
void bind_encoder_block(pybind11::module_& m);

PYBIND11_MODULE(DEIT_FAST_MODULE, m) {
    m.attr("interface") = 5;  // as in deit_fast/kernels/cpu/__init__.py; counts up when what is defined here changes
    m.def("supported_isas", &supported_isas);
    bind_attention(m);
    bind_augment(m, [](const augment::Args& args, void*, int num_threads) {
        const bool valid = augment_valid(args);
        if (valid) augment_fwd(args, num_threads);
        return valid;
    });
    bind_gemm_ops(m);
    bind_encoder_block(m);
}
