// The arithmetic of augmentation, one pixel at a time: one source for C++ and CUDA, so that both give the same bits.
//
// Integers up to normalisation, then fp32 with every fused multiply-add written out and contraction switched off. No
// branches on pixels and no tables, so that a compiler turns loops over these functions into vectors. The definitions
// are those of deit_fast/reference/augment.py; the weights of resized crops are in augment_filter.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define AUGMENT_FN __host__ __device__ __forceinline__
#else
#define AUGMENT_FN inline __attribute__((always_inline))
#endif

namespace augment {

constexpr int32_t kOne = 1 << 16;  // 1.0 in the 16.16 format of the color factors
constexpr int32_t kMaxFactor = 64 << 16;
constexpr int32_t kMaxShift = 1 << 15;  // half a turn of the color wheel
enum Kind { kBrightness = 0, kContrast = 1, kSaturation = 2, kHue = 3 };
enum Remode { kConst = 0, kPixel = 1, kRand = 2 };
enum Dtype { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// ---- images, boxes, plan: everything that a kernel needs, by pointer ----

struct Args {
    const uint8_t* images;  // (M, 3, H, W) or (M, H, W, 3): element (m, c, y, x) at the strides below
    int64_t stride_m, stride_c, stride_y, stride_x;
    const int64_t* labels;         // (M,)
    const int64_t* index;          // (B,)
    const int32_t* resized_crop;   // (B, 4), or null: nothing is resized
    const uint8_t* bicubic;        // (B,)
    const int32_t* crop;           // (B, 2)
    const uint8_t* flip;           // (B,)
    const uint8_t* vflip;          // (B,)
    const uint8_t* jitter_order;   // (B, J)
    const int32_t* jitter;         // (B, J)
    const uint8_t* grayscale;      // (B,)
    const int32_t* erase;          // (B, R, 4)
    const int64_t* noise_key;      // (B,)
    const int64_t* partner;        // (B,)
    const float* lam;              // (B,)
    const int32_t* cut;            // (B, 4)
    void* out;                     // (B, 3, H', W'), or (B, H', W', 3) in memory when channels_last
    float* targets;                // (B, K)
    void* workspace;               // of augment_workspace(...) bytes, 64-byte aligned
    int64_t M, B, J, R, K;
    int32_t source_h, source_w, height, width;
    int32_t remode, reflect, channels_last, dtype;
    float scale[3], bias[3];  // uint8 * scale + bias
    float on, off;            // of a smoothed one-hot
};

// Whether (y, x) lies in box (y, x, h, w); any values are safe.
AUGMENT_FN bool in_box(const int32_t* box, int32_t y, int32_t x) {
    const uint32_t h = box[2] > 0 ? box[2] : 0, w = box[3] > 0 ? box[3] : 0;
    return uint32_t(y) - uint32_t(box[0]) < h && uint32_t(x) - uint32_t(box[1]) < w;
}

AUGMENT_FN bool has_area(const int32_t* box) { return box[2] > 0 && box[3] > 0; }

// ---- geometry ----

// A place along a side of n pixels, mirrored at the centres of its end pixels until it lies in [0, n).
AUGMENT_FN int32_t reflected(int32_t place, int32_t n) {
    if (n == 1) return 0;
    const int32_t period = 2 * (n - 1), rest = place % period, inside = rest < 0 ? rest + period : rest;
    return inside < n ? inside : period - inside;
}

// Whether row i is resized, not cropped.
AUGMENT_FN bool resizes(const Args& a, int64_t i) { return a.resized_crop && has_area(a.resized_crop + 4 * i); }

// ---- color ----

// floor(0.2989 r + 0.587 g + 0.114 b), exactly: the weights are rounded up to 1/2^22, which adds less than the 1/10000
// between two sums.
AUGMENT_FN int32_t gray(int32_t r, int32_t g, int32_t b) { return (1253678 * r + 2462057 * g + 478151 * b) >> 22; }

// clamp((x F + base) >> 16): brightness with base 0, contrast and saturation with the bases below.
AUGMENT_FN uint8_t blend(int32_t x, int32_t factor, int32_t base) {
    const int32_t y = (x * factor + base) >> 16;
    return uint8_t(y < 0 ? 0 : y > 255 ? 255 : y);
}

AUGMENT_FN int32_t saturation_base(int32_t gray_value, int32_t factor) { return gray_value * (kOne - factor); }

AUGMENT_FN int32_t contrast_base(int64_t gray_sum, int64_t area, int32_t factor) {
    return int32_t((((gray_sum << 16) / area) * int64_t(kOne - factor)) >> 16);
}

// The pixel with its hue moved by shift turns, 16.16, in [-1/2, 1/2]. Hues are in sixths of a turn, times the chroma.
template <class T>
AUGMENT_FN void turn_hue(int32_t shift, T& r, T& g, T& b) {
    const int32_t red = r, green = g, blue = b;
    const int32_t more = red > green ? red : green, top = more > blue ? more : blue;
    const int32_t less = red < green ? red : green, bottom = less < blue ? less : blue;
    const int32_t chroma = top - bottom, one = chroma << 16, turn = 6 * one;
    int32_t hue = green == top ? 2 * chroma + blue - red : 4 * chroma + red - green;
    hue = (red == top ? green - blue : hue) * 65536 + chroma * (6 * shift);
    hue += hue < 0 ? turn : 0;
    hue -= hue >= turn ? turn : 0;
    int32_t channel[3];
    for (int c = 0; c < 3; ++c) {
        int32_t k = hue + (5 - 2 * c) * one;
        k -= k >= turn ? turn : 0;
        k = k < 4 * one - k ? k : 4 * one - k;
        k = k < one ? k : one;
        channel[c] = ((top << 16) - (k > 0 ? k : 0) + (1 << 15)) >> 16;
    }
    r = T(channel[0]), g = T(channel[1]), b = T(channel[2]);
}

// ---- float ----

AUGMENT_FN float normalise(int32_t x, float scale, float bias) { return fmaf(float(x), scale, bias); }

AUGMENT_FN float mix(float own, float other, float lam) { return fmaf(own, lam, other * (1.0f - lam)); }

AUGMENT_FN uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

AUGMENT_FN float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Round to nearest even; finite x.
AUGMENT_FN uint16_t to_bfloat16(float x) {
    const uint32_t bits = float_bits(x);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Round to nearest even; finite x, infinity from 65520 on. Values below the least normal number, 2^-14, are rounded by
// adding 1/2, whose last bit is half precision's smallest step.
AUGMENT_FN uint16_t to_float16(float x) {
    const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    const uint32_t small = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t half = magnitude < 0x38800000u ? small : magnitude < 0x477ff000u ? normal : 0x7c00u;
    return uint16_t(half | sign);
}

// ---- noise ----

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// Philox4x32-10 of counter (c0, 0, 0, 0): Salmon et al., SC 2011.
AUGMENT_FN void philox(uint32_t c0, uint32_t k0, uint32_t k1, uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
    uint32_t c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c0) * kPhiloxM0, p1 = uint64_t(c2) * kPhiloxM1;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    w0 = c0, w1 = c1, w2 = c2, w3 = c3;
}

// sqrt(-2 log u) for u = ((word >> 8) + 1) / 2^24 in (0, 1]. u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); the
// polynomial (Chebyshev interpolation, 3e-8) is (log(1 + f) - f + f^2 / 2) / f^3.
AUGMENT_FN float noise_radius(uint32_t word) {
    const float u = float(int32_t(word >> 8) + 1) * 0x1p-24f;
    const uint32_t shifted = float_bits(u) - 0x3f3504f3u;  // the bits of sqrt(1/2)
    const float e = float(int32_t(shifted) >> 23);
    const float f = bits_float((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float p = 0.0714975372f;
    p = fmaf(p, f, -0.115712009f);
    p = fmaf(p, f, 0.116615109f);
    p = fmaf(p, f, -0.124110505f);
    p = fmaf(p, f, 0.142499372f);
    p = fmaf(p, f, -0.166684806f);
    p = fmaf(p, f, 0.200007081f);
    p = fmaf(p, f, -0.249999896f);
    p = fmaf(p, f, 0.333333313f);
    const float f2 = f * f;
    const float log1p = f + fmaf(p * f, f2, -0.5f * f2);
    return sqrtf(-2.0f * fmaf(e, 0.693147182f, log1p));
}

// cos and sin of 2 pi v for v = (word >> 8) / 2^24: the quarter turn is taken off in integers, exactly; the rest is
// below pi / 4, where the polynomials in the angle's square are good to 2e-8.
AUGMENT_FN void noise_angle(uint32_t word, float& cosine, float& sine) {
    const int32_t turn = int32_t(word >> 8), quarter = (turn + (1 << 21)) >> 22;
    const float x = float(turn - quarter * (1 << 22)) * 3.74507039e-7f;  // 2 pi / 2^24
    const float z = x * x;
    const float s = fmaf(x * z, fmaf(fmaf(-0.000195879504f, z, 0.0083327489f), z, -0.166666642f), x);
    const float q = fmaf(fmaf(2.45479914e-05f, z, -0.00138883037f), z, 0.0416666642f);
    const float c = fmaf(z * z, q, fmaf(-0.5f, z, 1.0f));
    const float even = (quarter & 1) ? s : c, odd = (quarter & 1) ? c : s;
    cosine = ((quarter + 1) & 2) ? -even : even;
    sine = (quarter & 2) ? -odd : odd;
}

// Three N(0, 1) numbers for the channels of one pixel (y W + x), or box of remode "rand", by Box and Muller.
AUGMENT_FN void noise(uint32_t pixel, uint32_t key_low, uint32_t key_high, float& red, float& green, float& blue) {
    uint32_t w0, w1, w2, w3;
    philox(pixel, key_low, key_high, w0, w1, w2, w3);
    float cosine, sine;
    noise_angle(w1, cosine, sine);
    const float radius = noise_radius(w0);
    red = radius * cosine;
    green = radius * sine;
    noise_angle(w3, cosine, sine);
    blue = noise_radius(w2) * cosine;
}

}  // namespace augment

// ---- launchers ----

// Bytes of Args::workspace; source_h, source_w: of the images where rows are resized, else 0. count: num_threads on the
// CPU, B on a GPU, which needs none where nothing is resized.
int64_t augment_workspace(int64_t source_h, int64_t source_w, int64_t height, int64_t width, int64_t count);

// csrc/cpu/augment.cpp
bool augment_valid(const augment::Args& args);  // whether every index, label, box, ... is in the plan's range
void augment_fwd(const augment::Args& args, int num_threads);

// csrc/cuda/augment.cu. Clamps what it does not check. Returns the launch's cudaError_t.
int augment_fwd(const augment::Args& args, void* stream);
