// What the bindings of several ops need: pointers are integers from Python, a parameter is (pointer, kind), 0 is a null
// pointer. Their classes are module-local, because two instruction sets are imported side by side.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "ops.h"

namespace deit {

using Pointer = uintptr_t;
using ParamArg = std::pair<Pointer, int>;  // kind 0: fp32, 1: bf16, 2: a weight that `pack` has packed
using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

inline void* at(Pointer p) { return reinterpret_cast<void*>(p); }
inline Param param(const ParamArg& p) { return {at(p.first), p.second == 1, p.second == 2}; }
inline Residual residual(double p, int64_t seed, Pointer row_scale, long rows_per_sample) {
    return {p, seed, static_cast<const float*>(at(row_scale)), rows_per_sample};
}

}  // namespace deit
