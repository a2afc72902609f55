// Augmentation of a batch on a GPU. Rows that are resized come first, as uint8 tiles that then serve as sources; the
// rest is one pass over the output: small images from shared memory, others in slices from where they lie.
//
// A thread makes four neighbours of a row at a time, straight from the uint8 source: crop and flip are an address, the
// color operations are functions of the pixel once contrast's mean is known, and the mixing partner is the same
// computation for another row of the plan. Values are clamped into range, never checked, so that nothing waits for the
// GPU; the arithmetic is augment.h's, as on the CPU.
#include "augment_sliced.cuh"
#include "augment_staged.cuh"
#include "resize.cuh"

namespace {

template <int DTYPE>
void make(const Args& a, cudaStream_t stream) {
    if (can_stage(a)) {
        make_staged<DTYPE>(a, stream);
    } else {
        make_sliced<DTYPE>(a, stream);
    }
}

}  // namespace

int64_t augment_workspace(int64_t source_h, int64_t source_w, int64_t height, int64_t width, int64_t B) {
    return sums_bytes(B) + (source_h ? resize_bytes(source_h, source_w, height, width, B) : 0);
}

int augment_fwd(const augment::Args& a, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (a.resized_crop) resize(a, on);
    if (a.dtype == kFloat32) make<kFloat32>(a, on);
    if (a.dtype == kBFloat16) make<kBFloat16>(a, on);
    if (a.dtype == kFloat16) make<kFloat16>(a, on);
    return cudaGetLastError();
}
