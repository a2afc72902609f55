// The kernels of csrc/cuda, compiled for the CPU by the headers of this folder, which stand in for CUDA's.
#include "cuda/augment.cu"

alignas(16) thread_local uint4 staged_pixels[4 * STAGED_BYTES / sizeof(uint4)];

std::pair<unsigned char*, size_t> on_host::dynamic_shared() {
    return {reinterpret_cast<unsigned char*>(staged_pixels), sizeof(staged_pixels)};
}

// What g++ calls, under -fsanitize=alignment, for an address that a GPU would refuse.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) { on_host::failure = "a vector is not aligned"; }
