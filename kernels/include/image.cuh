// What the kernels that assemble batches share: their argument, and what is drawn for a sample.
//
// A sample's random numbers are Philox4x32-10 blocks whose key is the seed and whose counter is the batch's counter
// plus the sample's position, so every device and every launch shape draws the same. The block's third word of the
// counter says what it is for. Order and counter can follow a clock on the device, so that one recorded launch serves
// every step. Whatever is computed from a draw is rounded once an operation, alike on every device.
#pragma once
#include "elementwise.cuh"
#include "philox.cuh"

namespace {

/// The third word of a block's counter: what it is drawn for. Boxes take a block for each try.
enum Use : uint32_t {
    kUseResizedCrop = 1,
    kUseErasing = 11,
    kUseJitter = 21,
    kUseJitterOrder = 22,
    kUsePolicy = 32,
};
/// How often a box is drawn until it fits.
constexpr uint32_t kBoxTries = 10;

template <class S>
struct BatchArgs {
    const uint8_t* images;   // [samples, height, width, channels]
    const uint32_t* labels;  // [samples]
    const uint32_t* order;   // [order_len]
    const uint64_t* clock;   // batches and steps done, or null for none
    S* out;                  // [batch, height, width, channels]
    uint32_t* out_labels;    // [batch]
    uint64_t samples;
    uint64_t seed;
    uint64_t counter;
    uint64_t order_len;
    uint64_t first;   // the batch's position in the order, and in the stream of random numbers
    uint64_t stride;  // samples per tick of the clock, which advances both
    uint32_t batch;
    uint32_t height;
    uint32_t width;
    uint32_t channels;
    uint32_t pad;      // 0: no crop
    uint32_t flip;     // whether to flip at all
    uint32_t augment;  // whether to draw at all
    uint32_t cutout;   // side of the square that is cut out; 0 for none
    uint32_t erasing;  // how many of 2^24 images have a rectangle erased
    float mean[kMaxImageChannels];
    float std[kMaxImageChannels];
};

/// A part of an image.
struct Box {
    uint32_t top, left, height, width;

    __device__ __forceinline__ bool has(uint32_t row, uint32_t column) const {
        return row - top < height && column - left < width;
    }
};

/// The index of a sample in the data, and its random draws.
struct Sample {
    uint64_t index;
    uint64_t counter;    // of its blocks
    uint32_t top, left;  // of the crop, in the padded image
    bool flipped;
    uint32_t cut_row, cut_column;  // the centre of the square that is cut out
    Box erased;

    /// Whether a pixel of the result lies in that square.
    __device__ __forceinline__ bool is_cut(uint32_t row, uint32_t column, uint32_t side) const {
        return row + side / 2 - cut_row < side && column + side / 2 - cut_column < side;
    }

    /// Whether a pixel of the result is cut out or erased.
    __device__ __forceinline__ bool is_blank(uint32_t row, uint32_t column, uint32_t side) const {
        return (side != 0 && is_cut(row, column, side)) || erased.has(row, column);
    }
};

/// The distribution of a box: its share of the area is uniform, the logarithm of its width over its height too.
struct BoxRange {
    float least_share, most_share;
    float low, high;  // half the logarithm of the smallest and of the largest ratio
};

/// e^x for |x| < 0.7, within a few units in the last place.
__device__ __forceinline__ float small_exp(float x) {
    float sum = 1.0f;
    POLDER_UNROLL
    for (int n = 9; n > 0; --n) sum = mul_add(exact_mul(x, 1.0f / float(n)), sum, 1.0f);
    return sum;
}

/// x, which is positive, rounded to a whole number.
__device__ __forceinline__ uint32_t rounded(float x) { return uint32_t(exact_add(x, 0.5f)); }

/// Draws boxes until one has pixels and is not larger than the image, or with `smaller` until one is smaller than the
/// image. Whether there was one in ten tries.
__device__ bool draw_box(uint64_t seed, uint64_t counter, uint32_t use, uint32_t height, uint32_t width,
                         const BoxRange& range, bool smaller, Box& box) {
    for (uint32_t attempt = 0; attempt < kBoxTries; ++attempt) {
        const PhiloxBlock random = philox_block(seed, counter, use + attempt);
        const float share =
            mul_add(uniform_from(random.v[0]), exact_add(range.most_share, -range.least_share), range.least_share);
        const float root = small_exp(mul_add(uniform_from(random.v[1]), exact_add(range.high, -range.low), range.low));
        const float side = exact_sqrt(exact_mul(float(height * width), share));
        const uint32_t wide = rounded(exact_mul(side, root)), high = rounded(exact_div(side, root));
        const bool fits =
            smaller ? wide < width && high < height : wide - 1 < width && high - 1 < height;  // 0 - 1 wraps
        if (fits) {
            box = {__umulhi(random.v[2], height - high + 1), __umulhi(random.v[3], width - wide + 1), high, wide};
            return true;
        }
    }
    return false;
}

template <class S>
__device__ __forceinline__ Sample draw_sample(const BatchArgs<S>& a, uint32_t n) {
    const uint64_t batches = a.clock != nullptr ? a.clock[0] : 0, steps = a.clock != nullptr ? a.clock[1] : 0;
    const uint64_t place = a.first + batches * a.stride + n;
    const uint64_t counter = a.counter + a.first + steps * a.stride + n;
    // There is no sample beyond the end of the order.
    Sample sample = {place < a.order_len ? a.order[place] : a.samples, counter, a.pad, a.pad, false, 0, 0, {}};
    if (a.augment) {
        const PhiloxBlock random = philox_block(a.seed, counter);
        sample.flipped = a.flip && (random.v[0] & 1u) != 0;
        sample.top = __umulhi(random.v[1], 2 * a.pad + 1);
        sample.left = __umulhi(random.v[2], 2 * a.pad + 1);
        sample.cut_row = (random.v[3] & 0xffffu) * a.height >> 16;
        sample.cut_column = (random.v[3] >> 16) * a.width >> 16;
        if (random.v[0] >> 8 < a.erasing) {
            // A share of 0.02 to 0.33, a ratio of 0.3 to 3.3 of height to width.
            const BoxRange range = {0.02f, 0.33f, -0.59696123f, 0.60198640f};
            draw_box(a.seed, counter, kUseErasing, a.height, a.width, range, true, sample.erased);
        }
    }
    return sample;
}

template <class S>
__device__ __forceinline__ S normalized(const BatchArgs<S>& a, uint32_t value, uint32_t channel) {
    typedef Arithmetic<S> T;
    return convert_to<S>((T(value) / T(255) - T(a.mean[channel])) / T(a.std[channel]));
}

#if defined(POLDER_HOST)
/// Puts zeros into a part of an image.
template <class S>
void blank(const BatchArgs<S>& a, const Box& box, S* image) {
    for (uint32_t i = box.top; i < box.top + box.height; ++i) {
        S* const row = image + (i * a.width + box.left) * a.channels;
        for (uint32_t e = 0; e < box.width * a.channels; ++e) row[e] = convert_to<S>(0.0f);
    }
}

/// Puts zeros into the square of an image and into what is erased.
template <class S>
void blank_parts(const BatchArgs<S>& a, const Sample& sample, S* image) {
    if (a.cutout != 0) {
        const uint32_t half = a.cutout / 2;
        const uint32_t top = sample.cut_row > half ? sample.cut_row - half : 0;
        const uint32_t left = sample.cut_column > half ? sample.cut_column - half : 0;
        const uint32_t below = sample.cut_row - half + a.cutout, right = sample.cut_column - half + a.cutout;
        blank(a, {top, left, (below < a.height ? below : a.height) - top, (right < a.width ? right : a.width) - left},
              image);
    }
    blank(a, sample.erased, image);
}

/// What every byte becomes in every channel, [256, channels]: two divisions per value are too slow on the CPU.
template <class S>
void fill_table(const BatchArgs<S>& a, S* table) {
    for (uint32_t e = 0; e < 256 * a.channels; ++e) table[e] = normalized(a, e / a.channels, e % a.channels);
}
#endif

}  // namespace
