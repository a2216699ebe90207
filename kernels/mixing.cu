// Mixes the images of an assembled batch in pairs, the first with the last and so on: mixup (Zhang, Cissé, Dauphin,
// Lopez-Paz 2018) takes a weighted mean of both, CutMix (Yun et al. 2019) exchanges a box. One weight or box serves the
// whole batch. It is drawn from the Philox4x32-10 block whose counter is the batch's, by operations that every device
// rounds alike.
#include "include/elementwise.cuh"
#include "include/philox.cuh"

namespace {

template <class S>
struct MixArgs {
    S* images;               // [batch, height, width, channels]
    const uint32_t* labels;  // [batch]
    uint32_t* others;        // [batch]
    double* share;           // one number
    const uint64_t* clock;   // batches and steps done, or null for none
    const float* mixup;      // [kQuantiles + 1], or null for no mixup
    const float* cutmix;     // likewise
    uint64_t seed;
    uint64_t counter;
    uint64_t stride;  // of the counter, per step of the clock
    uint32_t batch;
    uint32_t height;
    uint32_t width;
    uint32_t channels;
};

/// What a batch draws.
struct Mixture {
    bool boxed;                         // CutMix, otherwise mixup
    float own;                          // mixup's weight of an image in itself
    uint32_t top, bottom, left, right;  // CutMix's box: rows and columns from the first to before the second
};

/// The quantile of a word as a share of 2^32, between two entries of a table.
__device__ __forceinline__ float quantile(const float* table, uint32_t word) {
    constexpr int kBits = 22;
    static_assert(uint64_t(kQuantiles) << kBits == uint64_t(1) << 32, "a word is an index and a fraction");
    const uint32_t index = word >> kBits, rest = word & ((1u << kBits) - 1);
    const float low = table[index], high = table[index + 1];
    return mul_add(exact_add(high, -low), exact_mul(float(rest), 1.0f / float(1u << kBits)), low);
}

/// From `center` − half of a share of `extent` to as much behind it, clipped.
__device__ __forceinline__ void clip_side(uint32_t center, uint32_t extent, float share, uint32_t& from, uint32_t& to) {
    const uint32_t half = uint32_t(exact_mul(float(extent), share)) / 2;
    from = center > half ? center - half : 0;
    to = center + half < extent ? center + half : extent;
}

template <class S>
__device__ __forceinline__ Mixture draw_mixture(const MixArgs<S>& a) {
    const uint64_t steps = a.clock != nullptr ? a.clock[1] : 0;
    const PhiloxBlock random = philox_block(a.seed, a.counter + steps * a.stride);
    Mixture drawn = {};
    drawn.boxed = a.cutmix != nullptr && (a.mixup == nullptr || (random.v[3] & 1u) != 0);
    drawn.own = quantile(drawn.boxed ? a.cutmix : a.mixup, random.v[0]);
    if (drawn.boxed) {
        const float side = exact_sqrt(exact_add(1.0f, -drawn.own));
        clip_side(__umulhi(random.v[1], a.height), a.height, side, drawn.top, drawn.bottom);
        clip_side(__umulhi(random.v[2], a.width), a.width, side, drawn.left, drawn.right);
    }
    return drawn;
}

/// own a + (1 − own) b
__device__ __forceinline__ float blend(float own, float a, float b) {
    return exact_add(exact_mul(own, a), exact_mul(exact_add(1.0f, -own), b));
}
#if defined(POLDER_HOST)
__forceinline__ double blend(float own, double a, double b) { return double(own) * a + double(1.0f - own) * b; }
#endif

/// Mixes value number e of two images.
template <class S>
__device__ __forceinline__ void mix_values(const Mixture& drawn, uint32_t row, uint32_t column, S& first, S& last) {
    typedef Arithmetic<S> T;
    if (!drawn.boxed) {
        const T a = convert_to<T>(first), b = convert_to<T>(last);
        first = convert_to<S>(blend(drawn.own, a, b));
        last = convert_to<S>(blend(drawn.own, b, a));
    } else if (row >= drawn.top && row < drawn.bottom && column >= drawn.left && column < drawn.right) {
        const S kept = first;
        first = last;
        last = kept;
    }
}

/// The mixed images; of each image the label of the other one in its pair; and the share of its own label.
template <class S>
__device__ void mix_batch(const MixArgs<S>& a) {
    const Mixture drawn = draw_mixture(a);
    const uint32_t row_values = a.width * a.channels, values = a.height * row_values;
    const uint32_t block = blockIdx.x + gridDim.x * blockIdx.y, blocks = gridDim.x * gridDim.y;
    for (uint64_t n = uint64_t(block) * blockDim.x + threadIdx.x; n < a.batch; n += uint64_t(blocks) * blockDim.x) {
        a.others[n] = a.labels[a.batch - 1 - n];
    }
    if (block == 0 && threadIdx.x == 0) {
        const double box = double(drawn.bottom - drawn.top) * double(drawn.right - drawn.left);
        *a.share = drawn.boxed ? 1.0 - box / (double(a.height) * double(a.width)) : double(drawn.own);
    }
    const uint32_t pairs = a.batch / 2;
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const uint32_t end = uint32_t(uint64_t(pairs) * (blockIdx.x + 1) / gridDim.x);
        for (uint32_t n = uint32_t(uint64_t(pairs) * blockIdx.x / gridDim.x); n < end; ++n) {
            S* const first = a.images + uint64_t(n) * values;
            S* const last = a.images + uint64_t(a.batch - 1 - n) * values;
            const uint32_t top = drawn.boxed ? drawn.top : 0, bottom = drawn.boxed ? drawn.bottom : a.height;
            const uint32_t left = drawn.boxed ? drawn.left : 0, right = drawn.boxed ? drawn.right : a.width;
            for (uint32_t i = top; i < bottom; ++i) {
                const uint32_t row = i * row_values;
#pragma GCC ivdep
                for (uint32_t e = row + left * a.channels; e < row + right * a.channels; ++e) {
                    mix_values(drawn, top, left, first[e], last[e]);
                }
            }
        }
        return;
    }
#endif
    // A block works on one pair.
    if (blockIdx.x >= pairs) return;
    S* const first = a.images + uint64_t(blockIdx.x) * values;
    S* const last = a.images + uint64_t(a.batch - 1 - blockIdx.x) * values;
    for (uint32_t e = blockIdx.y * blockDim.x + threadIdx.x; e < values; e += gridDim.y * blockDim.x) {
        mix_values(drawn, e / row_values, e % row_values / a.channels, first[e], last[e]);
    }
}

}  // namespace

POLDER_KERNEL(mix_batch_f32, mix_batch<float>, MixArgs<float>)
POLDER_KERNEL(mix_batch_f16, mix_batch<__half>, MixArgs<__half>)
POLDER_KERNEL(mix_batch_bf16, mix_batch<__nv_bfloat16>, MixArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(mix_batch_f64, mix_batch<double>, MixArgs<double>)
