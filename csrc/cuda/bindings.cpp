// The face of the CUDA extension module: every kernel takes raw device pointers (as integers), sizes, a stream and a
// device.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "augment_bindings.h"

namespace {

void check(int error, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
    }
}

}  // namespace

PYBIND11_MODULE(DEIT_FAST_MODULE, m) {
    bind_augment(m, [](const augment::Args& args, void* stream, int device) {
        check(cudaSetDevice(device), "cudaSetDevice");
        check(augment_fwd(args, stream), "augment_fwd");
    });
}
