// Resized crops on the CPU: eight source rows at a time, transposed, so that a vector holds one column of them.
//
// The horizontal pass then multiplies a column of eight rows by one broadcast weight, whatever the taps of an output
// pixel are, and transposes its sums back into a ring of rows, from which the vertical pass takes whole rows. All sums
// are integers: the first fit the 24 bits of a float, the second the 53 of a double, so that neither order nor fused
// multiply-adds change a result.
#pragma once

#include <algorithm>

#include "augment_filter.h"
#include "simd.h"  // the intrinsics

namespace {

using namespace augment;

constexpr int kRows = 8;     // of the source at once
constexpr int kPixels = 16;  // of an output row at once

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The weights along one side: output pixel i has count[i] of them from weight[taps i] on, for source pixels from first[i].
template <class T>
struct Side {
    T* weight;
    int32_t *first, *count;
    int64_t taps;
};

template <class T>
int64_t side_bytes(int64_t source, int64_t m) {
    return padded(most_taps(source, m) * m * sizeof(T)) + 2 * padded(m * 4);
}

template <class T>
Side<T> make_side(int64_t source, int64_t n, int64_t m, bool cubic, bool flip, char*& space) {
    Side<T> side;
    side.taps = most_taps(source, m);
    side.weight = reinterpret_cast<T*>(space);
    side.first = reinterpret_cast<int32_t*>(space + padded(side.taps * m * sizeof(T)));
    side.count = side.first + padded(m * 4) / 4;
    space += side_bytes<T>(source, m);
    const Filter filter = make_filter(n, m, cubic);
    for (int64_t i = 0; i < m; ++i) {
        const int64_t pixel = flip ? m - 1 - i : i;
        find_taps(filter, pixel, side.first[i], side.count[i]);
        weigh(filter, pixel, side.first[i], side.count[i], side.weight + side.taps * i, 1);
    }
    return side;
}

int64_t ring_stride(int64_t width) { return (width + kPixels - 1) / kPixels * kPixels; }

int64_t ring_rows(int64_t source_h, int64_t height) {
    return (most_taps(source_h, height) + kRows - 1) / kRows * kRows + kRows;
}

int64_t block_bytes(int64_t source_w) { return padded(source_w * kRows * 4); }

// Scratch of one thread; source_h 0: nothing is resized.
int64_t resize_bytes(int64_t source_h, int64_t source_w, int64_t height, int64_t width) {
    if (source_h == 0) return 0;
    return side_bytes<float>(source_w, width) + side_bytes<double>(source_h, height) + block_bytes(source_w) +
           ring_rows(source_h, height) * ring_stride(width) * 8;
}

// block[kRows x + r] = pixel x of row r, for n pixels `step` bytes apart.
void load_block(const uint8_t* const rows[kRows], int64_t n, int64_t step, float* __restrict block) {
    int64_t x = 0;
#if defined(__AVX2__)
    for (; step == 1 && x + 8 <= n; x += 8) {
        __m128i row[8];
        for (int r = 0; r < 8; ++r) row[r] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[r] + x));
        const __m128i a0 = _mm_unpacklo_epi8(row[0], row[1]), a1 = _mm_unpacklo_epi8(row[2], row[3]);
        const __m128i a2 = _mm_unpacklo_epi8(row[4], row[5]), a3 = _mm_unpacklo_epi8(row[6], row[7]);
        const __m128i b0 = _mm_unpacklo_epi16(a0, a1), b1 = _mm_unpackhi_epi16(a0, a1);
        const __m128i b2 = _mm_unpacklo_epi16(a2, a3), b3 = _mm_unpackhi_epi16(a2, a3);
        const __m128i pair[4] = {_mm_unpacklo_epi32(b0, b2), _mm_unpackhi_epi32(b0, b2), _mm_unpacklo_epi32(b1, b3),
                                 _mm_unpackhi_epi32(b1, b3)};  // two columns each
        for (int k = 0; k < 4; ++k) {
            float* to = block + kRows * (x + 2 * k);
            _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(pair[k])));
            _mm256_storeu_ps(to + 8, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(pair[k], 8))));
        }
    }
#endif
    for (; x < n; ++x)
        for (int r = 0; r < kRows; ++r) block[kRows * x + r] = rows[r][x * step];
}

// sums[r] of one output pixel: sum over k of weight[k] block[kRows k + r], clamped.
AUGMENT_FN void sum_column(const float* block, const float* weight, int32_t count, float* sums) {
#if defined(__AVX2__)
    __m256 sum = _mm256_setzero_ps();
    for (int32_t k = 0; k < count; ++k)
        sum = _mm256_fmadd_ps(_mm256_load_ps(block + kRows * k), _mm256_broadcast_ss(weight + k), sum);
    sum = _mm256_min_ps(_mm256_max_ps(sum, _mm256_setzero_ps()), _mm256_set1_ps(float(kMostOfRow)));
    _mm256_store_ps(sums, sum);
#else
    float sum[kRows] = {};
    for (int32_t k = 0; k < count; ++k)
#pragma omp simd
        for (int r = 0; r < kRows; ++r) sum[r] += block[kRows * k + r] * weight[k];
#pragma omp simd
    for (int r = 0; r < kRows; ++r) sums[r] = std::min(std::max(sum[r], 0.0f), float(kMostOfRow));
#endif
}

// rows[r][k] = sums[kRows k + r] for k < 4.
AUGMENT_FN void store_rows(const float* sums, double* const rows[kRows], int64_t x) {
#if defined(__AVX2__)
    for (int half = 0; half < kRows; half += 4) {
        __m128 r0 = _mm_load_ps(sums + half), r1 = _mm_load_ps(sums + kRows + half);
        __m128 r2 = _mm_load_ps(sums + 2 * kRows + half), r3 = _mm_load_ps(sums + 3 * kRows + half);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        _mm256_store_pd(rows[half] + x, _mm256_cvtps_pd(r0));
        _mm256_store_pd(rows[half + 1] + x, _mm256_cvtps_pd(r1));
        _mm256_store_pd(rows[half + 2] + x, _mm256_cvtps_pd(r2));
        _mm256_store_pd(rows[half + 3] + x, _mm256_cvtps_pd(r3));
    }
#else
    for (int r = 0; r < kRows; ++r)
        for (int k = 0; k < 4; ++k) rows[r][x + k] = sums[kRows * k + r];
#endif
}

// Horizontal pass: W pixels of kRows rows of the ring, and up to kPixels - 1 more, from a block.
void sum_rows(const float* block, const Side<float>& across, int32_t W, double* const rows[kRows]) {
    for (int64_t x = 0; x < ring_stride(W); x += 4) {
        alignas(32) float sums[4 * kRows];
        for (int64_t k = 0; k < 4; ++k) {
            const int64_t i = std::min(x + k, int64_t(W) - 1);
            sum_column(block + kRows * across.first[i], across.weight + across.taps * i, across.count[i],
                       sums + kRows * k);
        }
        store_rows(sums, rows, x);
    }
}

// Vertical pass: one output row of W pixels; row(k) is the ring's row of weight[k].
template <class Row>
AUGMENT_FN void sum_output(const double* weight, int32_t count, Row row, int32_t W, uint8_t* out) {
    constexpr double one = 1.0 / (int64_t(1) << (2 * kWeightBits));
    for (int32_t x = 0; x < W; x += kPixels) {
        alignas(32) int32_t level[kPixels];
#if defined(__AVX2__)
        __m256d sum[4] = {};
        for (int32_t k = 0; k < count; ++k) {
            const double* from = row(k) + x;
            const __m256d w = _mm256_broadcast_sd(weight + k);
            for (int v = 0; v < 4; ++v) sum[v] = _mm256_fmadd_pd(_mm256_load_pd(from + 4 * v), w, sum[v]);
        }
        for (int v = 0; v < 4; ++v) {
            const __m256d value = _mm256_fmadd_pd(sum[v], _mm256_set1_pd(one), _mm256_set1_pd(0.5));
            _mm_store_si128(reinterpret_cast<__m128i*>(level + 4 * v), _mm256_cvttpd_epi32(value));  // -0.5: 0
        }
#else
        double sum[kPixels] = {};
        for (int32_t k = 0; k < count; ++k) {
            const double *from = row(k) + x, w = weight[k];
#pragma omp simd
            for (int p = 0; p < kPixels; ++p) sum[p] += from[p] * w;
        }
#pragma omp simd
        for (int p = 0; p < kPixels; ++p) level[p] = int32_t(sum[p] * one + 0.5);
#endif
        const int32_t n = std::min(W - x, int32_t(kPixels));
        if (n == kPixels) {
#pragma omp simd
            for (int p = 0; p < kPixels; ++p) out[x + p] = uint8_t(std::clamp(level[p], 0, 255));
        } else {
            for (int p = 0; p < n; ++p) out[x + p] = uint8_t(std::clamp(level[p], 0, 255));
        }
    }
}

// Fills the tile (3, H', W') of row i with its box, resized and mirrored.
void resize_tile(const Args& a, int64_t i, uint8_t* tile, char* scratch) {
    const int32_t H = a.height, W = a.width, *box = a.resized_crop + 4 * i, box_h = box[2], box_w = box[3];
    const auto across = make_side<float>(a.source_w, box_w, W, a.bicubic[i], a.flip[i], scratch);
    const auto down = make_side<double>(a.source_h, box_h, H, a.bicubic[i], false, scratch);
    auto block = reinterpret_cast<float*>(scratch);
    auto ring = reinterpret_cast<double*>(scratch + block_bytes(a.source_w));
    const int64_t stride = ring_stride(W), capacity = ring_rows(a.source_h, H);
    const uint8_t* corner = a.images + a.index[i] * a.stride_m + box[0] * a.stride_y + box[1] * a.stride_x;
    for (int c = 0; c < 3; ++c) {
        int32_t ready = 0;  // source rows in the ring: the last `capacity` of them
        for (int32_t y = 0; y < H; ++y) {
            for (; ready < down.first[y] + down.count[y]; ready += kRows) {
                const uint8_t* source[kRows];
                double* rows[kRows];
                for (int r = 0; r < kRows; ++r) {
                    source[r] = corner + c * a.stride_c + std::min(ready + r, box_h - 1) * a.stride_y;
                    rows[r] = ring + (ready + r) % capacity * stride;
                }
                load_block(source, box_w, a.stride_x, block);
                sum_rows(block, across, W, rows);
            }
            const int32_t first = down.first[y];
            sum_output(down.weight + down.taps * y, down.count[y],
                       [=](int32_t k) { return ring + (first + k) % capacity * stride; }, W,
                       tile + (int64_t(c) * H + (a.vflip[i] ? H - 1 - y : y)) * W);
        }
    }
}

}  // namespace
