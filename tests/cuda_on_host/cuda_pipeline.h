// Asynchronous copies to shared memory, as cuda_runtime.h beside this file says.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    const auto bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if ((bytes != 4 && bytes != 8 && bytes != 16) || bits % bytes) {
        throw std::runtime_error("an asynchronous copy takes 4, 8 or 16 aligned bytes");
    }
    const on_host::Copy one = {to, from, bytes};
    if (!on_host::late_copies) on_host::copy({one});
    on_host::threads[on_host::current].copies.back().push_back(one);
}

inline void __pipeline_commit() { on_host::threads[on_host::current].copies.emplace_back(); }

inline void __pipeline_wait_prior(size_t groups) {
    auto& copies = on_host::threads[on_host::current].copies;
    for (; copies.size() > groups + 1; copies.pop_front()) {
        if (on_host::late_copies) on_host::copy(copies.front());
    }
}
