// Assembles a training batch with operations on whole images of bytes: a resized crop or a padded one, a flip, the
// operations of a policy (AutoAugment, RandAugment), colour jitter; then normalisation, Cutout and erasing. A block
// works on one image in shared memory, or in global memory if that is too small. image.cu does the batches that need
// none of this.
#include "include/image.cuh"
#include "include/planes.cuh"

namespace {

/// A step of a policy, for both signs.
struct PolicyStep {
    uint32_t operation;  // a PixelOperation
    uint32_t chance;     // of 2^24
    uint32_t is_signed;  // whether half of the images take the second sign
    float factor[2];     // of a blend
    int32_t number[2];   // the mask of posterize, the threshold of solarize
    int32_t matrix[12];  // of an affine map: six numbers for each sign
};

template <class S>
struct AugmentArgs {
    BatchArgs<S> batch;
    const PolicyStep* steps;  // [sequences, length]
    uint8_t* scratch;         // [batch, 2, channels, height, width], for images that do not fit into shared memory
    uint32_t draws;           // of a sequence; 0: no policy
    uint32_t sequences;
    uint32_t length;
    float least_share;  // of the area in a resized crop; 0: no resized crop
    // What is taken if no box fits.
    uint32_t whole_height, whole_width;
    // Colour jitter: by how much each may differ from 1; hue from 0.
    float brightness, contrast, saturation, hue;
};

/// A resized crop's two weights, and the index of the first: of every column, then of every row.
struct Taps {
    int32_t *first, *low, *high;
};

constexpr int kTapBits = 22;

/// Linear interpolation of `from` pixels at the centre of pixel `at` of `to`; outside there is no pixel.
__device__ __forceinline__ void fill_tap(const Taps& taps, uint32_t index, uint32_t at, uint32_t from, uint32_t to) {
    const double center = exact_mul(exact_add(double(at), 0.5), exact_div(double(from), double(to)));
    const uint32_t first = center > 0.5 ? uint32_t(exact_add(center, -0.5)) : 0;
    const double distance = exact_add(exact_add(double(first), -center), 0.5);
    double low = distance < 0 ? exact_add(1.0, distance) : exact_add(1.0, -distance);
    double high = first + 1 < from ? exact_add(1.0, -exact_add(exact_add(double(first + 1), -center), 0.5)) : 0.0;
    high = high < 0 ? 0.0 : high;
    const double sum = exact_add(low, high);
    low = exact_div(low, sum);
    high = exact_div(high, sum);
    taps.first[index] = int32_t(first);
    taps.low[index] = int32_t(exact_add(exact_mul(low, double(1 << kTapBits)), 0.5));
    taps.high[index] = int32_t(exact_add(exact_mul(high, double(1 << kTapBits)), 0.5));
}

__device__ __forceinline__ int32_t weighed(int32_t a, int32_t low, int32_t b, int32_t high) {
    return clip_byte((a * low + b * high + (1 << (kTapBits - 1))) >> kTapBits);
}

/// A part of the image, enlarged to its size: rows, then columns, each rounded to bytes.
template <class S>
__device__ void crop_and_resize(const AugmentArgs<S>& a, const Sample& sample, Canvas& canvas, int32_t* memory) {
    const uint32_t height = canvas.height, width = canvas.width, channels = canvas.channels, pixels = canvas.pixels();
    const uint32_t lines = height + width;
    Box box = {(height - a.whole_height) / 2, (width - a.whole_width) / 2, a.whole_height, a.whole_width};
    const BoxRange range = {a.least_share, 1.0f, -0.14384104f, 0.14384104f};  // 3/4 to 4/3
    draw_box(a.batch.seed, sample.counter, kUseResizedCrop, height, width, range, false, box);
    const Taps taps = {memory, memory + lines, memory + 2 * lines};
    each_index(lines, [=](uint32_t e) {
        const bool is_column = e < width;
        fill_tap(taps, e, is_column ? e : e - width, is_column ? box.width : box.height, is_column ? width : height);
    });
    __syncthreads();
    const uint8_t* const image = a.batch.images + sample.index * pixels * channels;
    uint8_t* const to = canvas.now;
    const bool flipped = sample.flipped;
    each_pixel(height, width, [=](uint32_t p, uint32_t i, uint32_t j) {
        const uint32_t column = flipped ? width - 1 - j : j, row = width + i;
        const uint32_t left = uint32_t(taps.first[column]), top = uint32_t(taps.first[row]);
        const uint32_t right = left + 1 < box.width ? left + 1 : left, bottom = top + 1 < box.height ? top + 1 : top;
        const uint8_t* const upper = image + ((box.top + top) * width + box.left) * channels;
        const uint8_t* const lower = image + ((box.top + bottom) * width + box.left) * channels;
        const int32_t low = taps.low[column], high = taps.high[column];
        for (uint32_t c = 0; c < channels; ++c) {
            const uint32_t l = left * channels + c, r = right * channels + c;
            const int32_t above = weighed(upper[l], low, upper[r], high);
            const int32_t below = weighed(lower[l], low, lower[r], high);
            to[c * pixels + p] = uint8_t(weighed(above, taps.low[row], below, taps.high[row]));
        }
    });
    __syncthreads();
}

/// The image in planes, flipped and cut out of the padded one.
template <class S>
__device__ void gather_planes(const BatchArgs<S>& a, const Sample& sample, Canvas& canvas) {
    const uint32_t height = canvas.height, width = canvas.width, channels = canvas.channels, pixels = canvas.pixels();
    const uint8_t* const image = a.images + sample.index * pixels * channels;
    uint8_t* const to = canvas.now;
    const uint32_t top = sample.top - a.pad, left = sample.left - a.pad;
    const bool flipped = sample.flipped;
    each_pixel(height, width, [=](uint32_t p, uint32_t i, uint32_t j) {
        const uint32_t row = i + top, column = j + left;  // wraps beyond the size if it is in the padding
        const bool inside = row < height && column < width;
        const uint32_t from = inside ? (row * width + (flipped ? width - 1 - column : column)) * channels : 0;
        for (uint32_t c = 0; c < channels; ++c) to[c * pixels + p] = inside ? image[from + c] : uint8_t(0);
    });
    __syncthreads();
}

__device__ void apply_step(Canvas& canvas, const PolicyStep& step, uint32_t sign) {
    const float factor = sign != 0 ? step.factor[1] : step.factor[0];
    const int32_t number = sign != 0 ? step.number[1] : step.number[0];
    switch (step.operation) {
        case kPixelAffine: transform(canvas, step.matrix + 6 * sign); break;
        case kPixelBrightness: canvas.map([=](int32_t value) { return blend_byte(0, value, factor); }); break;
        case kPixelColor: blend_color(canvas, factor); break;
        case kPixelContrast: blend_contrast(canvas, factor); break;
        case kPixelSharpness: blend_sharpness(canvas, factor); break;
        case kPixelPosterize: canvas.map([=](int32_t value) { return value & number; }); break;
        case kPixelSolarize: canvas.map([=](int32_t value) { return value < number ? value : 255 - value; }); break;
        case kPixelAutoContrast: stretch(canvas); break;
        case kPixelEqualize: equalize(canvas); break;
        case kPixelInvert: canvas.map([](int32_t value) { return 255 - value; }); break;
        default: break;
    }
}

/// `draws` times one of the sequences, each step with its probability.
template <class S>
__device__ void apply_policy(const AugmentArgs<S>& a, const Sample& sample, Canvas& canvas) {
    for (uint32_t draw = 0; draw < a.draws; ++draw) {
        uint32_t chosen = 0;
        for (uint32_t index = 0; index < a.length; ++index) {
            const PhiloxBlock random = philox_block(a.batch.seed, sample.counter, kUsePolicy + draw * a.length + index);
            if (index == 0) chosen = __umulhi(random.v[0], a.sequences);
            const PolicyStep& step = a.steps[chosen * a.length + index];
            if (random.v[1] >> 8 < step.chance) apply_step(canvas, step, step.is_signed & random.v[2] >> 31);
        }
    }
}

/// Uniform from max(0, 1 − strength) to 1 + strength.
__device__ __forceinline__ float jitter_factor(float strength, uint32_t word) {
    const float low = strength < 1.0f ? exact_add(1.0f, -strength) : 0.0f, high = exact_add(1.0f, strength);
    return mul_add(uniform_from(word), exact_add(high, -low), low);
}

/// Brightness, contrast, saturation and hue in an order that is drawn.
template <class S>
__device__ void jitter(const AugmentArgs<S>& a, const Sample& sample, Canvas& canvas) {
    const PhiloxBlock random = philox_block(a.batch.seed, sample.counter, kUseJitter);
    const PhiloxBlock order = philox_block(a.batch.seed, sample.counter, kUseJitterOrder);
    uint32_t place = __umulhi(order.v[0], 24), left = 0x3210, permutations = 6;
    for (uint32_t count = 4; count > 0; --count) {
        const uint32_t shift = 4 * (place / permutations), chosen = left >> shift & 15u;
        place %= permutations;
        permutations = count > 2 ? permutations / (count - 1) : 1;
        left = (left & ((1u << shift) - 1)) | (left >> (shift + 4)) << shift;
        if (chosen == 0 && a.brightness > 0) {
            const float factor = jitter_factor(a.brightness, random.v[0]);
            canvas.map([=](int32_t value) { return blend_byte(0, value, factor); });
        } else if (chosen == 1 && a.contrast > 0) {
            blend_contrast(canvas, jitter_factor(a.contrast, random.v[1]));
        } else if (chosen == 2 && a.saturation > 0) {
            blend_color(canvas, jitter_factor(a.saturation, random.v[2]));
        } else if (chosen == 3 && a.hue > 0) {
            const float turn = exact_mul(exact_add(exact_mul(uniform_from(random.v[3]), 2.0f), -1.0f), a.hue);
            turn_hue(canvas, int32_t(exact_mul(turn, 255.0f)));
        }
    }
}

/// Normalises the planes into the batch's image, with zeros where it is cut out or erased.
template <class S>
__device__ void write_image(const BatchArgs<S>& a, const Sample& sample, const Canvas& canvas, const S* table, S* out) {
    const uint32_t width = canvas.width, channels = canvas.channels, pixels = canvas.pixels();
    const uint8_t* const image = canvas.now;
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        for (uint32_t p = 0; p < pixels; ++p) {
            for (uint32_t c = 0; c < channels; ++c) out[p * channels + c] = table[image[c * pixels + p] * channels + c];
        }
        blank_parts(a, sample, out);
        return;
    }
#endif
    const auto value_at = [&](uint32_t e) -> S {
        const uint32_t p = e / channels, c = e % channels;
        if (sample.is_blank(p / width, p % width, a.cutout)) return convert_to<S>(0.0f);
        return normalized(a, image[c * pixels + p], c);
    };
    constexpr uint32_t V = kPack<S>;
    const uint32_t values = pixels * channels, packs = aligned16(out) ? values / V : 0;
    each_index(packs, [&](uint32_t p) {
        Pack<S, V> pack;
        POLDER_UNROLL
        for (uint32_t v = 0; v < V; ++v) pack.v[v] = value_at(p * V + v);
        store(out, p * V, pack);
    });
    each_index(values - packs * V, [&](uint32_t e) { out[packs * V + e] = value_at(packs * V + e); });
}

template <class S>
__device__ void augment_image(const AugmentArgs<S>& a, uint32_t n, Canvas canvas, int32_t* taps, const S* table) {
    const BatchArgs<S>& batch = a.batch;
    const uint32_t values = canvas.pixels() * canvas.channels;
    const Sample sample = draw_sample(batch, n);
    S* const out = batch.out + uint64_t(n) * values;
    const bool known = sample.index < batch.samples;
    if (threadIdx.x == 0) batch.out_labels[n] = known ? batch.labels[sample.index] : 0xffffffffu;
    if (!known) {
        each_index(values, [=](uint32_t e) { out[e] = convert_to<S>(INFINITY - INFINITY); });
        return;
    }
    if (a.least_share > 0) {
        crop_and_resize(a, sample, canvas, taps);
    } else {
        gather_planes(batch, sample, canvas);
    }
    apply_policy(a, sample, canvas);
    jitter(a, sample, canvas);
    write_image(batch, sample, canvas, table, out);
}

/// The labels and the normalised images. An index beyond the samples gives an image of NaNs and a label outside of the
/// classes. The images lie in shared memory, or else in the scratch. It is a constant which, so that nvcc knows the
/// address space.
template <class S, bool kInShared>
__device__ void augment_batch(const AugmentArgs<S>& a) {
    const BatchArgs<S>& batch = a.batch;
    __shared__ uint32_t numbers[kMaxImageChannels];
    POLDER_DYNAMIC_SHARED(uint32_t, memory);
    const uint32_t channels = batch.channels, values = batch.height * batch.width * channels;
    int32_t* const taps = reinterpret_cast<int32_t*>(memory + 256 * channels);
    uint8_t* const table = reinterpret_cast<uint8_t*>(taps + 3 * (batch.height + batch.width));
    uint8_t* const images = table + 256 * channels;
    const auto canvas = [&](uint32_t n) -> Canvas {
        uint8_t* const now = kInShared ? images : a.scratch + 2 * uint64_t(n) * values;
        return {now, now + values, table, memory, numbers, batch.height, batch.width, channels};
    };
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        // What the bytes become lies behind the two images.
        S* const normal = reinterpret_cast<S*>((uintptr_t(images + 2 * uint64_t(values)) + 7) / 8 * 8);
        fill_table(batch, normal);
        const uint32_t end = uint32_t(uint64_t(batch.batch) * (blockIdx.x + 1) / gridDim.x);
        for (uint32_t n = uint32_t(uint64_t(batch.batch) * blockIdx.x / gridDim.x); n < end; ++n) {
            augment_image(a, n, canvas(n), taps, normal);
        }
        return;
    }
#endif
    augment_image(a, blockIdx.x, canvas(blockIdx.x), taps, static_cast<const S*>(nullptr));
}

}  // namespace

POLDER_KERNEL(augment_batch_f32, (augment_batch<float, true>), AugmentArgs<float>)
POLDER_KERNEL(augment_batch_f16, (augment_batch<__half, true>), AugmentArgs<__half>)
POLDER_KERNEL(augment_batch_bf16, (augment_batch<__nv_bfloat16, true>), AugmentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(augment_batch_f64, (augment_batch<double, true>), AugmentArgs<double>)
POLDER_KERNEL(augment_large_batch_f32, (augment_batch<float, false>), AugmentArgs<float>)
POLDER_KERNEL(augment_large_batch_f16, (augment_batch<__half, false>), AugmentArgs<__half>)
POLDER_KERNEL(augment_large_batch_bf16, (augment_batch<__nv_bfloat16, false>), AugmentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(augment_large_batch_f64, (augment_batch<double, false>), AugmentArgs<double>)
