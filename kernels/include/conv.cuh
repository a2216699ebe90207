// Code that convolutions share: shapes, the pixels' windows of taps, and the parity classes of a strided input
// gradient.
#pragma once
#include "polder.cuh"

namespace {

/// Channels are those of one group, and pitches those of all groups. Group number g reads the channels of x from g *
/// in_channels on, and writes those of y from g * out_channels on. The weights are [kernel row][kernel column][channel
/// of a group][out channel of all groups].
struct ConvShape {
    int32_t batch, height, width, in_channels, out_channels, kernel, stride, padding, out_height, out_width;
    int32_t in_pitch, out_pitch;
};

/// A number to divide by, with which a product replaces the division (Granlund and Montgomery, "Division by invariant
/// integers using multiplication", PLDI 1994). Rust computes it: the multiplier takes a division of 64 bits.
struct Divisor {
    uint32_t divisor, multiplier, shift;
};

/// What indices are divided by.
struct ConvDivisors {
    Divisor out_width, out_height, in_channels, out_channels, kernel;
    // Of the parity classes of an input gradient: rows, columns, and taps in a direction. A class has the whole part of
    // a quotient by the stride, or one more.
    Divisor class_height[2], class_width[2], class_taps[2];
};

/// Operands of type T, a result of type D.
template <class T, class D = T>
struct ConvArgs {
    const T* left;   // x, or the output gradient for the input gradient
    const T* right;  // the weights, or the output gradient for the weight gradient
    D* out;
    ConvShape shape;
    ConvDivisors divisors;
    int32_t part_pixels;  // of each part of a weight gradient but the last, which may have fewer
    uint32_t accumulate;
    uint32_t wide_left, wide_right, wide_out;  // whether packs of channels are whole and aligned
    float* moments;  // of the forward's result, on tensor cores: [out channels][row tiles][mean, m2], or null
};

/// n / by, for n from 0 to 2^31 - 1.
__device__ __forceinline__ int quotient(int n, const Divisor& by) {
    return int((__umulhi(by.multiplier, uint32_t(n)) + uint32_t(n)) >> by.shift);
}

/// That of the two divisors whose number is `count`.
__device__ __forceinline__ const Divisor& divisor_of(int count, const Divisor (&both)[2]) {
    return both[count > int(both[0].divisor) ? 1 : 0];
}

__device__ __forceinline__ bool inside(int i, int extent) { return unsigned(i) < unsigned(extent); }

struct Pixel {
    int image, row, column;
};

/// The pixels of a batch of images, by number.
struct Raster {
    Divisor by_width, by_height;

    __device__ __forceinline__ Pixel pixel(int number) const {
        const int line = quotient(number, by_width), image = quotient(line, by_height);
        return {image, line - image * int(by_height.divisor), number - line * int(by_width.divisor)};
    }
};

/// A pixel's window in an NHWC tensor: the place of its first tap, which may be outside. Also a step from such a place
/// to another.
struct Place {
    int row, column, offset;  // offset: of the first tap's first channel, in elements
};

/// The offset of an element of an operand, if it is inside. No tensor has 2^31 elements.
struct Found {
    bool there;
    int32_t offset;
};

/// Some channels of an NHWC tensor [., height, width, pitch]. Every row of the product reads a window of taps. The
/// depth runs over tap rows, tap columns and channels.
template <class T>
struct Windows {
    const T* tensor;
    int height, width, channels, pitch, depth;
    Divisor by_channels, by_tap_columns;
    bool wide;

    __device__ __forceinline__ Windows(const T* tensor, int height, int width, int pitch, int taps,
                                       const Divisor& by_channels, const Divisor& by_tap_columns, bool wide)
        : tensor(tensor), height(height), width(width), channels(int(by_channels.divisor)), pitch(pitch),
          depth(taps * channels), by_channels(by_channels), by_tap_columns(by_tap_columns), wide(wide) {}

    __device__ __forceinline__ Place place(int image, int row, int column) const {
        return {row, column, ((image * height + row) * width + column) * pitch};
    }
    /// A window entirely outside.
    __device__ __forceinline__ Place nowhere() const { return {-(1 << 30), 0, 0}; }

    /// From a window's place to element k of its depth.
    __device__ __forceinline__ Place step(int k) const {
        const int tap = quotient(k, by_channels);
        return step(tap, k - tap * channels);
    }
    __device__ __forceinline__ Place step(int tap, int channel) const {
        const int tap_row = quotient(tap, by_tap_columns), tap_column = tap - tap_row * int(by_tap_columns.divisor);
        return {tap_row, tap_column, (tap_row * width + tap_column) * pitch + channel};
    }
    __device__ __forceinline__ Found find(const Place& at, const Place& step) const {
        return {inside(at.row + step.row, height) && inside(at.column + step.column, width), at.offset + step.offset};
    }
    /// The elements k ... k + V - 1 of the depth.
    template <int V>
    __device__ __forceinline__ Pack<T, V> pack(const Place& at, int k) const {
        Pack<T, V> result{};
        int tap = quotient(k, by_channels), channel = k - tap * channels;
        if (wide) {
            const Found found = find(at, step(tap, channel));
            if (k < depth && found.there) result = load<V>(tensor, found.offset);
            return result;
        }
        POLDER_UNROLL
        for (int j = 0; j < V; ++j) {
            const Found found = find(at, step(tap, channel));
            if (k + j < depth && found.there) result.v[j] = tensor[found.offset];
            if (++channel == channels) channel = 0, ++tap;
        }
        return result;
    }
};

/// Elements j ... j + V - 1 of a row of `count`, zeros beyond its end.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> row_pack(const T* row, int j, int count, bool wide) {
    Pack<T, V> result{};
    if (wide) {
        if (j < count) result = load<V>(row, j);
        return result;
    }
    POLDER_UNROLL
    for (int i = 0; i < V; ++i) {
        if (j + i < count) result.v[i] = row[j + i];
    }
    return result;
}

/// A parity class: the rows (or columns) of x that are `remainder` modulo the stride. Row q * stride + remainder
/// receives gradients from rows q + first ... q + first + taps - 1 of the output, through kernel rows that decrease by
/// `stride` from `last_tap`.
struct ParityClass {
    int taps, first, last_tap;
    int extent;  // number of rows (or columns) in the class, of `whole` ones
};

__device__ __forceinline__ ParityClass parity_class(const ConvShape& s, int remainder, int whole) {
    const int tap = (remainder + s.padding) % s.stride;
    const int taps = tap < s.kernel ? (s.kernel - tap + s.stride - 1) / s.stride : 0;
    return {taps, (remainder + s.padding) / s.stride - (taps - 1), tap + (taps - 1) * s.stride,
            (whole - remainder + s.stride - 1) / s.stride};
}

/// The rows (and columns) of the output gradient that the first pixels of all classes read: first ... end - 1.
struct Reach {
    int first, end;
};

__device__ __forceinline__ Reach reach_of(const ConvShape& s) {
    Reach reach{1 << 30, -(1 << 30)};
    for (int remainder = 0; remainder < s.stride; ++remainder) {
        const ParityClass seen = parity_class(s, remainder, s.height);
        if (seen.taps == 0) continue;
        reach.first = seen.first < reach.first ? seen.first : reach.first;
        reach.end = seen.first + seen.taps > reach.end ? seen.first + seen.taps : reach.end;
    }
    return reach;
}

/// The weights [kernel row][kernel column][channel][out channel], as the input gradient of one class reads them: the
/// depth runs over the taps of the class, from the last kernel row and column to the first, and over the out channels.
template <class T>
struct ClassWeights {
    const T* tensor;
    ParityClass rows, columns;
    int kernel, stride, channels, out_channels, pitch, depth;
    Divisor by_out_channels, by_tap_columns;
    bool wide;

    __device__ __forceinline__ ClassWeights(const T* tensor, const ConvShape& s, const ConvDivisors& by,
                                            const ParityClass& rows, const ParityClass& columns, bool wide)
        : tensor(tensor), rows(rows), columns(columns), kernel(s.kernel), stride(s.stride), channels(s.in_channels),
          out_channels(s.out_channels), pitch(s.out_pitch), depth(rows.taps * columns.taps * s.out_channels),
          by_out_channels(by.out_channels), by_tap_columns(divisor_of(columns.taps, by.class_taps)), wide(wide) {}

    __device__ __forceinline__ uint32_t offset(int tap, int channel, int out) const {
        const int row = quotient(tap, by_tap_columns);
        const int kernel_row = rows.last_tap - row * stride;
        const int kernel_column = columns.last_tap - (tap - row * int(by_tap_columns.divisor)) * stride;
        return (uint32_t(kernel_row * kernel + kernel_column) * channels + channel) * pitch + out;
    }
    /// The elements k ... k + V - 1 of the depth.
    template <int V>
    __device__ __forceinline__ Pack<T, V> pack(int channel, int k) const {
        Pack<T, V> result{};
        if (channel >= channels) return result;
        int tap = quotient(k, by_out_channels), out = k - tap * out_channels;
        if (wide) {
            if (k < depth) result = load<V>(tensor, offset(tap, channel, out));
            return result;
        }
        POLDER_UNROLL
        for (int j = 0; j < V; ++j) {
            if (k + j < depth) result.v[j] = tensor[offset(tap, channel, out)];
            if (++out == out_channels) out = 0, ++tap;
        }
        return result;
    }
};

/// The windows of x that the outputs of the block's group read.
template <class T, class D>
__device__ __forceinline__ Windows<T> input_windows(const ConvArgs<T, D>& a) {
    const ConvShape& s = a.shape;
    return Windows<T>(a.left + int(blockIdx.y) * s.in_channels, s.height, s.width, s.in_pitch, s.kernel * s.kernel,
                      a.divisors.in_channels, a.divisors.kernel, a.wide_left != 0);
}

/// The windows of the output gradient that the pixels of a class read.
template <class T>
__device__ __forceinline__ Windows<T> class_windows(const ConvArgs<T>& a, const ParityClass& rows,
                                                    const ParityClass& columns) {
    const ConvShape& s = a.shape;
    return Windows<T>(a.left + int(blockIdx.y) * s.out_channels, s.out_height, s.out_width, s.out_pitch,
                      rows.taps * columns.taps, a.divisors.out_channels,
                      divisor_of(columns.taps, a.divisors.class_taps), a.wide_left != 0);
}

/// The pixels of a class.
__device__ __forceinline__ Raster class_raster(const ConvDivisors& by, const ParityClass& rows,
                                               const ParityClass& columns) {
    return {divisor_of(columns.extent, by.class_width), divisor_of(rows.extent, by.class_height)};
}

/// The corner of the block's tile. The grid's x runs over column tiles first, so that blocks with the same rows run
/// together.
template <class Tile>
struct Corner {
    int row, column;
    __device__ __forceinline__ explicit Corner(int columns) {
        const int across = (columns + Tile::COLUMNS - 1) / Tile::COLUMNS;
        row = int(blockIdx.x) / across * Tile::ROWS;
        column = int(blockIdx.x) % across * Tile::COLUMNS;
    }
};

}  // namespace
