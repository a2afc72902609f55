// What csrc/cuda uses of CUDA, on a CPU, so that its kernels can be tested where there is no GPU.
//
// Blocks run one after the other; a block's threads are coroutines that change places only where they wait for each
// other, so barriers and shuffles mean what they mean on a GPU: nobody passes before all have come. Between two
// barriers threads run in one order or the other, and copies to shared memory happen at once or as late as they may
// (see `Schedule`): a kernel that lacks a barrier or a wait gives other results in some of them. Waiting at different
// barriers is an error, and so is ending while others wait, and a vector that is not aligned. Dynamic shared memory
// starts as garbage in every block.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ thread_local  // static, and allowed behind `extern`
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned x) : x(x) {}
};
struct uint4 {
    unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 << 10;
constexpr size_t SHARED_LIMIT = 46 << 10;  // dynamic bytes without asking: of 48 KiB, with 2 for static arrays
constexpr int MULTIPROCESSORS = 3;         // so that batches of more than three images go around

// Which of the results that a GPU may give is computed: environment CUDA_ON_HOST, "descending", "late" or both.
struct Schedule {
    bool descending, late;
};

inline Schedule schedule() {
    const char* set = std::getenv("CUDA_ON_HOST");
    const std::string words = set ? set : "";
    return {words.find("descending") != std::string::npos, words.find("late") != std::string::npos};
}

// The first block that runs: environment CUDA_ON_HOST_BEGIN, "row/rows" of the grid; the first of all without it.
inline unsigned first_block(unsigned blocks) {
    const char* set = std::getenv("CUDA_ON_HOST_BEGIN");
    unsigned row = 0, rows = 1;
    return set && std::sscanf(set, "%u/%u", &row, &rows) == 2 ? blocks / rows * row : 0;
}

// The dynamic shared memory that the kernels declare: address and bytes. Whoever includes the kernels defines it.
std::pair<unsigned char*, size_t> dynamic_shared();

enum class State { ready, at_block_barrier, at_warp_barrier, ended };

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state;
    uint64_t shuffled;                     // what it shows to the lanes of its warp
    std::deque<std::vector<Copy>> copies;  // by group, the oldest first, the open one last
};

inline std::vector<Thread> threads;
inline unsigned current;  // which of them runs
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool late_copies;
inline size_t allowed_shared = SHARED_LIMIT;
inline int last_error = 0;
inline std::string failure;  // what a thread has done that none may

inline void wait(State state) {
    threads[current].state = state;
    swapcontext(&threads[current].context, &scheduler);
}

inline void start_thread() {
    try {
        body();
    } catch (const std::runtime_error& error) {
        failure = error.what();
    }
    threads[current].state = State::ended;
}

inline void copy(const std::vector<Copy>& copies) {
    for (const Copy& one : copies) std::memcpy(one.to, one.from, one.bytes);
}

// Makes threads ready whose barrier is complete; false where nobody can go on.
inline bool release() {
    bool any = false;
    const auto all = [](unsigned first, unsigned last, State state) {
        for (unsigned t = first; t < last; ++t) {
            if (threads[t].state != state) return false;
        }
        return true;
    };
    const auto free = [&](unsigned first, unsigned last) {
        for (unsigned t = first; t < last; ++t) threads[t].state = State::ready;
        any = true;
    };
    if (all(0, blockDim.x, State::at_block_barrier)) free(0, blockDim.x);
    for (unsigned first = 0; first < blockDim.x; first += WARP) {
        if (all(first, first + WARP, State::at_warp_barrier)) free(first, first + WARP);
    }
    return any;
}

inline void run_block(bool descending) {
    const unsigned count = blockDim.x;
    if (threads.size() < count) threads = std::vector<Thread>(count);
    for (unsigned t = 0; t < count; ++t) {
        Thread& thread = threads[t];
        getcontext(&thread.context);
        thread.context.uc_stack = {thread.stack.get(), 0, STACK};
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, start_thread, 0);
        thread.state = State::ready;
        thread.copies.assign(1, {});
    }
    unsigned ended = 0;
    failure.clear();
    do {
        for (unsigned n = 0; n < count; ++n) {
            current = descending ? count - 1 - n : n;
            if (threads[current].state != State::ready) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &threads[current].context);
            ended += threads[current].state == State::ended;
        }
    } while (release());
    if (!failure.empty()) throw std::runtime_error(failure);
    if (ended < count) throw std::runtime_error("threads of a block wait at different barriers, or for ended ones");
    for (unsigned t = 0; t < count; ++t) {
        for (const auto& group : threads[t].copies) {
            if (!group.empty()) throw std::runtime_error("a thread ended before its copies were waited for");
        }
    }
}

inline void run_grid(unsigned blocks, unsigned count, size_t shared, const std::function<void()>& kernel) {
    if (blocks == 0 || count == 0 || count > 1024 || count % WARP || shared > allowed_shared) {
        last_error = 1;  // cudaErrorInvalidValue
        return;
    }
    const Schedule order = schedule();
    const auto [bytes, size] = dynamic_shared();
    gridDim.x = blocks, blockDim.x = count, body = kernel, late_copies = order.late;
    const unsigned first = first_block(blocks);
    for (unsigned n = 0; n < blocks - first; ++n) {
        blockIdx.x = order.descending ? blocks - 1 - n : first + n;
        std::memset(bytes, 0xa5, shared);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(bytes + shared, size - shared);
#endif
        run_block(order.descending);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(bytes + shared, size - shared);
#endif
    }
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::State::at_block_barrier); }

template <class T>
T __shfl_down_sync(unsigned, T x, unsigned offset) {
    std::memcpy(&on_host::threads[on_host::current].shuffled, &x, sizeof(T));
    on_host::wait(on_host::State::at_warp_barrier);
    const unsigned lane = on_host::current % on_host::WARP, from = lane + offset < on_host::WARP ? offset : 0;
    std::memcpy(&x, &on_host::threads[on_host::current + from].shuffled, sizeof(T));
    on_host::wait(on_host::State::at_warp_barrier);
    return x;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return uint32_t((uint64_t(high) << 32 | low) >> (shift % 32));
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) result |= uint32_t(bytes >> 8 * (selector >> 4 * k & 7) & 255) << 8 * k;
    return result;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
    on_host::run_grid(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(given...); });
    return on_host::last_error;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int value) {
    on_host::allowed_shared = value > int(on_host::SHARED_LIMIT) ? size_t(value) : on_host::SHARED_LIMIT;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
    *value = on_host::MULTIPROCESSORS;
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline cudaError_t cudaGetLastError() { return std::exchange(on_host::last_error, 0); }

inline const char* cudaGetErrorString(cudaError_t) { return "a launch that a GPU would refuse"; }
