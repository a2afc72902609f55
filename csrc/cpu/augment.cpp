// Augmentation of a batch on the CPU: crop, flip, color, normalise, erase, mix, and the targets.
//
// A thread takes one image at a time. Its uint8 pixels are gathered into a planar tile (augment_tile.h), changed there
// in place (contrast needs the whole image's mean), and turned into floats where they are written. Images with erased
// boxes become floats before that, in strips of about a thousand pixels, which stay in the first-level cache at any
// image size. An image and its mixing partner are prepared together and, when they are each other's partners (MixUp's
// reversed batch), written together, so that no image is prepared twice.
#include "augment.h"

#include <omp.h>
#include <algorithm>

#include "augment_noise.h"
#include "augment_tile.h"

namespace {

using namespace augment;

int64_t strip_pixels(int64_t width) { return std::max(kStrip / width, int64_t(1)) * width; }

int64_t tile_bytes(int64_t height, int64_t width) { return padded(3 * height * width); }

int64_t strip_plane(int64_t width) { return strip_pixels(width) + kLanes; }  // floats; the rest is for erase_row

int64_t strip_bytes(int64_t width) { return padded(3 * strip_plane(width) * 4); }

int64_t thread_workspace(int64_t source_h, int64_t source_w, int64_t height, int64_t width) {
    return 2 * tile_bytes(height, width) + 2 * strip_bytes(width) + resize_bytes(source_h, source_w, height, width);
}

// ---- strips of floats: three planes, strip_plane(W') apart ----

// Normalised and erased rows [y0, y1) of image i.
void load_strip(const Args& a, int64_t i, const uint8_t* tile, int32_t y0, int32_t y1, float* strip) {
    const int64_t area = int64_t(a.height) * a.width, n = int64_t(y1 - y0) * a.width, plane = strip_plane(a.width);
    for (int c = 0; c < 3; ++c) {
        const uint8_t* __restrict src = tile + c * area + int64_t(y0) * a.width;
        float* __restrict dst = strip + c * plane;
        const float scale = a.scale[c], bias = a.bias[c];
#pragma omp simd
        for (int64_t p = 0; p < n; ++p) dst[p] = normalise(src[p], scale, bias);
    }
    for (int64_t r = 0; r < a.R; ++r) {
        const int32_t* box = a.erase + 4 * (a.R * i + r);
        if (!has_area(box)) continue;
        float color[3] = {};
        if (a.remode == kRand) {
            const uint64_t key = uint64_t(a.noise_key[i]);
            noise(uint32_t(r), uint32_t(key), uint32_t(key >> 32), color[0], color[1], color[2]);
        }
        for (int32_t y = std::max(y0, box[0]); y < std::min(y1, box[0] + box[2]); ++y) {
            float* row = strip + int64_t(y - y0) * a.width + box[1];
            if (a.remode == kPixel) {
                erase_row(a, i, row, row + plane, row + 2 * plane, y, box[1], box[3]);
            } else {
                for (int c = 0; c < 3; ++c) std::fill_n(row + c * plane, box[3], color[c]);
            }
        }
    }
}

struct Float32 {
    using type = float;
    static AUGMENT_FN float from(float x) { return x; }
};
struct BFloat16 {
    using type = uint16_t;
    static AUGMENT_FN uint16_t from(float x) { return to_bfloat16(x); }
};
struct Float16 {
    using type = uint16_t;
    static AUGMENT_FN uint16_t from(float x) { return to_float16(x); }
};

// Pixels ready to be mixed: channel(c)(p) is channel c of pixel p, normalised.
struct Floats {  // a strip that load_strip filled
    const float* strip;
    int64_t plane;

    AUGMENT_FN auto channel(int c) const {
        return [row = strip + c * plane](int64_t p) { return row[p]; };
    }
};
struct Bytes {  // those of a tile, normalised on their way
    const uint8_t* tile;
    int64_t area;
    const float *scale, *bias;

    AUGMENT_FN auto channel(int c) const {
        return [row = tile + c * area, scale = scale[c], bias = bias[c]](int64_t p) {
            return normalise(row[p], scale, bias);
        };
    }
};

// Writes n pixels from pixel `from` of image i; channel(c)(p) is channel c of the p-th of them.
template <class D, class Channel>
AUGMENT_FN void store(const Args& a, int64_t i, int64_t from, int64_t n, Channel channel) {
    using T = typename D::type;
    const int64_t area = int64_t(a.height) * a.width;
    if (a.channels_last) {
        T* __restrict dst = static_cast<T*>(a.out) + 3 * (i * area + from);
        const auto red = channel(0), green = channel(1), blue = channel(2);
#pragma omp simd
        for (int64_t p = 0; p < n; ++p) {
            dst[3 * p] = D::from(red(p));
            dst[3 * p + 1] = D::from(green(p));
            dst[3 * p + 2] = D::from(blue(p));
        }
        return;
    }
    for (int c = 0; c < 3; ++c) {
        T* __restrict dst = static_cast<T*>(a.out) + (3 * i + c) * area + from;
        const auto value = channel(c);
#pragma omp simd
        for (int64_t p = 0; p < n; ++p) dst[p] = D::from(value(p));
    }
}

bool mixes(const Args& a, int64_t i) { return a.lam[i] != 1.0f || has_area(a.cut + 4 * i); }

// Rows [y0, y1) of output i from its own pixels and, when it mixes, its partner's; both begin at row y0.
template <class D, class Pixels>
void write_rows(const Args& a, int64_t i, Pixels own, Pixels other, int32_t y0, int32_t y1) {
    const int64_t W = a.width, n = (y1 - y0) * W, from = y0 * W;
    const int32_t* cut = a.cut + 4 * i;
    const float lam = a.lam[i];
    if (mixes(a, i) && !has_area(cut)) {
        store<D>(a, i, from, n, [=](int c) {
            return [own = own.channel(c), other = other.channel(c), lam](int64_t p) {
                return mix(own(p), other(p), lam);
            };
        });
        return;
    }
    store<D>(a, i, from, n, [=](int c) { return own.channel(c); });
    if (!mixes(a, i)) return;
    for (int32_t y = std::max(y0, cut[0]); y < std::min(y1, cut[0] + cut[2]); ++y) {
        const int64_t at = (y - y0) * W + cut[1];
        store<D>(a, i, from + at, cut[3], [=](int c) {
            return [other = other.channel(c), at](int64_t p) { return other(at + p); };
        });
    }
}

template <class Pixels>
void write_rows(const Args& a, int64_t i, Pixels own, Pixels other, int32_t y0, int32_t y1) {
    if (a.dtype == kFloat32) write_rows<Float32>(a, i, own, other, y0, y1);
    if (a.dtype == kBFloat16) write_rows<BFloat16>(a, i, own, other, y0, y1);
    if (a.dtype == kFloat16) write_rows<Float16>(a, i, own, other, y0, y1);
}

// ---- one image, with its partner where they can be written together ----

void write_targets(const Args& a, int64_t i) {
    float* row = a.targets + i * a.K;
    const float lam = a.lam[i];
    const int64_t own = a.labels[a.index[i]], other = a.labels[a.index[a.partner[i]]];
    std::fill(row, row + a.K, mix(a.off, a.off, lam));
    row[own] = mix(a.on, own == other ? a.on : a.off, lam);
    if (own != other) row[other] = mix(a.off, a.on, lam);
}

bool erases(const Args& a, int64_t i) {
    for (int64_t r = 0; r < a.R; ++r)
        if (has_area(a.erase + 4 * (a.R * i + r))) return true;
    return false;
}

void augment_image(const Args& a, int64_t i, char* workspace) {
    const int64_t j = a.partner[i];
    const bool together = a.partner[j] == i && i != j && (mixes(a, i) || mixes(a, j));
    if (together && j < i) return;  // written by its partner's turn
    const bool needs_other = together || mixes(a, i);
    auto own_tile = reinterpret_cast<uint8_t*>(workspace), other_tile = own_tile + tile_bytes(a.height, a.width);
    auto own = reinterpret_cast<float*>(workspace + 2 * tile_bytes(a.height, a.width));
    auto other = own + strip_bytes(a.width) / 4;
    char* scratch = reinterpret_cast<char*>(other) + strip_bytes(a.width);
    load_tile(a, i, own_tile, scratch);
    if (needs_other) load_tile(a, j, other_tile, scratch);
    if (!erases(a, i) && !(needs_other && erases(a, j))) {
        const int64_t area = int64_t(a.height) * a.width;
        const Bytes mine{own_tile, area, a.scale, a.bias}, theirs{other_tile, area, a.scale, a.bias};
        write_rows(a, i, mine, theirs, 0, a.height);
        if (together) write_rows(a, j, theirs, mine, 0, a.height);
        return;
    }
    const Floats mine{own, strip_plane(a.width)}, theirs{other, strip_plane(a.width)};
    const int32_t rows = int32_t(strip_pixels(a.width) / a.width);
    for (int32_t y0 = 0; y0 < a.height; y0 += rows) {
        const int32_t y1 = std::min(y0 + rows, a.height);
        load_strip(a, i, own_tile, y0, y1, own);
        if (needs_other) load_strip(a, j, other_tile, y0, y1, other);
        write_rows(a, i, mine, theirs, y0, y1);
        if (together) write_rows(a, j, theirs, mine, y0, y1);
    }
}

bool box_inside(int32_t height, int32_t width, const int32_t* box) {
    return box[0] >= 0 && box[1] >= 0 && box[2] >= 0 && box[3] >= 0 && int64_t(box[0]) + box[2] <= height &&
           int64_t(box[1]) + box[3] <= width;
}

}  // namespace

int64_t augment_workspace(int64_t source_h, int64_t source_w, int64_t height, int64_t width, int64_t num_threads) {
    return thread_workspace(source_h, source_w, height, width) * num_threads;
}

bool augment_valid(const augment::Args& a) {
    for (int64_t i = 0; i < a.B; ++i) {
        if (a.index[i] < 0 || a.index[i] >= a.M || a.partner[i] < 0 || a.partner[i] >= a.B) return false;
        const int64_t label = a.labels[a.index[i]];
        if (label < 0 || label >= a.K || !(a.lam[i] >= 0.0f && a.lam[i] <= 1.0f)) return false;
        const int32_t y = a.crop[2 * i], x = a.crop[2 * i + 1];
        if (y < -a.height || y > a.source_h || x < -a.width || x > a.source_w) return false;
        int kinds = 0;
        for (int64_t k = 0; k < a.J; ++k) {
            const int32_t factor = a.jitter[a.J * i + k], kind = a.jitter_order[a.J * i + k];
            if (factor < (k == kHue ? -kMaxShift : 0) || factor > (k == kHue ? kMaxShift : kMaxFactor)) return false;
            if (kind >= a.J) return false;
            kinds |= 1 << kind;
        }
        if (kinds != (1 << a.J) - 1 || !box_inside(a.height, a.width, a.cut + 4 * i)) return false;
        if (a.resized_crop && !box_inside(a.source_h, a.source_w, a.resized_crop + 4 * i)) return false;
        for (int64_t r = 0; r < a.R; ++r)
            if (!box_inside(a.height, a.width, a.erase + 4 * (a.R * i + r))) return false;
    }
    return true;
}

void augment_fwd(const augment::Args& a, int num_threads) {
    const int64_t bytes = thread_workspace(a.resized_crop ? a.source_h : 0, a.source_w, a.height, a.width);
#pragma omp parallel num_threads(num_threads)
    {
        char* mine = static_cast<char*>(a.workspace) + bytes * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < a.B; ++i) {
            augment_image(a, i, mine);
            write_targets(a, i);
        }
    }
}
