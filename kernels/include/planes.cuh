// Operations on one image of bytes, which a block works on. The image lies in planes, [channels, height, width], so
// that the CPU's loops vectorise. Each operation has the bits of Pillow's, as torchvision calls it: the tests
// compare them.
#pragma once
#include "philox.cuh"

namespace {

/// Calls `f` for every index below `n`, spread over the block's threads.
template <class F>
__device__ __forceinline__ void each_index(uint32_t n, F f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
#pragma GCC ivdep
        for (uint32_t e = 0; e < n; ++e) f(e);
        return;
    }
#endif
    for (uint32_t e = threadIdx.x; e < n; e += blockDim.x) f(e);
}

/// Calls `f` with index, row and column of every pixel.
template <class F>
__device__ __forceinline__ void each_pixel(uint32_t height, uint32_t width, F f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        for (uint32_t i = 0; i < height; ++i) {
#pragma GCC ivdep
            for (uint32_t j = 0; j < width; ++j) f(i * width + j, i, j);
        }
        return;
    }
#endif
    for (uint32_t p = threadIdx.x; p < height * width; p += blockDim.x) f(p, p / width, p % width);
}

/// An image, and the memory in which its operations work.
struct Canvas {
    uint8_t* now;       // the image
    uint8_t* other;     // as large
    uint8_t* table;     // [channels, 256]
    uint32_t* counts;   // [channels, 256]
    uint32_t* numbers;  // one for each channel
    uint32_t height, width, channels;

    __device__ __forceinline__ uint32_t pixels() const { return height * width; }

    /// Makes the other memory the image, when all threads have written it.
    __device__ __forceinline__ void swap() {
        uint8_t* const before = now;
        now = other;
        other = before;
        __syncthreads();
    }

    /// Replaces every value by what `f` makes of it.
    template <class F>
    __device__ __forceinline__ void map(F f) {
        uint8_t* const image = now;
        each_index(pixels() * channels, [=](uint32_t e) { image[e] = uint8_t(f(int32_t(image[e]))); });
        __syncthreads();
    }
};

/// The grey value of a colour, in units of 2^−16 summed before the shift.
__device__ __forceinline__ int32_t grey_of(int32_t red, int32_t green, int32_t blue) {
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
}

__device__ __forceinline__ int32_t clip_byte(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

/// from + factor (to − from), cut off to a whole number and clipped.
__device__ __forceinline__ int32_t blend_byte(int32_t from, int32_t to, float factor) {
    const float value = mul_add(factor, float(to - from), float(from));
    return int32_t(value < 0.0f ? 0.0f : value > 255.0f ? 255.0f : value);
}

__device__ void blend_color(Canvas& canvas, float factor) {
    if (canvas.channels != 3) return;
    uint8_t *const red = canvas.now, *const green = red + canvas.pixels(), *const blue = green + canvas.pixels();
    each_index(canvas.pixels(), [=](uint32_t p) {
        const int32_t grey = grey_of(red[p], green[p], blue[p]);
        red[p] = uint8_t(blend_byte(grey, red[p], factor));
        green[p] = uint8_t(blend_byte(grey, green[p], factor));
        blue[p] = uint8_t(blend_byte(grey, blue[p], factor));
    });
    __syncthreads();
}

__device__ void blend_contrast(Canvas& canvas, float factor) {
    const uint32_t pixels = canvas.pixels();
    const uint8_t *const red = canvas.now, *const green = red + pixels, *const blue = green + pixels;
    const bool is_grey = canvas.channels == 1;
    uint32_t sum = 0;
    each_index(pixels,
               [&](uint32_t p) { sum += uint32_t(is_grey ? int32_t(red[p]) : grey_of(red[p], green[p], blue[p])); });
    if (threadIdx.x == 0) canvas.numbers[0] = 0;
    __syncthreads();
    atomicAdd(canvas.numbers, sum);
    __syncthreads();
    const int32_t mean = int32_t((2 * uint64_t(canvas.numbers[0]) + pixels) / (2 * uint64_t(pixels)));
    canvas.map([=](int32_t value) { return blend_byte(mean, value, factor); });
}

/// The smoothed image is a mean of 3 × 3 pixels in which the middle one counts five times. Its edge is the image's, so
/// the edge of a blend is, too.
__device__ void blend_sharpness(Canvas& canvas, float factor) {
    const uint32_t height = canvas.height, width = canvas.width;
    if (height < 3 || width < 3) return;
    uint8_t *const image = canvas.now, *const copy = canvas.other;
    each_index(canvas.pixels() * canvas.channels, [=](uint32_t e) { copy[e] = image[e]; });
    __syncthreads();
    for (uint32_t c = 0; c < canvas.channels; ++c) {
        const uint8_t* const above = copy + c * canvas.pixels();
        const uint8_t *const middle = above + width, *const below = middle + width;
        uint8_t* const to = image + c * canvas.pixels() + width + 1;
        each_pixel(height - 2, width - 2, [=](uint32_t, uint32_t i, uint32_t j) {
            // An index of 32 bits could wrap, so the loop would not vectorise.
            const uint64_t p = uint64_t(i) * width + j;
            const int32_t around = above[p] + above[p + 1] + above[p + 2] + middle[p] + middle[p + 2] + below[p] +
                                   below[p + 1] + below[p + 2];
            const int32_t smooth = (2 * (around + 5 * middle[p + 1]) + 13) / 26;
            to[p] = uint8_t(blend_byte(smooth, middle[p + 1], factor));
        });
    }
    __syncthreads();
}

/// Each pixel of the result is the one that lies where `matrix` maps its centre, black where that is outside. The
/// matrix has a row for the column and one for the row, in units of 2^−16.
__device__ void transform(Canvas& canvas, const int32_t* matrix) {
    const uint32_t height = canvas.height, width = canvas.width, pixels = canvas.pixels(), channels = canvas.channels;
    const uint32_t a = uint32_t(matrix[0]), b = uint32_t(matrix[1]), c = uint32_t(matrix[2]);
    const uint32_t d = uint32_t(matrix[3]), e = uint32_t(matrix[4]), f = uint32_t(matrix[5]);
    const uint8_t* const from = canvas.now;
    uint8_t* const to = canvas.other;
    each_pixel(height, width, [=](uint32_t p, uint32_t i, uint32_t j) {
        const uint32_t column = uint32_t(int32_t(c + a * j + b * i) >> 16);
        const uint32_t row = uint32_t(int32_t(f + d * j + e * i) >> 16);
        const bool inside = column < width && row < height;
        const uint32_t q = inside ? row * width + column : 0;
        for (uint32_t k = 0; k < channels; ++k) to[k * pixels + p] = inside ? from[k * pixels + q] : uint8_t(0);
    });
    canvas.swap();
}

/// Counts the values of each channel.
__device__ void count_values(Canvas& canvas) {
    const uint32_t pixels = canvas.pixels();
    each_index(256 * canvas.channels, [=](uint32_t e) { canvas.counts[e] = 0; });
    __syncthreads();
    for (uint32_t c = 0; c < canvas.channels; ++c) {
        uint32_t* const counts = canvas.counts + 256 * c;
        const uint8_t* const plane = canvas.now + c * pixels;
#if defined(POLDER_HOST)
        if (blockDim.x == 1) {
            for (uint32_t p = 0; p < pixels; ++p) ++counts[plane[p]];
            continue;
        }
#endif
        each_index(pixels, [=](uint32_t p) { atomicAdd(counts + plane[p], 1u); });
    }
    __syncthreads();
}

/// Replaces every value by its entry in the channel's table.
__device__ void look_up(Canvas& canvas) {
    __syncthreads();
    for (uint32_t c = 0; c < canvas.channels; ++c) {
        uint8_t* const plane = canvas.now + c * canvas.pixels();
        const uint8_t* const table = canvas.table + 256 * c;
        each_index(canvas.pixels(), [=](uint32_t p) { plane[p] = table[plane[p]]; });
    }
    __syncthreads();
}

/// Maps the smallest value of each channel to 0 and the largest to 255, and cuts off to whole numbers.
__device__ void stretch(Canvas& canvas) {
    count_values(canvas);
    each_index(canvas.channels, [=](uint32_t c) {
        const uint32_t* const counts = canvas.counts + 256 * c;
        uint32_t low = 0, high = 255;
        while (counts[low] == 0) ++low;
        while (counts[high] == 0) --high;
        canvas.numbers[c] = low | high << 8;
    });
    __syncthreads();
    each_index(256 * canvas.channels, [=](uint32_t e) {
        const uint32_t low = canvas.numbers[e / 256] & 255, high = canvas.numbers[e / 256] >> 8, value = e % 256;
        int32_t stretched = int32_t(value);
        if (high > low) {
            const double scale = exact_div(255.0, double(high - low)), offset = exact_mul(-double(low), scale);
            stretched = clip_byte(int32_t(exact_add(exact_mul(double(value), scale), offset)));
        }
        canvas.table[e] = uint8_t(stretched);
    });
    look_up(canvas);
}

/// Maps each value to the share of pixels below it, in steps of a 255th of those that are not of the largest value.
__device__ void equalize(Canvas& canvas) {
    count_values(canvas);
    const uint32_t pixels = canvas.pixels();
    each_index(canvas.channels, [=](uint32_t c) {
        uint32_t* const counts = canvas.counts + 256 * c;
        uint32_t below = 0, last = 0;
        for (uint32_t value = 0; value < 256; ++value) {
            const uint32_t count = counts[value];
            if (count != 0) last = count;
            counts[value] = below;
            below += count;
        }
        canvas.numbers[c] = (pixels - last) / 255;
    });
    __syncthreads();
    each_index(256 * canvas.channels, [=](uint32_t e) {
        const uint32_t step = canvas.numbers[e / 256];
        const uint32_t level = step == 0 ? e % 256 : (step / 2 + canvas.counts[e]) / step;
        canvas.table[e] = uint8_t(level > 255 ? 255 : level);
    });
    look_up(canvas);
}

/// Turns the hue by `shift` of 256 steps: through hue, saturation and value in bytes, and back.
__device__ void turn_hue(Canvas& canvas, int32_t shift) {
    if (canvas.channels != 3) return;
    uint8_t *const reds = canvas.now, *const greens = reds + canvas.pixels(), *const blues = greens + canvas.pixels();
    each_index(canvas.pixels(), [=](uint32_t p) {
        const int32_t red = reds[p], green = greens[p], blue = blues[p];
        const int32_t more = green > blue ? green : blue, less = green < blue ? green : blue;
        const int32_t most = red > more ? red : more, least = red < less ? red : less;
        const bool is_grey = most == least;
        const float range = is_grey ? 1.0f : float(most - least);
        const float r = exact_div(float(most - red), range), g = exact_div(float(most - green), range);
        const float b = exact_div(float(most - blue), range);
        // Sums of up to three terms in double, as Pillow has them, rounded to float once.
        const double turn = red == most     ? double(exact_add(b, -g))
                            : green == most ? exact_add(exact_add(2.0, double(r)), -double(b))
                                            : exact_add(exact_add(4.0, double(g)), -double(r));
        const double sixth = exact_add(exact_div(double(float(turn)), 6.0), 1.0);
        const float hue = float(sixth >= 1.0 ? exact_add(sixth, -1.0) : sixth);
        const float chroma = exact_div(float(most - least), float(most > 0 ? most : 1));
        const int32_t turned = (int32_t(exact_mul(double(hue), 255.0)) + shift) & 255;
        const int32_t saturation = int32_t(exact_mul(double(chroma), 255.0));
        // And back.
        const double place = exact_div(exact_mul(double(turned), 6.0), 255.0);
        const int32_t sector = int32_t(place);
        const float rest = float(exact_add(place, -double(sector)));
        const float share = float(exact_div(double(saturation), 255.0));
        const double value = double(most), f = double(rest), s = double(share);
        const auto level = [=](double cut) { return int32_t(exact_add(exact_mul(value, exact_add(1.0, -cut)), 0.5)); };
        const int32_t low = level(s), falls = level(exact_mul(s, f));
        const int32_t rises = level(exact_mul(s, exact_add(1.0, -f)));
        const bool even = sector == 0 || sector == 6;
        const int32_t new_red = even || sector == 5 ? most : sector == 1 ? falls : sector == 4 ? rises : low;
        const int32_t new_green = even ? rises : sector == 1 || sector == 2 ? most : sector == 3 ? falls : low;
        const int32_t new_blue = sector == 3 || sector == 4 ? most : sector == 2 ? rises : sector == 5 ? falls : low;
        reds[p] = uint8_t(saturation == 0 ? most : new_red);
        greens[p] = uint8_t(saturation == 0 ? most : new_green);
        blues[p] = uint8_t(saturation == 0 ? most : new_blue);
    });
    __syncthreads();
}

}  // namespace
