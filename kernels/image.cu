// Assembles a training batch from byte images on the device: gathers the samples, flips and crops them at random, and
// normalises them, in one pass that reads a byte and writes a number per value.
//
// A sample's random numbers are the Philox4x32-10 block whose key is the seed and whose counter is the batch's counter
// plus the sample's position, so every device and every launch shape draws the same. Order and counter can follow a
// clock on the device, so that one recorded launch serves every step.
#include "include/elementwise.cuh"
#include "include/philox.cuh"

namespace {

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
    float mean[kMaxImageChannels];
    float std[kMaxImageChannels];
};

/// The index of a sample in the data, and its random draws.
struct Sample {
    uint64_t index;
    uint32_t top, left;  // of the crop, in the padded image
    bool flipped;
    uint32_t cut_row, cut_column;  // the centre of the square that is cut out

    /// Whether a pixel of the result lies in that square.
    __device__ __forceinline__ bool is_cut(uint32_t row, uint32_t column, uint32_t side) const {
        return row + side / 2 - cut_row < side && column + side / 2 - cut_column < side;
    }
};

template <class S>
__device__ __forceinline__ Sample draw_sample(const BatchArgs<S>& a, uint32_t n) {
    const uint64_t batches = a.clock != nullptr ? a.clock[0] : 0, steps = a.clock != nullptr ? a.clock[1] : 0;
    const uint64_t place = a.first + batches * a.stride + n;
    // There is no sample beyond the end of the order.
    Sample sample = {place < a.order_len ? a.order[place] : a.samples, a.pad, a.pad, false, 0, 0};
    if (a.augment) {
        const PhiloxBlock random = philox_block(a.seed, a.counter + a.first + steps * a.stride + n);
        sample.flipped = a.flip && (random.v[0] & 1u) != 0;
        sample.top = __umulhi(random.v[1], 2 * a.pad + 1);
        sample.left = __umulhi(random.v[2], 2 * a.pad + 1);
        sample.cut_row = (random.v[3] & 0xffffu) * a.height >> 16;
        sample.cut_column = (random.v[3] >> 16) * a.width >> 16;
    }
    return sample;
}

template <class S>
__device__ __forceinline__ S normalized(const BatchArgs<S>& a, uint32_t value, uint32_t channel) {
    typedef Arithmetic<S> T;
    return convert_to<S>((T(value) / T(255) - T(a.mean[channel])) / T(a.std[channel]));
}

#if defined(POLDER_HOST)
/// Puts zeros into the square of an image.
template <class S>
void cut_out(const BatchArgs<S>& a, const Sample& sample, S* image) {
    const uint32_t half = a.cutout / 2;
    const uint32_t top = sample.cut_row > half ? sample.cut_row - half : 0;
    const uint32_t left = sample.cut_column > half ? sample.cut_column - half : 0;
    for (uint32_t i = top; i < a.height && sample.is_cut(i, left, a.cutout); ++i) {
        S* const row = image + i * a.width * a.channels;
        for (uint32_t j = left; j < a.width && sample.is_cut(i, j, a.cutout); ++j) {
            for (uint32_t c = 0; c < a.channels; ++c) row[j * a.channels + c] = convert_to<S>(0.0f);
        }
    }
}
#endif

/// The labels and the normalised images. An index beyond the samples gives an image of NaNs and a label outside of the
/// classes.
template <class S>
__device__ void image_batch(const BatchArgs<S>& a) {
    const uint32_t row_values = a.width * a.channels, values = a.height * row_values;
    const S nan = convert_to<S>(INFINITY - INFINITY);
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        POLDER_DYNAMIC_SHARED(S, table);  // [256, channels]: two divisions per value are too slow here
        for (uint32_t e = 0; e < 256 * a.channels; ++e) table[e] = normalized(a, e / a.channels, e % a.channels);
        const uint32_t end = uint32_t(uint64_t(a.batch) * (blockIdx.x + 1) / gridDim.x);
        for (uint32_t n = uint32_t(uint64_t(a.batch) * blockIdx.x / gridDim.x); n < end; ++n) {
            const Sample sample = draw_sample(a, n);
            const bool known = sample.index < a.samples;
            a.out_labels[n] = known ? a.labels[sample.index] : 0xffffffffu;
            S* out = a.out + uint64_t(n) * values;
            if (!known) {
                for (uint32_t e = 0; e < values; ++e) out[e] = nan;
                continue;
            }
            const uint8_t* const image = a.images + sample.index * values;
            for (uint32_t i = 0; i < a.height; ++i) {
                const uint32_t h = i + sample.top - a.pad;  // wraps beyond the height if it is in the padding
                for (uint32_t j = 0; j < a.width; ++j) {
                    uint32_t w = j + sample.left - a.pad;
                    const bool inside = h < a.height && w < a.width;
                    if (sample.flipped) w = a.width - 1 - w;
                    const uint8_t* const pixel = image + (inside ? (h * a.width + w) * a.channels : 0);
                    for (uint32_t c = 0; c < a.channels; ++c) {
                        *out++ = table[(inside ? pixel[c] : 0u) * a.channels + c];
                    }
                }
            }
            if (a.cutout != 0) cut_out(a, sample, out - values);
        }
        return;
    }
#endif
    // A block works on one sample.
    const uint32_t n = blockIdx.x;
    const Sample sample = draw_sample(a, n);
    const bool known = sample.index < a.samples;
    if (blockIdx.y == 0 && threadIdx.x == 0) a.out_labels[n] = known ? a.labels[sample.index] : 0xffffffffu;
    const uint8_t* const image = a.images + (known ? sample.index * values : 0);
    S* const out = a.out + uint64_t(n) * values;
    const auto value_at = [&](uint32_t e) -> S {
        const uint32_t i = e / row_values, j = e % row_values / a.channels, c = e % a.channels;
        const uint32_t h = i + sample.top - a.pad;
        uint32_t w = j + sample.left - a.pad;
        if (!known) return nan;
        if (a.cutout != 0 && sample.is_cut(i, j, a.cutout)) return convert_to<S>(0.0f);
        if (h >= a.height || w >= a.width) return normalized(a, 0, c);
        if (sample.flipped) w = a.width - 1 - w;
        return normalized(a, image[(h * a.width + w) * a.channels + c], c);
    };
    constexpr uint32_t V = kPack<S>;
    const uint32_t first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
    const uint32_t packs = aligned16(out) ? values / V : 0;
    for (uint32_t p = first; p < packs; p += step) {
        Pack<S, V> pack;
        POLDER_UNROLL
        for (uint32_t v = 0; v < V; ++v) pack.v[v] = value_at(p * V + v);
        store(out, p * V, pack);
    }
    for (uint32_t e = packs * V + first; e < values; e += step) out[e] = value_at(e);
}

}  // namespace

POLDER_KERNEL(image_batch_f32, image_batch<float>, BatchArgs<float>)
POLDER_KERNEL(image_batch_f16, image_batch<__half>, BatchArgs<__half>)
POLDER_KERNEL(image_batch_bf16, image_batch<__nv_bfloat16>, BatchArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(image_batch_f64, image_batch<double>, BatchArgs<double>)
