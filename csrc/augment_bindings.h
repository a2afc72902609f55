// How augment::Args crosses from Python, for the CPU and the CUDA module alike: pointers as integers, then sizes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "augment.h"

// Defines augment_workspace, and augment_fwd(<the arguments of augment::Args>, stream, count) -> whatever
// launch(args, stream, count) returns; count is num_threads on the CPU, which has no stream, and the device on a GPU.
template <class Launch>
void bind_augment(pybind11::module_& m, Launch launch) {
    m.def("augment_workspace", &augment_workspace);
    m.def("augment_fwd", [launch](uintptr_t images, std::array<int64_t, 4> strides, uintptr_t labels, uintptr_t index,
                                  uintptr_t resized_crop, uintptr_t bicubic, uintptr_t crop, uintptr_t flip,
                                  uintptr_t vflip, uintptr_t jitter_order, uintptr_t jitter, uintptr_t grayscale,
                                  uintptr_t erase, uintptr_t noise_key, uintptr_t partner, uintptr_t lam,
                                  uintptr_t cut, uintptr_t out, uintptr_t targets, std::array<int64_t, 5> sizes,
                                  std::array<int32_t, 4> extent, int remode, bool reflect, bool channels_last,
                                  int dtype, std::array<double, 3> scale, std::array<double, 3> bias, double on,
                                  double off, uintptr_t workspace, uintptr_t stream, int count) {
        augment::Args a;
        a.images = reinterpret_cast<const uint8_t*>(images);
        a.stride_m = strides[0], a.stride_c = strides[1], a.stride_y = strides[2], a.stride_x = strides[3];
        a.labels = reinterpret_cast<const int64_t*>(labels);
        a.index = reinterpret_cast<const int64_t*>(index);
        a.resized_crop = reinterpret_cast<const int32_t*>(resized_crop);
        a.bicubic = reinterpret_cast<const uint8_t*>(bicubic);
        a.crop = reinterpret_cast<const int32_t*>(crop);
        a.flip = reinterpret_cast<const uint8_t*>(flip);
        a.vflip = reinterpret_cast<const uint8_t*>(vflip);
        a.jitter_order = reinterpret_cast<const uint8_t*>(jitter_order);
        a.jitter = reinterpret_cast<const int32_t*>(jitter);
        a.grayscale = reinterpret_cast<const uint8_t*>(grayscale);
        a.erase = reinterpret_cast<const int32_t*>(erase);
        a.noise_key = reinterpret_cast<const int64_t*>(noise_key);
        a.partner = reinterpret_cast<const int64_t*>(partner);
        a.lam = reinterpret_cast<const float*>(lam);
        a.cut = reinterpret_cast<const int32_t*>(cut);
        a.out = reinterpret_cast<void*>(out);
        a.targets = reinterpret_cast<float*>(targets);
        a.workspace = reinterpret_cast<void*>(workspace);
        a.M = sizes[0], a.B = sizes[1], a.J = sizes[2], a.R = sizes[3], a.K = sizes[4];
        a.source_h = extent[0], a.source_w = extent[1], a.height = extent[2], a.width = extent[3];
        a.remode = remode, a.reflect = reflect, a.channels_last = channels_last, a.dtype = dtype;
        for (int c = 0; c < 3; ++c) a.scale[c] = float(scale[c]), a.bias[c] = float(bias[c]);
        a.on = float(on), a.off = float(off);
        pybind11::gil_scoped_release release;
        return launch(a, reinterpret_cast<void*>(stream), count);
    });
}
