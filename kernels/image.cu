// Assembles a training batch from byte images on the device: gathers the samples, flips and crops them at random,
// normalises them, and cuts out or erases a part, in one pass that reads a byte and writes a number per value.
#include "include/image.cuh"

namespace {

/// The labels and the normalised images. An index beyond the samples gives an image of NaNs and a label outside of the
/// classes.
template <class S>
__device__ void image_batch(const BatchArgs<S>& a) {
    const uint32_t row_values = a.width * a.channels, values = a.height * row_values;
    const S nan = convert_to<S>(INFINITY - INFINITY);
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        POLDER_DYNAMIC_SHARED(S, table);
        fill_table(a, table);
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
            blank_parts(a, sample, out - values);
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
        if (sample.is_blank(i, j, a.cutout)) return convert_to<S>(0.0f);
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
