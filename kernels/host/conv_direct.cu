// Convolution on the CPU, NHWC with HWIO weights: forward, input gradient and weight gradient, without im2col.
//
// All three are products of small register tiles. A tile of the forward pass is a few output pixels (12 with AVX-512, 6
// without) by one panel of 64 bytes of output channels. For every tap row, the tap columns times channels of a pixel
// are one contiguous run of the zero-padded image. So the inner loop broadcasts one number of each pixel's run and
// multiplies it by one packed row of weights. The input gradient is the same loop over the padded output gradient with
// transposed weights. With a stride, its pixels form stride x stride parity classes, each with its own taps, so that no
// zeros are multiplied. A tile of the weight gradient is the same number of neighbours of such a run by one panel,
// summed over pixels.
//
// A block computes the channels of one group of a grouped convolution. If a group has only a part of a panel, a tile
// has several groups side by side. Then the block's copy of the image holds each number once for every channel of the
// panel that reads it, so that the inner loop multiplies two vectors instead of a broadcast number and a vector.
//
// There is one thread per block. A block pads a band of an image, or several small images, into its scratch memory,
// which stays in the L2 cache. Bands, and so all sums, depend only on the shape.
//
// Numbers stored in 16 bits (S) become floats (T) when weights are packed and images are padded, and results are
// rounded once.
#include "../include/conv.cuh"
#include "tiles.cuh"

namespace {

// ---- Packing -------------------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct PackWeightsArgs {
    const S* weight;
    T* packed;
    ConvShape shape;
};

/// weight [taps][in][out] to packed [panel of out][taps][in][kPanel], zeros beyond the last channel.
template <class S>
__device__ void pack_forward(const PackWeightsArgs<S>& a) {
    typedef Arithmetic<S> T;
    constexpr int W = kPanel<T>;
    const int n = a.shape.out_pitch;
    const uint64_t rows = uint64_t(a.shape.kernel) * a.shape.kernel * a.shape.in_channels;
    for_each_index(rows, [&](uint64_t row) {
        for (int first = 0; first < n; first += W) {
            const S* __restrict__ from = a.weight + row * n + first;
            T* __restrict__ to = a.packed + (first / W * rows + row) * W;
            const int columns = n - first < W ? n - first : W;
            for (int j = 0; j < columns; ++j) to[j] = widen(from[j]);
            for (int j = columns; j < W; ++j) to[j] = T(0);
        }
    });
}

/// weight [taps][in][out] to, for every parity class, packed [panel of in][class's taps][out][kPanel]: the taps in the
/// order of increasing rows and columns of the output gradient.
template <class S>
__device__ void pack_input_gradient(const PackWeightsArgs<S>& a) {
    typedef Arithmetic<S> T;
    constexpr int W = kPanel<T>;
    const ConvShape& s = a.shape;
    const int panels = (s.in_pitch + W - 1) / W;
    // One index is one kernel tap and one panel. Every tap belongs to one class.
    const uint64_t taps = uint64_t(s.kernel) * s.kernel;
    for_each_index(taps * panels, [&](uint64_t index) {
        int tap = int(index / panels);
        const int panel = int(index % panels);
        T* packed = a.packed;
        ParityClass rows{}, columns{};
        for (int cls = 0; cls < s.stride * s.stride; ++cls) {
            rows = parity_class(s, cls / s.stride, s.height);
            columns = parity_class(s, cls % s.stride, s.width);
            const int count = rows.taps * columns.taps;
            if (tap < count) break;
            tap -= count;
            packed += uint64_t(count) * s.out_channels * panels * W;
        }
        const int kernel_row = rows.last_tap - tap / columns.taps * s.stride;
        const int kernel_column = columns.last_tap - tap % columns.taps * s.stride;
        const int channels = s.in_pitch - panel * W < W ? s.in_pitch - panel * W : W;
        // The row of weights that channel c of the panel reads.
        const auto row_of = [&](int c) {
            const int channel = panel * W + c, group = channel / s.in_channels;
            const uint64_t row =
                uint64_t(kernel_row * s.kernel + kernel_column) * s.in_channels + channel % s.in_channels;
            return a.weight + row * s.out_pitch + group * s.out_channels;
        };
        T* to = packed + (uint64_t(panel) * rows.taps * columns.taps + tap) * s.out_channels * W;
        // One square of a panel at a time, so that the transposition stays in the cache.
        for (int first = 0; first < s.out_channels; first += W) {
            const int last = first + W < s.out_channels ? first + W : s.out_channels;
            for (int c = 0; c < W; ++c) {
                const S* from = row_of(c < channels ? c : 0);
                for (int o = first; o < last; ++o) to[o * W + c] = c < channels ? widen(from[o]) : T(0);
            }
        }
    });
}

/// Copies `width` of the `channels` channels of an image's window, with zeros outside the image.
template <class S, class T>
__forceinline__ void copy_window(T* to, const S* image, int height, int image_width, int channels, int width,
                                 const Window& window) {
    const int end = window.first_column + window.columns;
    const int left = window.first_column < 0 ? (end < 0 ? window.columns : -window.first_column) : 0;
    const int right = end > image_width ? end - image_width : 0;
    const int inside = window.columns - left - right;
    const size_t row_bytes = size_t(window.columns) * width * sizeof(T);
    for (int r = 0; r < window.rows; ++r, to += window.columns * width) {
        const int row = window.first_row + r;
        if (row < 0 || row >= height || inside <= 0) {
            memset(to, 0, row_bytes);
            continue;
        }
        const S* from = image + (int64_t(row) * image_width + window.first_column + left) * channels;
        memset(to, 0, size_t(left) * width * sizeof(T));
        T* at = to + left * width;
        if (width == channels) {
            copy_widened(at, from, size_t(inside) * width);
        } else if (width == kPanel<T>) {
            for (int i = 0; i < inside; ++i) copy_widened(at + i * kPanel<T>, from + int64_t(i) * channels, kPanel<T>);
        } else {
            for (int i = 0; i < inside; ++i) copy_widened(at + i * width, from + int64_t(i) * channels, size_t(width));
        }
        memset(at + inside * width, 0, size_t(right) * width * sizeof(T));
    }
}

// ---- Groups --------------------------------------------------------------------------------------------------------

/// The channels of the target that a block computes.
struct Lanes {
    int first, count;
    int source;     // the first channel of the source that they read
    bool expanded;  // whether they are a panel of several groups
};

/// The channels number `set`: all of them, or those of a group if they are whole panels, or a panel. The target has
/// `channels` in a group and `pitch` in all, and the source has `source_channels` in a group.
template <class T>
__forceinline__ Lanes lanes_of(int set, int channels, int pitch, int source_channels) {
    constexpr int W = kPanel<T>;
    if (channels == pitch) return {0, pitch, 0, false};
    if (channels % W == 0) return {set * channels, channels, set * source_channels, false};
    return {set * W, pitch - set * W < W ? pitch - set * W : W, 0, true};
}

/// A tensor [., height, width, pitch] as a grouped convolution reads it.
struct Grouped {
    int height, width, channels, pitch;
    int target_channels;  // of the target, in a group
};

/// One pixel for a whole panel of groups with RUN channels of the target each: to[c][lane] = channel c of the lane's
/// group.
template <int RUN, class S, class T>
__forceinline__ void expand_pixel(T* __restrict__ to, const S* __restrict__ from, int channels) {
    constexpr int W = kPanel<T>;
    for (int c = 0; c < channels; ++c) {
        for (int group = 0; group < W / RUN; ++group) {
            const T value = widen(from[group * channels + c]);
            for (int lane = 0; lane < RUN; ++lane) to[c * W + group * RUN + lane] = value;
        }
    }
}

/// The same for groups of any size.
template <class S, class T>
__forceinline__ void expand_any(T* __restrict__ to, const S* __restrict__ pixel, const Grouped& tensor,
                                const Lanes& lanes) {
    constexpr int W = kPanel<T>;
    for (int lane = 0; lane < W; ++lane) {
        const int group = (lanes.first + lane) / tensor.target_channels;
        for (int c = 0; c < tensor.channels; ++c) {
            to[c * W + lane] = lane < lanes.count ? widen(pixel[group * tensor.channels + c]) : T(0);
        }
    }
}

/// Copies an image's window [row][column][channel of a group][lane of the panel], with zeros outside the image.
template <class S, class T>
__forceinline__ void expand_window(T* to, const S* image, const Grouped& tensor, const Lanes& lanes,
                                   const Window& window) {
    const int elements = tensor.channels * kPanel<T>;
    const int64_t first_channel = int64_t(lanes.first / tensor.target_channels) * tensor.channels;
    const int run = lanes.count == kPanel<T> ? tensor.target_channels : 0;
    for (int r = 0; r < window.rows; ++r) {
        for (int column = 0; column < window.columns; ++column, to += elements) {
            const int row = window.first_row + r, at = window.first_column + column;
            if (row < 0 || row >= tensor.height || at < 0 || at >= tensor.width) {
                memset(to, 0, size_t(elements) * sizeof(T));
                continue;
            }
            const S* pixel = image + (int64_t(row) * tensor.width + at) * tensor.pitch;
            const S* from = pixel + first_channel;
            if (run == 1) expand_pixel<1>(to, from, tensor.channels);
            else if (run == 2) expand_pixel<2>(to, from, tensor.channels);
            else if (run == 4) expand_pixel<4>(to, from, tensor.channels);
            else if (run == 8) expand_pixel<8>(to, from, tensor.channels);
            else expand_any(to, pixel, tensor, lanes);
        }
    }
}

/// Copies the window of the channels that the lanes read: expanded, or [row][column][channel of a group]. The number of
/// elements of a pixel is returned.
template <class S, class T>
__forceinline__ int copy_lanes(T* to, const S* image, const Grouped& tensor, const Lanes& lanes, const Window& window) {
    if (lanes.expanded) {
        expand_window(to, image, tensor, lanes, window);
        return tensor.channels * kPanel<T>;
    }
    copy_window(to, image + lanes.source, tensor.height, tensor.width, tensor.pitch, tensor.channels, window);
    return tensor.channels;
}

// ---- Forward and input gradient ------------------------------------------------------------------------------------

/// Rows of packed weights that are multiplied with all pixels of a band before the next ones. For one panel they take
/// 16 KiB, which leaves enough of the L1 cache to the pixels.
constexpr int kBlockDepth = 256;

/// A convolution of the pixels of a band. Each has a place in the padded source and one in the target.
template <class S, class T = Arithmetic<S>>
struct Correlation {
    const T* source;
    const int32_t* source_at;
    S* target;
    const int32_t* target_at;
    int pixels;
    int tap_rows, row_pitch;  // rows of taps, and the elements between them in the source
    int run;                  // numbers that one row of taps reads: tap columns x source channels
    const T* packed;          // [panel][tap_rows][run][kPanel]; panels are panel_depth x kPanel apart
    int panel_depth;          // all rows of taps, also those outside the image, x run
    int first_tap_row;        // the index of the first of these rows
    int target_channels;
    bool accumulate;
    Ahead* ahead;  // the next band
};

/// The depth of a block. A target of fewer bits cannot hold intermediate sums: there the whole depth is one block, so
/// that sums are rounded once.
template <class S, class T>
__forceinline__ int block_depth(int depth) {
    return Same<S, T>::value ? kBlockDepth : depth;
}

/// The approximate number of whole tiles of a band.
template <class S, class T>
__forceinline__ int64_t tiles_of(int64_t pixels, int depth, int target_channels) {
    const int block = block_depth<S, T>(depth);
    return pixels / kTileRows * ((depth + block - 1) / block) * (round_up(target_channels, kPanel<T>) / kPanel<T>);
}

/// Number k of a run, or its vector number v if the source is expanded.
template <bool EXPANDED, class T>
__forceinline__ auto factor(const T* run, int64_t k, int v) {
    if constexpr (EXPANDED) {
        return load_vector(run + k * kPanel<T> + v * Vector<T>::lanes);
    } else {
        return run[k];
    }
}

/// Multiplies ROWS pixels by one panel, over `rows` rows of taps with `length` elements each. `columns` of the panel
/// are stored.
template <int ROWS, bool EXPANDED, class S, class T>
__forceinline__ void correlate_tile(const Correlation<S, T>& job, int pixel, int row, int rows, int start, int length,
                                    const T* __restrict__ b, int channel, int columns, bool add) {
    using V = typename Vector<T>::type;
    constexpr int L = Vector<T>::lanes, UNIT = EXPANDED ? kPanel<T> : 1;
    const T* a[ROWS];
    S* c[ROWS];
    V sum[ROWS][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
        a[i] = job.source + job.source_at[pixel + i] + int64_t(row) * job.row_pitch + int64_t(start + length) * UNIT;
        c[i] = job.target + job.target_at[pixel + i] + channel;
        for (V& lanes : sum[i]) lanes = V{};
    }
    // These lines are written at the end. Without prefetching, the stores would wait for memory one after the other.
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) __builtin_prefetch(c[i], 1);
    for (int r = 0; r < rows; ++r) {
        // The pointers are at the end of their runs and the loop counts up to zero: a separate end would need one
        // register too many.
        for (int64_t k = -int64_t(length); k < 0; ++k, b += kPanel<T>) {
            V panel[kVectors];
            for (int v = 0; v < kVectors; ++v) panel[v] = load_vector(b + v * L);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) {
                for (int v = 0; v < kVectors; ++v) sum[i][v] += factor<EXPANDED>(a[i], k, v) * panel[v];
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) a[i] += job.row_pitch;
    }
    if constexpr (Same<S, T>::value) {
        if (columns == kPanel<T>) {
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) {
                for (int v = 0; v < kVectors; ++v) {
                    if (add) sum[i][v] += load_vector(c[i] + v * L);
                    store_vector(c[i] + v * L, sum[i][v]);
                }
            }
            return;
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        T tile[kPanel<T>];
        for (int v = 0; v < kVectors; ++v) store_vector(tile + v * L, sum[i][v]);
        for (int j = 0; j < columns; ++j) c[i][j] = convert_to<S>(add ? widen(c[i][j]) + tile[j] : tile[j]);
    }
}

/// Not inlined: within the loops of a kernel gcc would keep the tile's pointers on the stack.
template <bool EXPANDED, class S, class T>
__attribute__((noinline)) void correlate_as(const Correlation<S, T>& job) {
    constexpr int W = kPanel<T>;
    const int block = block_depth<S, T>(job.panel_depth);
    // Blocks begin at the same rows of taps for every pixel. So leaving out rows, which would add zeros, does not
    // change the result.
    const int rows_at_once = job.run > block ? 1 : block / job.run;
    const int parts = (job.run + block - 1) / block, length_at_once = (job.run + parts - 1) / parts;
    for (int channel = 0; channel < job.target_channels; channel += W) {
        const int columns = job.target_channels - channel < W ? job.target_channels - channel : W;
        const T* panel = job.packed + int64_t(channel) * job.panel_depth;
        for (int row = 0, rows; row < job.tap_rows; row += rows) {
            rows = rows_at_once - (job.first_tap_row + row) % rows_at_once;
            if (rows > job.tap_rows - row) rows = job.tap_rows - row;
            for (int start = 0; start < job.run; start += length_at_once) {
                const int length = job.run - start < length_at_once ? job.run - start : length_at_once;
                const T* b = panel + (int64_t(row) * job.run + start) * W;
                const bool add = job.accumulate || row > 0 || start > 0;
                int pixel = 0;
                for (; pixel + kTileRows <= job.pixels; pixel += kTileRows) {
                    job.ahead->fetch();
                    correlate_tile<kTileRows, EXPANDED>(job, pixel, row, rows, start, length, b, channel, columns, add);
                }
                with_rows<kTileRows - 1>(job.pixels - pixel, [&](auto rest) {
                    correlate_tile<decltype(rest)::value, EXPANDED>(job, pixel, row, rows, start, length, b, channel,
                                                                    columns, add);
                });
            }
        }
    }
}

template <class S, class T>
__forceinline__ void correlate(const Correlation<S, T>& job, bool expanded) {
    if (expanded) correlate_as<true>(job);
    else correlate_as<false>(job);
}

/// Rows of taps, up to `end`, that are inside the other image. If there are none, one row that reads zeros.
struct TapRows {
    int begin, end;
};

/// The rows of taps inside, for pixels that read the other image's rows from `first` on by `taps` rows of taps.
__forceinline__ TapRows tap_rows(int first, int taps, int height) {
    const int begin = first < 0 ? -first : 0, end = height - first < taps ? height - first : taps;
    return begin < end ? TapRows{begin, end} : TapRows{0, 1};
}

/// Calls f(row, next, taps) for each stretch of rows [row, next), of `rows`, with the same rows of taps inside the
/// image. Taps outside read zeros, which are a large part on small images. `of(row)` gives the taps of a row.
template <class Of, class F>
__forceinline__ void for_each_stretch(int rows, Of of, F f) {
    for (int row = 0, next; row < rows; row = next) {
        const TapRows taps = of(row);
        for (next = row + 1; next < rows; ++next) {
            const TapRows other = of(next);
            if (other.begin != taps.begin || other.end != taps.end) break;
        }
        f(row, next, taps);
    }
}

template <class S, class T = Arithmetic<S>>
struct DirectForwardArgs {
    const S* x;
    const T* packed;
    S* y;
    ConvShape shape;
    Bands bands;
    uint32_t accumulate;
};

/// y[n, i, j, o] = sum over taps and c of x[n, i * stride + tap row - padding, j * stride + tap column - padding, c] *
/// weight
template <class S>
__device__ void forward(const DirectForwardArgs<S>& a) {
    typedef Arithmetic<S> T;
    constexpr bool widens = !Same<S, T>::value;
    const ConvShape& s = a.shape;
    const int C = s.in_channels;
    const Band band = band_at(a.bands, blockIdx.x, s.batch, s.out_height);
    const Window window{band.first_row * s.stride - s.padding, (band.rows - 1) * s.stride + s.kernel, -s.padding,
                        (s.out_width - 1) * s.stride + s.kernel};
    const Lanes lanes = lanes_of<T>(int(blockIdx.y), s.out_channels, s.out_pitch, C);
    const bool grouped = C != s.in_pitch;
    const S* image = a.x + int64_t(band.first_image) * s.height * s.width * s.in_pitch;
    int image_pitch = s.height * s.width * s.in_pitch, row_pitch = s.width * C, elements = C;

    POLDER_DYNAMIC_SHARED(int32_t, tables);
    const int table = round_up(a.bands.images * a.bands.rows * s.out_width, 16);
    int32_t *source_at = tables, *target_at = tables + table;
    const T* source = nullptr;
    if constexpr (!widens) source = image + int64_t(window.first_row) * row_pitch;
    if (widens || s.padding > 0 || grouped) {
        T* padded = reinterpret_cast<T*>(tables + 2 * table);
        source = padded;
        const Grouped tensor{s.height, s.width, C, s.in_pitch, s.out_channels};
        for (int n = 0; n < band.images; ++n, padded += window.rows * window.columns * elements) {
            elements = copy_lanes(padded, image + int64_t(n) * image_pitch, tensor, lanes, window);
        }
        image_pitch = window.rows * window.columns * elements;
        row_pitch = window.columns * elements;
    }
    S* target =
        a.y + (int64_t(band.first_image) * s.out_height + band.first_row) * s.out_width * s.out_pitch + lanes.first;
    const int run = s.kernel * C;
    const T* packed = a.packed + int64_t(lanes.first) * s.kernel * run;
    const Band next = band_after(a.bands, blockIdx.x, polder_position.another_follows, s.batch, s.out_height);
    const int64_t next_pixels = grouped ? 0 : int64_t(next.images) * next.rows * s.stride * s.width;
    const int64_t next_lines = next_pixels * C * int(sizeof(S)) / kLineBytes;
    Ahead ahead(a.x, (int64_t(next.first_image) * s.height + next.first_row * s.stride) * s.width * C, kLineBytes,
                next_lines,
                tiles_of<S, T>(int64_t(band.images) * band.rows * s.out_width, s.kernel * run, s.out_channels));
    const auto taps_of = [&](int row) {
        return tap_rows((band.first_row + row) * s.stride - s.padding, s.kernel, s.height);
    };
    for_each_stretch(band.rows, taps_of, [&](int begin, int end, TapRows taps) {
        int pixels = 0;
        for (int n = 0; n < band.images; ++n) {
            for (int row = begin; row < end; ++row) {
                const int from = n * image_pitch + (row * s.stride + taps.begin) * row_pitch;
                const int to = (n * band.rows + row) * s.out_width * s.out_pitch;
                for (int column = 0; column < s.out_width; ++column, ++pixels) {
                    source_at[pixels] = from + column * s.stride * elements;
                    target_at[pixels] = to + column * s.out_pitch;
                }
            }
        }
        correlate<S, T>({source, source_at, target, target_at, pixels, taps.end - taps.begin, row_pitch, run,
                         packed + int64_t(taps.begin) * run * kPanel<T>, s.kernel * run, taps.begin, lanes.count,
                         a.accumulate != 0, &ahead},
                        lanes.expanded);
    });
}

template <class S, class T = Arithmetic<S>>
struct DirectInputGradientArgs {
    const S* dy;
    const T* packed;
    S* dx;
    ConvShape shape;
    Bands bands;  // in rows of a parity class
    uint32_t accumulate;
};

/// dx[n, i, j, c] = sum over o and the taps by which y depends on x[n, i, j, c] of dy * weight
template <class S>
__device__ void input_gradient(const DirectInputGradientArgs<S>& a) {
    typedef Arithmetic<S> T;
    const ConvShape& s = a.shape;
    const int C = s.in_pitch, O = s.out_channels;
    const Lanes lanes = lanes_of<T>(int(blockIdx.y), s.in_channels, C, O);
    const bool grouped = O != s.out_pitch;
    const int class_rows = (s.height + s.stride - 1) / s.stride, class_columns = (s.width + s.stride - 1) / s.stride;
    const Band band = band_at(a.bands, blockIdx.x, s.batch, class_rows);
    const Reach reach = reach_of(s);
    const int first = reach.first, end = reach.end;
    const Window window{band.first_row + first, band.rows - 1 + end - first, first, class_columns - 1 + end - first};

    POLDER_DYNAMIC_SHARED(int32_t, tables);
    const int table = round_up(a.bands.images * a.bands.rows * class_columns, 16);
    int32_t *source_at = tables, *target_at = tables + table;
    T* const source = reinterpret_cast<T*>(tables + 2 * table);
    const Grouped tensor{s.out_height, s.out_width, O, s.out_pitch, s.in_channels};
    const int elements = lanes.expanded ? O * kPanel<T> : O;
    const int row_pitch = window.columns * elements, image_pitch = window.rows * row_pitch;
    for (int n = 0; n < band.images; ++n) {
        const S* image = a.dy + int64_t(band.first_image + n) * s.out_height * s.out_width * s.out_pitch;
        copy_lanes(source + n * image_pitch, image, tensor, lanes, window);
    }
    const Band next = band_after(a.bands, blockIdx.x, polder_position.another_follows, s.batch, class_rows);
    const int64_t next_pixels = grouped ? 0 : int64_t(next.images) * next.rows * s.out_width;
    const int64_t next_lines = next_pixels * O * int(sizeof(S)) / kLineBytes;
    Ahead ahead(a.dy, (int64_t(next.first_image) * s.out_height + next.first_row) * s.out_width * O, kLineBytes,
                next_lines,
                tiles_of<S, T>(int64_t(band.images) * band.rows * class_columns, s.kernel * s.kernel * O, lanes.count));
    S* target = a.dx + (int64_t(band.first_image) * s.height + band.first_row * s.stride) * s.width * C + lanes.first;
    const T* packed = a.packed;
    for (int cls = 0; cls < s.stride * s.stride; ++cls) {
        const int row_remainder = cls / s.stride, column_remainder = cls % s.stride;
        const ParityClass rows = parity_class(s, row_remainder, s.height);
        const ParityClass columns = parity_class(s, column_remainder, s.width);
        const int run = columns.taps * O;
        // The rows of this class in the band.
        int count = 0;
        while (count < band.rows && (band.first_row + count) * s.stride + row_remainder < s.height) ++count;
        const auto taps_of = [&](int q) { return tap_rows(band.first_row + q + rows.first, rows.taps, s.out_height); };
        for_each_stretch(count, taps_of, [&](int begin, int end, TapRows taps) {
            int pixels = 0;
            for (int n = 0; n < band.images; ++n) {
                for (int q = begin; q < end; ++q) {
                    const int row = q * s.stride + row_remainder;
                    const int from = n * image_pitch + (q + rows.first - first + taps.begin) * row_pitch +
                                     (columns.first - first) * elements;
                    const int to = (n * s.height + row) * s.width * C + column_remainder * C;
                    for (int p = 0; p * s.stride + column_remainder < s.width; ++p, ++pixels) {
                        source_at[pixels] = from + p * elements;
                        target_at[pixels] = to + p * s.stride * C;
                    }
                }
            }
            if (rows.taps * columns.taps > 0) {
                const T* panels = packed + int64_t(lanes.first) * rows.taps * run;
                correlate<S, T>({source, source_at, target, target_at, pixels, taps.end - taps.begin, row_pitch, run,
                                 panels + int64_t(taps.begin) * run * kPanel<T>, rows.taps * run, taps.begin,
                                 lanes.count, a.accumulate != 0, &ahead},
                                lanes.expanded);
            } else if (a.accumulate == 0) {
                for (int i = 0; i < pixels; ++i) memset(target + target_at[i], 0, size_t(lanes.count) * sizeof(S));
            }
        });
        packed += int64_t(rows.taps) * columns.taps * O * round_up(C, kPanel<T>);
    }
}

// ---- Weight gradient -----------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct DirectWeightGradientArgs {
    const S* x;
    const S* dy;
    T* partial;  // [part][slice of in][panel of out][tap row][tap column][in of the slice][kPanel]
    ConvShape shape;
    Bands bands;
    int32_t slice, parts;  // input channels of a slice; parts of the batch
};

/// Pixels of a band: `pixels` beginning at `first`, and the same in `stretches - 1` further images, each `pitch` pixels
/// after the previous one.
struct Stretches {
    int stretches, first, pixels, pitch;
};

/// Multiplies ROWS neighbours of a run by one panel, summed over pixels, and adds the result to the partial sums.
template <int ROWS, bool EXPANDED, class T>
__forceinline__ void outer_tile(const T* a, const int32_t* at, Stretches seen, const T* __restrict__ b, T* partial,
                                bool add) {
    using V = typename Vector<T>::type;
    constexpr int L = Vector<T>::lanes;
    V sum[ROWS][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
        for (V& lanes : sum[i]) lanes = V{};
    }
    for (int stretch = 0; stretch < seen.stretches; ++stretch) {
        const int64_t first = seen.first + int64_t(stretch) * seen.pitch;
        const int32_t* const places = at + first;
        const T* const right = b + first * kPanel<T>;
        for (int64_t k = 0; k < seen.pixels; ++k) {
            const T* pixel = a + places[k];
            V panel[kVectors];
            for (int v = 0; v < kVectors; ++v) panel[v] = load_vector(right + k * kPanel<T> + v * L);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) {
                for (int v = 0; v < kVectors; ++v) sum[i][v] += factor<EXPANDED>(pixel, i, v) * panel[v];
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < kVectors; ++v, partial += L) {
            if (add) sum[i][v] += load_vector(partial);
            store_vector(partial, sum[i][v]);
        }
    }
}

/// The pixels of a band that read a row inside the image, rather than zeros, by a row of taps.
__forceinline__ Stretches inside(const Band& band, const ConvShape& s, int tap_row) {
    int first = 0, end = band.rows;
    while (first < end && (band.first_row + first) * s.stride + tap_row < s.padding) ++first;
    while (first < end && (band.first_row + end - 1) * s.stride + tap_row - s.padding >= s.height) --end;
    const int pitch = band.rows * s.out_width;
    if (end - first == band.rows) return {1, 0, band.images * pitch, 0};
    return {band.images, first * s.out_width, (end - first) * s.out_width, pitch};
}

/// Sums over the images of one part, for one slice of the input channels, or for some groups of channels.
template <class S>
__device__ void weight_gradient(const DirectWeightGradientArgs<S>& a) {
    typedef Arithmetic<S> T;
    constexpr int W = kPanel<T>;
    const ConvShape& s = a.shape;
    const int C = s.in_channels, O = s.out_pitch;
    const bool grouped = C != s.in_pitch;
    const Lanes lanes = lanes_of<T>(int(blockIdx.x), s.out_channels, O, C);
    // A group is one slice.
    const int first_channel = grouped ? 0 : blockIdx.x * a.slice;
    const int width = C - first_channel < a.slice ? C - first_channel : a.slice;
    const int unit = lanes.expanded ? W : 1;
    const int run = s.kernel * width, tiles = (run + kTileRows - 1) / kTileRows;
    const int64_t padded_channels = round_up(O, W), taps = int64_t(s.kernel) * s.kernel;
    T* const partial = a.partial + (int64_t(blockIdx.y) * C + first_channel) * taps * padded_channels;
    const int first_image = int(int64_t(s.batch) * blockIdx.y / a.parts);
    const int part_images = int(int64_t(s.batch) * (blockIdx.y + 1) / a.parts) - first_image;

    const int columns = (s.out_width - 1) * s.stride + s.kernel;
    const int row_pitch = columns * width * unit, image_pitch = ((a.bands.rows - 1) * s.stride + s.kernel) * row_pitch;
    const int most_pixels = a.bands.images * a.bands.rows * s.out_width;
    POLDER_DYNAMIC_SHARED(T, packed);  // [pixel][kPanel]
    T* const padded = packed + int64_t(most_pixels) * W;
    int32_t* const at = reinterpret_cast<int32_t*>(padded + round_up(a.bands.images * image_pitch, 16));
    for (int pixel = 0; pixel < most_pixels; ++pixel) {
        const int row = pixel / s.out_width, column = pixel % s.out_width;
        at[pixel] = row / a.bands.rows * image_pitch + row % a.bands.rows * s.stride * row_pitch +
                    column * s.stride * width * unit;
    }
    const Grouped tensor{s.height, s.width, width, s.in_pitch, s.out_channels};
    const int row_bands = (s.out_height + a.bands.rows - 1) / a.bands.rows;
    const int count = (part_images + a.bands.images - 1) / a.bands.images * row_bands;
    for (int index = 0; index < count; ++index) {
        const Band band = band_at(a.bands, index, part_images, s.out_height);
        const int64_t image = first_image + band.first_image;
        const Window window{band.first_row * s.stride - s.padding, (band.rows - 1) * s.stride + s.kernel, -s.padding,
                            columns};
        for (int n = 0; n < band.images; ++n) {
            const S* x = a.x + (image + n) * s.height * s.width * s.in_pitch + first_channel;
            copy_lanes(padded + n * image_pitch, x, tensor, lanes, window);
        }
        const S* dy = a.dy + (image * s.out_height + band.first_row) * s.out_width * O;
        const int pixels = band.images * band.rows * s.out_width;
        const Band next = band_after(a.bands, index, index + 1 < count, part_images, s.out_height);
        const int64_t next_image = first_image + next.first_image;
        const int64_t next_rows = grouped ? 0 : int64_t(next.images) * next.rows;
        const int64_t parts = int64_t((O + W - 1) / W) * s.kernel * tiles;
        Ahead dy_ahead(a.dy, (next_image * s.out_height + next.first_row) * s.out_width * O, kLineBytes,
                       next_rows * s.out_width * O * int(sizeof(S)) / kLineBytes, parts);
        // With a slice, there is one line for each pixel.
        const bool whole = width == C;
        const int64_t next_pixels = next_rows * s.stride * s.width, pixel_bytes = C * int(sizeof(S));
        Ahead x_ahead(a.x, (next_image * s.height + next.first_row * s.stride) * s.width * C + first_channel,
                      whole ? kLineBytes : pixel_bytes, whole ? next_pixels * pixel_bytes / kLineBytes : next_pixels,
                      parts);
        for (int channel = lanes.first; channel < lanes.first + lanes.count; channel += W) {
            const T* b = packed;
            if constexpr (Same<S, T>::value) {
                if (O == W) b = dy;
            }
            if (b == packed) {
                const int filled = O - channel < W ? O - channel : W;
                for (int pixel = 0; pixel < pixels; ++pixel) {
                    const S* from = dy + int64_t(pixel) * O + channel;
                    T* to = packed + pixel * W;
                    if (filled == W) {
                        copy_widened(to, from, W);
                    } else {
                        for (int j = 0; j < W; ++j) to[j] = j < filled ? widen(from[j]) : T(0);
                    }
                }
            }
            T* sums = partial + channel * taps * width;
            for (int tap_row = 0; tap_row < s.kernel; ++tap_row) {
                const Stretches seen = inside(band, s, tap_row);
                for (int tile = 0; tile < tiles; ++tile) {
                    dy_ahead.fetch();
                    x_ahead.fetch();
                    const int start = run * tile / tiles, rows = run * (tile + 1) / tiles - start;
                    const T* from = padded + tap_row * row_pitch + start * unit;
                    T* to = sums + (tap_row * run + start) * W;
                    const bool add = index > 0;
                    with_rows<kTileRows>(rows, [&](auto rows) {
                        constexpr int ROWS = decltype(rows)::value;
                        if (lanes.expanded) outer_tile<ROWS, true>(from, at, seen, b, to, add);
                        else outer_tile<ROWS, false>(from, at, seen, b, to, add);
                    });
                }
            }
        }
    }
}

template <class T>
struct SumPartsOfBatchArgs {
    const T* partial;
    T* dw;
    ConvShape shape;
    int32_t slice, parts;
    uint32_t accumulate;
};

/// dw[tap][c][o] = sum over parts, in order, of the partial sums, or added to the previous dw
template <class T>
__device__ void sum_parts_of_batch(const SumPartsOfBatchArgs<T>& a) {
    constexpr int W = kPanel<T>;
    const ConvShape& s = a.shape;
    const int C = s.in_channels, O = s.out_pitch, taps = s.kernel * s.kernel;
    const int64_t part_pitch = int64_t(taps) * C * round_up(O, W);
    for_each_index(uint64_t(taps) * C, [&](uint64_t row) {
        const int tap = int(row / C), c = int(row % C), first_channel = c / a.slice * a.slice;
        const int width = C - first_channel < a.slice ? C - first_channel : a.slice;
        const T* slice = a.partial + int64_t(first_channel) * taps * round_up(O, W);
        for (int channel = 0; channel < O; channel += W) {
            const T* from = slice + int64_t(channel) * taps * width + (int64_t(tap) * width + c - first_channel) * W;
            T sum[W];
            for (int j = 0; j < W; ++j) sum[j] = from[j];
            for (int part = 1; part < a.parts; ++part) {
                from += part_pitch;
                for (int j = 0; j < W; ++j) sum[j] += from[j];
            }
            T* to = a.dw + row * O + channel;
            const int columns = O - channel < W ? O - channel : W;
            for (int j = 0; j < columns; ++j) to[j] = a.accumulate ? to[j] + sum[j] : sum[j];
        }
    });
}

}  // namespace

POLDER_HOST_KERNEL(conv_direct_pack_forward_f32, pack_forward<float>, PackWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_direct_pack_forward_f16, pack_forward<__half>, PackWeightsArgs<__half>)
POLDER_HOST_KERNEL(conv_direct_pack_forward_bf16, pack_forward<__nv_bfloat16>, PackWeightsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_direct_pack_forward_f64, pack_forward<double>, PackWeightsArgs<double>)
POLDER_HOST_KERNEL(conv_direct_pack_input_gradient_f32, pack_input_gradient<float>, PackWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_direct_pack_input_gradient_f16, pack_input_gradient<__half>, PackWeightsArgs<__half>)
POLDER_HOST_KERNEL(conv_direct_pack_input_gradient_bf16, pack_input_gradient<__nv_bfloat16>,
                   PackWeightsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_direct_pack_input_gradient_f64, pack_input_gradient<double>, PackWeightsArgs<double>)
POLDER_HOST_KERNEL(conv_direct_forward_f32, forward<float>, DirectForwardArgs<float>)
POLDER_HOST_KERNEL(conv_direct_forward_f16, forward<__half>, DirectForwardArgs<__half>)
POLDER_HOST_KERNEL(conv_direct_forward_bf16, forward<__nv_bfloat16>, DirectForwardArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_direct_forward_f64, forward<double>, DirectForwardArgs<double>)
POLDER_HOST_KERNEL(conv_direct_input_gradient_f32, input_gradient<float>, DirectInputGradientArgs<float>)
POLDER_HOST_KERNEL(conv_direct_input_gradient_f16, input_gradient<__half>, DirectInputGradientArgs<__half>)
POLDER_HOST_KERNEL(conv_direct_input_gradient_bf16, input_gradient<__nv_bfloat16>,
                   DirectInputGradientArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_direct_input_gradient_f64, input_gradient<double>, DirectInputGradientArgs<double>)
POLDER_HOST_KERNEL(conv_direct_weight_gradient_f32, weight_gradient<float>, DirectWeightGradientArgs<float>)
POLDER_HOST_KERNEL(conv_direct_weight_gradient_f16, weight_gradient<__half>, DirectWeightGradientArgs<__half>)
POLDER_HOST_KERNEL(conv_direct_weight_gradient_bf16, weight_gradient<__nv_bfloat16>,
                   DirectWeightGradientArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_direct_weight_gradient_f64, weight_gradient<double>, DirectWeightGradientArgs<double>)
POLDER_HOST_KERNEL(conv_direct_sum_parts_f32, sum_parts_of_batch<float>, SumPartsOfBatchArgs<float>)
POLDER_HOST_KERNEL(conv_direct_sum_parts_f64, sum_parts_of_batch<double>, SumPartsOfBatchArgs<double>)
