// The weights of resized crops, in integers: one source for C++ and CUDA. The definitions are those of
// deit_fast/reference/geometry.py: distances and filter values with 16 fractional bits, weights that sum to 2^14.
#pragma once

#include "augment.h"

namespace augment {

constexpr int kWeightBits = 14;
constexpr int32_t kMostOfRow = 255 << kWeightBits;  // what a row's sum is clamped to, and 0

// The filter along one side: n source pixels become m, M = max(n, m).
struct Filter {
    int64_t n, m, reach, inverse;  // reach in 1 / 2M; inverse 2^46 / 2M
    bool cubic;
};

AUGMENT_FN Filter make_filter(int64_t n, int64_t m, bool cubic) {
    const int64_t twice = 2 * (n > m ? n : m);
    return {n, m, cubic ? 2 * twice : twice, (int64_t(1) << 46) / twice, cubic};
}

// The most source pixels that count in one of m output pixels, of boxes of at most n.
AUGMENT_FN int64_t most_taps(int64_t n, int64_t m) {
    const int64_t taps = 4 * (n > m ? n : m) / m + 2;
    return taps < n ? taps : n;
}

// The first source pixel that counts in output pixel i, and how many do.
AUGMENT_FN void find_taps(const Filter& f, int64_t i, int32_t& first, int32_t& count) {
    const int64_t center = (2 * i + 1) * f.n - f.m;  // source pixel j is |2 j m - center| / 2M away
    const int64_t low = center - f.reach, high = center + f.reach;
    const int64_t from = low < 0 ? 0 : low / (2 * f.m) + 1, to = (high + 2 * f.m - 1) / (2 * f.m);
    first = int32_t(from);
    count = int32_t((to < f.n ? to : f.n) - from);
}

// The filter at the distance of source pixel j from output pixel i.
AUGMENT_FN int64_t filter_value(const Filter& f, int64_t i, int64_t j) {
    const int64_t signed_distance = (2 * j + 1) * f.m - (2 * i + 1) * f.n;
    const int64_t u = ((signed_distance < 0 ? -signed_distance : signed_distance) * f.inverse) >> 30;
    if (!f.cubic) return (1 << 16) - u;
    const int64_t square = u * u;
    const int64_t near = (((3 * u - (5 << 16)) * square) >> 1) + (int64_t(1) << 48);
    const int64_t far = ((((5 << 16) - u) * square) >> 1) - u * (int64_t(1) << 34) + (int64_t(2) << 48);
    return (u < (1 << 16) ? near : far) >> 32;
}

// Writes the weights of output pixel i to w[0], w[step], ...: rounded running sums, then their differences.
template <class T>
AUGMENT_FN void weigh(const Filter& f, int64_t i, int32_t first, int32_t count, T* w, int64_t step) {
    int64_t total = 0;
    for (int32_t k = 0; k < count; ++k) {
        const int64_t value = filter_value(f, i, first + k);
        w[k * step] = T(value);  // 18 bits
        total += value;
    }
    const int64_t inverse = (int64_t(1) << 46) / total;
    int64_t running = 0, before = 0;
    for (int32_t k = 0; k < count; ++k) {
        running += int64_t(w[k * step]);
        const int64_t rounded = (running * inverse + (int64_t(1) << 31)) >> 32;
        w[k * step] = T(rounded - before);
        before = rounded;
    }
}

}  // namespace augment
