// The rate at which this instruction set multiplies and adds from registers alone: what a product's speed is compared
// with.
#include <time.h>

#include "ops.h"

namespace deit {
namespace {

// Does `count` passes of the loop; the multiplications and additions done.
template <class E> long spin(long count) {
    constexpr int CHAINS = LANES == 16 ? 24 : 12;  // enough independent sums to hide an instruction's latency
    Vec acc[CHAINS];
    _Pragma("GCC unroll 24") for (int i = 0; i < CHAINS; ++i) acc[i] = set1(float(i));
    const Vec a = set1(0.5f), b = set1(0.25f);
    for (long n = 0; n < count; ++n)
        _Pragma("GCC unroll 24") for (int i = 0; i < CHAINS; ++i) acc[i] = mac<E>(acc[i], a, b);
    Vec total = set1(0.0f);
    _Pragma("GCC unroll 24") for (int i = 0; i < CHAINS; ++i) total += acc[i];
    volatile float kept = sum(total);
    (void)kept;
    return count * CHAINS * LANES * PER_WORD<E> * 2;
}

#if defined(__AMX_BF16__)
template <> long spin<bf16>(long count) {
    const TileRegisters<bf16> registers;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (long n = 0; n < count; ++n) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return count * 4 * 16 * 16 * 32 * 2;
}
#endif

}  // namespace

// FLOP/s of all threads together, each doing `passes` passes of the loop. By each thread's own CPU time: on a machine shared
// with others the wall clock would measure them.
double multiply_rate(bool is_bf16, int threads, long passes) {
    double rate = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : rate)
    {
        timespec start, end;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
        const long done = is_bf16 ? spin<Operand<bf16>>(passes) : spin<float>(passes);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
        rate += double(done) / (double(end.tv_sec - start.tv_sec) + 1e-9 * double(end.tv_nsec - start.tv_nsec));
    }
    return rate;
}

}  // namespace deit
