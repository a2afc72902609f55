// How augment::Args crosses from Python, for the CPU and the CUDA module alike: pointers as integers, then sizes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "augment.h"

// Defines augment_fwd(<the arguments of augment::Args>, resource, count) -> whatever launch(args, resource, count)
// returns; resource and count are workspace and num_threads on the CPU, stream and device on a GPU.
template <class Launch>
void bind_augment(pybind11::module_& m, Launch launch) {
    m.def("augment_fwd", [launch](uintptr_t images, std::array<int64_t, 4> strides, uintptr_t labels, uintptr_t index,
                                  uintptr_t crop, uintptr_t flip, uintptr_t jitter_order, uintptr_t jitter,
                                  uintptr_t erase, uintptr_t noise_key, uintptr_t partner, uintptr_t lam,
                                  uintptr_t cut, uintptr_t out, uintptr_t targets, std::array<int64_t, 4> sizes,
                                  std::array<int32_t, 4> extent, bool pixel_noise, bool channels_last, int dtype,
                                  std::array<double, 3> scale, std::array<double, 3> bias, double on, double off,
                                  uintptr_t resource, int count) {
        augment::Args a;
        a.images = reinterpret_cast<const uint8_t*>(images);
        a.stride_m = strides[0], a.stride_c = strides[1], a.stride_y = strides[2], a.stride_x = strides[3];
        a.labels = reinterpret_cast<const int64_t*>(labels);
        a.index = reinterpret_cast<const int64_t*>(index);
        a.crop = reinterpret_cast<const int32_t*>(crop);
        a.flip = reinterpret_cast<const uint8_t*>(flip);
        a.jitter_order = reinterpret_cast<const uint8_t*>(jitter_order);
        a.jitter = reinterpret_cast<const int32_t*>(jitter);
        a.erase = reinterpret_cast<const int32_t*>(erase);
        a.noise_key = reinterpret_cast<const int64_t*>(noise_key);
        a.partner = reinterpret_cast<const int64_t*>(partner);
        a.lam = reinterpret_cast<const float*>(lam);
        a.cut = reinterpret_cast<const int32_t*>(cut);
        a.out = reinterpret_cast<void*>(out);
        a.targets = reinterpret_cast<float*>(targets);
        a.M = sizes[0], a.B = sizes[1], a.R = sizes[2], a.K = sizes[3];
        a.source_h = extent[0], a.source_w = extent[1], a.height = extent[2], a.width = extent[3];
        a.pixel_noise = pixel_noise, a.channels_last = channels_last, a.dtype = dtype;
        for (int c = 0; c < 3; ++c) a.scale[c] = float(scale[c]), a.bias[c] = float(bias[c]);
        a.on = float(on), a.off = float(off);
        pybind11::gil_scoped_release release;
        return launch(a, reinterpret_cast<void*>(resource), count);
    });
}
