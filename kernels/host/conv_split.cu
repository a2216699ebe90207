// Convolution on the CPU in bf16 pieces, NHWC with HWIO weights: forward, input gradient and weight gradient, for
// matrix units (split.cuh). Channels are multiples of 16 on both sides, and there are no groups.
//
// A block splits a band of an image, or of several small ones, into a zero-padded copy in its scratch memory. A left
// tile of the forward pass is up to 16 neighbouring output pixels of a row, and its depth runs over the channels of one
// tap after the other, so it is read from the copy as it stands. Right tiles are packed weights for 16 output channels.
// The input gradient is the same for the padded output gradient with transposed weights. With a stride, its pixels form
// stride x stride parity classes, each with its own taps.
//
// The weight gradient's depth runs over pixels. Its left tiles are the output gradient with pixels along a row, and its
// right tiles pairs of neighbouring pixels of the input. Taps read the pairs from other pixels on: there are copies for
// even and for odd ones. The pixels of an image are numbered through, with those between the rows of the padded image,
// where the output gradient is zero.
//
// There is one thread per block. Bands, and so all sums, depend only on the shape.
#include "../include/conv.cuh"
#include "split.cuh"

namespace {

// ---- Packing -------------------------------------------------------------------------------------------------------

template <class S>
struct SplitWeightsArgs {
    const S* weight;
    uint16_t* packed;
    ConvShape shape;
};

/// weight [taps][in][out] to packed [panel of out][tap][right tile].
template <class P>
__device__ void split_weights(const SplitWeightsArgs<typename P::Stored>& a) {
    const ConvShape& s = a.shape;
    const int taps = s.kernel * s.kernel, panels = s.out_channels / kSide, tiles = row_tiles<P>(s.in_channels);
    for_each_index(uint64_t(panels) * taps, [&](uint64_t index) {
        const int tap = int(index % taps), panel = int(index / taps);
        const auto* from = a.weight + int64_t(tap) * s.in_channels * s.out_channels + panel * kSide;
        pack_channels<P>(a.packed + int64_t(index) * tiles * kTile, s.in_channels,
                         [&](int channel) { return load_floats(from + int64_t(channel) * s.out_channels); });
    });
}

/// weight [taps][in][out] to, for every parity class, packed [panel of in][class's taps][right tile]: the taps in the
/// order of increasing rows and columns of the output gradient.
template <class P>
__device__ void split_turned_weights(const SplitWeightsArgs<typename P::Stored>& a) {
    const ConvShape& s = a.shape;
    const int panels = s.in_channels / kSide, tiles = row_tiles<P>(s.out_channels);
    // One index is one kernel tap and one panel. Every tap belongs to one class.
    for_each_index(uint64_t(s.kernel) * s.kernel * panels, [&](uint64_t index) {
        int tap = int(index / panels);
        const int panel = int(index % panels);
        uint16_t* packed = a.packed;
        ParityClass rows{}, columns{};
        for (int cls = 0; cls < s.stride * s.stride; ++cls) {
            rows = parity_class(s, cls / s.stride, s.height);
            columns = parity_class(s, cls % s.stride, s.width);
            const int count = rows.taps * columns.taps;
            if (tap < count) break;
            tap -= count;
            packed += int64_t(count) * panels * tiles * kTile;
        }
        const int kernel_row = rows.last_tap - tap / columns.taps * s.stride;
        const int kernel_column = columns.last_tap - tap % columns.taps * s.stride;
        const auto* from = a.weight + (int64_t(kernel_row * s.kernel + kernel_column) * s.in_channels + panel * kSide) *
                                          s.out_channels;
        uint16_t* to = packed + (int64_t(panel) * rows.taps * columns.taps + tap) * tiles * kTile;
        // Sixteen columns are transposed at a time.
        Floats square[kSide];
        pack_channels<P>(to, s.out_channels, [&](int channel) {
            if (channel % kSide == 0) {
                for (int c = 0; c < kSide; ++c) square[c] = load_floats(from + int64_t(c) * s.out_channels + channel);
                transpose(square);
            }
            return square[channel % kSide];
        });
    });
}

// ---- Forward and input gradient ------------------------------------------------------------------------------------

/// Splits an image's window of every `step`-th row and column, with zeros outside the image.
template <class P, class S>
__attribute__((noinline)) void split_window(uint16_t* to, const S* image, int height, int width, int channels,
                                            const Window& window, int step) {
    const int length = row_length<P>(channels);
    for (int r = 0; r < window.rows; ++r) {
        const int row = window.first_row + r * step;
        for (int c = 0; c < window.columns; ++c, to += length) {
            const int column = window.first_column + c * step;
            if (!inside(row, height) || !inside(column, width)) {
                memset(to, 0, size_t(length) * sizeof *to);
                continue;
            }
            const S* from = image + (int64_t(row) * width + column) * channels;
            for (int channel = 0; channel < channels; channel += kSide) {
                store_split<P>(to, channel, channels, load_floats(from + channel));
            }
        }
    }
}

/// Pixels of a band, as tiles of neighbours.
template <class P>
struct SplitProduct {
    typedef typename P::Stored S;

    const uint16_t* source;
    S* target;
    int pixel_pitch, tap_pitch, row_pitch;  // in the source: to the next pixel, tap of a row, and row
    int target_pixel_pitch;
    int tap_rows, tap_columns, channels, target_channels;
    const uint16_t* packed;
    bool accumulate;
    // A row of pixels: so many, in tiles of `rows` pixels.
    int columns, tiles, rows;

    SplitProduct(int columns) : columns(columns), tiles((columns + kSide - 1) / kSide) {
        rows = (columns + tiles - 1) / tiles;
    }
};

/// A tile's place: its first pixel in the source and in the target. `skipped` pixels belong to the tile before it.
struct TilePlace {
    int32_t source, target, skipped;
};

/// The most tiles of a band whose rows have so many pixels.
__forceinline__ int most_tiles(const Bands& bands, int columns) {
    return bands.images * bands.rows * ((columns + kSide - 1) / kSide);
}

/// Appends the tiles of a row of pixels, which begins at `source` and `target`. Their number is returned.
template <class P>
__forceinline__ int append_tiles(TilePlace* at, int count, const SplitProduct<P>& job, int source, int target) {
    for (int tile = 0; tile < job.tiles; ++tile) {
        const int wanted = tile * job.rows, last = job.columns - job.rows, first = wanted < last ? wanted : last;
        at[count++] = {source + first * job.pixel_pitch, target + first * job.target_pixel_pitch, wanted - first};
    }
    return count;
}

/// M tiles of pixels times N panels.
template <class P, int M, int N>
__forceinline__ void split_tile(const SplitProduct<P>& job, const MatrixUnit& unit, const TilePlace* at, int panel) {
    typedef typename P::Stored S;
    const int tiles = row_tiles<P>(job.channels);
    const int64_t depth = int64_t(job.tap_rows) * job.tap_columns * tiles * kTile;
    const uint16_t* left[M];
    const uint16_t* right[N];
    for (int m = 0; m < M; ++m) left[m] = job.source + at[m].source;
    for (int n = 0; n < N; ++n) right[n] = job.packed + (panel + n) * depth;
    TileSums<M, N> sums(unit, left, job.pixel_pitch, right);
    const auto target = [&](int m, int n) {
        return job.target + at[m].target + int64_t(at[m].skipped) * job.target_pixel_pitch + (panel + n) * kSide;
    };
    const auto is_whole = [&](int m) { return Same<S, float>::value && at[m].skipped == 0; };
    sums.clear();
    if constexpr (Same<S, float>::value) {
        for (int i = 0; job.accumulate && i < M * N; ++i) {
            if (is_whole(i / N)) sums.load_sum(i, target(i / N, i % N), job.target_pixel_pitch);
        }
    }
    int64_t behind = 0;
    for (int row = 0; row < job.tap_rows; ++row) {
        for (int column = 0; column < job.tap_columns; ++column) {
            const int64_t from = int64_t(row) * job.row_pitch + int64_t(column) * job.tap_pitch;
            behind = multiply_channels<P>(sums, from, behind, job.channels);
        }
    }
    for (int i = 0; i < M * N; ++i) {
        S* to = target(i / N, i % N);
        if constexpr (Same<S, float>::value) {
            if (is_whole(i / N)) {
                sums.store_sum(i, to, job.target_pixel_pitch);
                continue;
            }
        }
        float tile[kSide][kSide];
        sums.store_sum(i, tile[0], kSide);
        for (int row = at[i / N].skipped; row < job.rows; ++row, to += job.target_pixel_pitch) {
            for (int j = 0; j < kSide; ++j) {
                to[j] = convert_to<S>(job.accumulate ? widen(to[j]) + tile[row][j] : tile[row][j]);
            }
        }
    }
}

/// All tiles times all panels: two by two, or four tiles by a single panel.
template <class P>
__attribute__((noinline)) void split_tiles(const SplitProduct<P>& job, const TilePlace* at, int count) {
    const MatrixUnit unit(job.rows);
    const int panels = job.target_channels / kSide;
    int panel = 0;
    for (; panel + 2 <= panels; panel += 2) {
        int tile = 0;
        for (; tile + 2 <= count; tile += 2) split_tile<P, 2, 2>(job, unit, at + tile, panel);
        if (tile < count) split_tile<P, 1, 2>(job, unit, at + tile, panel);
    }
    if (panel == panels) return;
    int tile = 0;
    for (; tile + 4 <= count; tile += 4) split_tile<P, 4, 1>(job, unit, at + tile, panel);
    with_rows<3>(count - tile,
                 [&](auto rest) { split_tile<P, decltype(rest)::value, 1>(job, unit, at + tile, panel); });
}

template <class S>
struct SplitForwardArgs {
    const S* x;
    const uint16_t* packed;
    S* y;
    ConvShape shape;
    Bands bands;
    uint32_t accumulate;
};

/// y[n, i, j, o] = sum over taps and c of x[n, i * stride + tap row - padding, j * stride + tap column - padding, c] *
/// weight
template <class P>
__device__ void split_forward(const SplitForwardArgs<typename P::Stored>& a) {
    const ConvShape& s = a.shape;
    const int C = s.in_channels, O = s.out_channels, length = row_length<P>(C);
    const Band band = band_at(a.bands, blockIdx.x, s.batch, s.out_height);
    // A single tap reads every pixel of the copy, which leaves out the others.
    const int step = s.kernel == 1 ? s.stride : 1, stride = s.stride / step;
    const Window window{band.first_row * s.stride - s.padding, (band.rows - 1) * stride + s.kernel, -s.padding,
                        (s.out_width - 1) * stride + s.kernel};
    POLDER_DYNAMIC_SHARED(TilePlace, places);
    uint16_t* const source = reinterpret_cast<uint16_t*>(places + round_up(most_tiles(a.bands, s.out_width), 16));
    for (int n = 0; n < band.images; ++n) {
        const auto* image = a.x + int64_t(band.first_image + n) * s.height * s.width * C;
        split_window<P>(source + int64_t(n) * window.rows * window.columns * length, image, s.height, s.width, C,
                        window, step);
    }
    // Without neighbours in between, the rows of a band are one.
    const bool flat = s.kernel == 1;
    const int rows = flat ? 1 : band.images * band.rows;
    SplitProduct<P> job(flat ? band.images * band.rows * s.out_width : s.out_width);
    job.source = source;
    job.target = a.y + (int64_t(band.first_image) * s.out_height + band.first_row) * s.out_width * O;
    job.pixel_pitch = stride * length, job.tap_pitch = length, job.row_pitch = window.columns * length;
    job.target_pixel_pitch = O, job.tap_rows = job.tap_columns = s.kernel;
    job.channels = C, job.target_channels = O, job.packed = a.packed, job.accumulate = a.accumulate != 0;
    int count = 0;
    for (int row = 0; row < rows; ++row) {
        const int from = (row / band.rows * window.rows + row % band.rows * stride) * job.row_pitch;
        count = append_tiles(places, count, job, from, row * s.out_width * O);
    }
    split_tiles<P>(job, places, count);
}

template <class S>
struct SplitInputGradientArgs {
    const S* dy;
    const uint16_t* packed;
    S* dx;
    ConvShape shape;
    Bands bands;  // in rows of a parity class
    uint32_t accumulate;
};

/// dx[n, i, j, c] = sum over o and the taps by which y depends on x[n, i, j, c] of dy * weight
template <class P>
__device__ void split_input_gradient(const SplitInputGradientArgs<typename P::Stored>& a) {
    const ConvShape& s = a.shape;
    const int C = s.in_channels, O = s.out_channels, length = row_length<P>(O);
    const int class_rows = (s.height + s.stride - 1) / s.stride, class_columns = (s.width + s.stride - 1) / s.stride;
    const Band band = band_at(a.bands, blockIdx.x, s.batch, class_rows);
    const Reach reach = reach_of(s);
    const Window window{band.first_row + reach.first, band.rows - 1 + reach.end - reach.first, reach.first,
                        class_columns - 1 + reach.end - reach.first};
    POLDER_DYNAMIC_SHARED(TilePlace, places);
    uint16_t* const source = reinterpret_cast<uint16_t*>(places + round_up(most_tiles(a.bands, class_columns), 16));
    for (int n = 0; n < band.images; ++n) {
        const auto* image = a.dy + int64_t(band.first_image + n) * s.out_height * s.out_width * O;
        split_window<P>(source + int64_t(n) * window.rows * window.columns * length, image, s.out_height, s.out_width,
                        O, window, 1);
    }
    auto* const target = a.dx + (int64_t(band.first_image) * s.height + band.first_row * s.stride) * s.width * C;
    const uint16_t* packed = a.packed;
    for (int cls = 0; cls < s.stride * s.stride; ++cls) {
        const int row_remainder = cls / s.stride, column_remainder = cls % s.stride;
        const ParityClass rows = parity_class(s, row_remainder, s.height);
        const ParityClass columns = parity_class(s, column_remainder, s.width);
        if (columns.extent < 1) continue;
        SplitProduct<P> job(columns.extent);
        job.source = source, job.target = target;
        job.pixel_pitch = job.tap_pitch = length, job.row_pitch = window.columns * length;
        job.target_pixel_pitch = s.stride * C, job.tap_rows = rows.taps, job.tap_columns = columns.taps;
        job.channels = O, job.target_channels = C, job.packed = packed, job.accumulate = a.accumulate != 0;
        packed += int64_t(rows.taps) * columns.taps * (C / kSide) * row_tiles<P>(O) * kTile;
        // The rows of this class in the band.
        int band_rows = 0;
        while (band_rows < band.rows && (band.first_row + band_rows) * s.stride + row_remainder < s.height) ++band_rows;
        int count = 0;
        for (int n = 0; n < band.images; ++n) {
            for (int q = 0; q < band_rows; ++q) {
                const int from = (n * window.rows + q + rows.first - reach.first) * job.row_pitch +
                                 (columns.first - reach.first) * length;
                const int to = ((n * s.height + q * s.stride + row_remainder) * s.width + column_remainder) * C;
                if (rows.taps * columns.taps > 0) {
                    count = append_tiles(places, count, job, from, to);
                } else if (a.accumulate == 0) {
                    for (int p = 0; p < columns.extent; ++p) {
                        memset(target + to + int64_t(p) * s.stride * C, 0, size_t(C) * sizeof *target);
                    }
                }
            }
        }
        split_tiles<P>(job, places, count);
    }
}

// ---- Weight gradient -----------------------------------------------------------------------------------------------

template <class S>
struct SplitGradientArgs {
    const S* x;
    const S* dy;
    float* partial;  // [part][panel of in][tap][panel of out][16 of out][16 of in]
    ConvShape shape;
    Bands bands;
    int32_t panels, parts;  // panels of input channels of a block; parts of the batch
};

/// How the pixels of an image of a band are numbered. Pixels of the input are in planes, one for each remainder of rows
/// and of columns by the stride, so that a tap reads neighbours.
struct Numbering {
    int columns, rows;  // of a plane
    int pixels;         // of a plane
    int chunks;         // of the depth: 32 pixels each, up to the last pixel of the output
    int planes;         // remainders of rows, and of columns, that taps read
    int parities;       // copies: of pairs from even numbers on, and from odd ones
    int pairs;          // of one copy

    __forceinline__ Numbering(const ConvShape& s, int band_rows) {
        const int reach = (s.kernel - 1) / s.stride;
        columns = s.out_width + reach, rows = band_rows + reach, pixels = rows * columns;
        chunks = ((band_rows - 1) * columns + s.out_width + kDepth - 1) / kDepth;
        planes = s.kernel < s.stride ? s.kernel : s.stride;
        parities = reach > 0 ? 2 : 1;
        pairs = chunks * kSide + (reach * (columns + 1) + 1) / 2 + 1;
    }
};

/// Walks over a window of every `step`-th row and pixel of an image, row by row: 16 channels of each. Pixels outside
/// the image, and those behind the window, are zero. What it needs for each pixel is in registers.
template <class S>
class PixelWalk {
    const S* image_;
    int64_t pixel_, row_;  // from one pixel to the next, and from one row to the next
    int64_t at_, row_at_;
    int columns_, begin_, count_;  // of the window; the first that is in the image, and how many are
    int step_, row_number_, end_row_;
    int column_, there_;  // of the row, from `begin_` on, and how many of this row are in the image

    __forceinline__ void begin_row() {
        at_ = row_at_;
        column_ = -begin_;
        there_ = inside(row_number_, end_row_) ? count_ : 0;
    }

public:
    __forceinline__ PixelWalk(const S* image, int height, int width, int channels, const Window& window, int step)
        : image_(image), pixel_(int64_t(step) * channels), row_(width * pixel_),
          row_at_((int64_t(window.first_row) * width + window.first_column) * channels), columns_(window.columns),
          begin_(window.first_column < 0 ? (step - 1 - window.first_column) / step : 0), step_(step),
          row_number_(window.first_row), end_row_(window.first_row + window.rows * step) {
        if (end_row_ > height) end_row_ = height;
        const int end = width > window.first_column ? (width - window.first_column + step - 1) / step : 0;
        count_ = (end < columns_ ? end : columns_) - begin_;
        if (count_ < 0) count_ = 0;
        begin_row();
    }

    __forceinline__ Floats next() {
        const Floats x = inside(column_, there_) ? load_floats(image_ + at_) : Floats{};
        at_ += pixel_;
        if (++column_ == columns_ - begin_) {
            row_number_ += step_, row_at_ += row_;
            begin_row();
        }
        return x;
    }
};

/// Writes one plane of 16 channels: to[piece][parity][pair][16 channels][2], with `piece_pitch` and `parity_pitch`
/// numbers in between. Its pixels are every stride-th of the image's rows and columns, from the window's on.
template <class P, class S>
__attribute__((noinline)) void split_pairs(uint16_t* to, int64_t piece_pitch, int64_t parity_pitch, PixelWalk<S> walk,
                                           int count, bool both_parities) {
    Words previous[P::pieces] = {};
    uint16_t* between = to + parity_pitch - kDepth;
    for (int pair = 0; pair < count; ++pair, to += kDepth, between += kDepth) {
        const Floats first = walk.next();
        const SplitPair<P> split(first, walk.next());
        for (int p = 0; p < P::pieces; ++p) {
            memcpy(to + p * piece_pitch, &split.piece[p], sizeof(Words));
            const Words straddling = (previous[p] >> 16) | (split.piece[p] << 16);
            if (both_parities && pair > 0) memcpy(between + p * piece_pitch, &straddling, sizeof straddling);
            previous[p] = split.piece[p];
        }
    }
    for (int p = 0; both_parities && p < P::pieces; ++p) {
        const Words last = previous[p] >> 16;
        memcpy(between + p * piece_pitch, &last, sizeof last);
    }
}

/// Writes 16 channels of the output gradient of a band of an image: to[piece][chunk][channel][32 pixels], with
/// `piece_pitch` numbers in between. Pixels between the rows are zero.
template <class P, class S>
__attribute__((noinline)) void split_gradients(uint16_t* to, int64_t piece_pitch, PixelWalk<S> walk, int chunks) {
    for (int chunk = 0; chunk < chunks; ++chunk, to += kTile) {
        Floats even[kSide], odd[kSide];  // pixels
        for (int k = 0; k < kSide; ++k) even[k] = walk.next(), odd[k] = walk.next();
        transpose(even);
        transpose(odd);
        for (int c = 0; c < kSide; ++c) {
            const SplitPair<P> split(even[c], odd[c]);
            for (int p = 0; p < P::pieces; ++p) {
                memcpy(to + p * piece_pitch + c * kDepth, &split.piece[p], sizeof(Words));
            }
        }
    }
}

/// A band's operands of the weight gradient.
struct SplitBand {
    const uint16_t* gradients;  // [piece][panel of out][image][chunk] left tiles
    const uint16_t* pairs;      // [piece][panel of in][plane][parity][image][pair][16 channels][2]
    int64_t gradient_panel, gradient_piece, pair_plane, pair_panel, pair_piece;  // pitches
    int images;
    float* partial;
    bool add;
    Ahead *x_ahead, *dy_ahead;  // the next band
};

/// M panels of the output times N panels and taps of the input, beginning with number `first`.
template <class P, int M, int N>
__forceinline__ void gradient_tile(const SplitBand& band, const ConvShape& s, const Numbering& n,
                                   const MatrixUnit& unit, int panel, int first) {
    const int taps = s.kernel * s.kernel;
    const uint16_t* left[M];
    const uint16_t* right[N];
    for (int m = 0; m < M; ++m) left[m] = band.gradients + (panel + m) * band.gradient_panel;
    for (int i = 0; i < N; ++i) {
        const int in = (first + i) / taps, tap = (first + i) % taps, row = tap / s.kernel, column = tap % s.kernel;
        const int plane = row % s.stride * n.planes + column % s.stride;
        const int shift = row / s.stride * n.columns + column / s.stride;
        right[i] = band.pairs + in * band.pair_panel + plane * band.pair_plane +
                   int64_t(shift % 2) * band.images * n.pairs * kDepth + shift / 2 * kDepth;
    }
    const auto sum = [&](int i) {
        return band.partial + (int64_t(first + i % N) * (s.out_channels / kSide) + panel + i / N) * kSide * kSide;
    };
    TileSums<M, N> sums(unit, left, kDepth, right);
    sums.clear();
    for (int i = 0; band.add && i < M * N; ++i) sums.load_sum(i, sum(i), kSide);
    for (int image = 0; image < band.images; ++image) {
        for (int chunk = 0; chunk < n.chunks; ++chunk) {
            band.x_ahead->fetch();
            band.dy_ahead->fetch();
            multiply_pieces<P>(sums, (int64_t(image) * n.chunks + chunk) * kTile, band.gradient_piece,
                               (int64_t(image) * n.pairs + chunk * kSide) * kDepth, band.pair_piece);
        }
    }
    for (int i = 0; i < M * N; ++i) sums.store_sum(i, sum(i), kSide);
}

/// All panels of the output times the panels and taps of the block's input.
template <class P>
__attribute__((noinline)) void gradient_tiles(const SplitBand& band, const ConvShape& s, const Numbering& n,
                                              int in_panels) {
    const MatrixUnit unit(kSide);
    const int panels = s.out_channels / kSide, all = in_panels * s.kernel * s.kernel;
    int panel = 0;
    for (; panel + 2 <= panels; panel += 2) {
        int first = 0;
        for (; first + 2 <= all; first += 2) gradient_tile<P, 2, 2>(band, s, n, unit, panel, first);
        if (first < all) gradient_tile<P, 2, 1>(band, s, n, unit, panel, first);
    }
    if (panel == panels) return;
    int first = 0;
    for (; first + 3 <= all; first += 3) gradient_tile<P, 1, 3>(band, s, n, unit, panel, first);
    with_rows<2>(all - first,
                 [&](auto rest) { gradient_tile<P, 1, decltype(rest)::value>(band, s, n, unit, panel, first); });
}

/// Sums over the images of one part, for some panels of the input channels.
template <class P>
__device__ void split_weight_gradient(const SplitGradientArgs<typename P::Stored>& a) {
    const ConvShape& s = a.shape;
    const int taps = s.kernel * s.kernel, panels = s.out_channels / kSide;
    const int first_panel = int(blockIdx.x) * a.panels, rest = s.in_channels / kSide - first_panel;
    const int in_panels = rest < a.panels ? rest : a.panels;
    const int first_image = int(int64_t(s.batch) * blockIdx.y / a.parts);
    const int part_images = int(int64_t(s.batch) * (blockIdx.y + 1) / a.parts) - first_image;
    const int row_bands = (s.out_height + a.bands.rows - 1) / a.bands.rows;
    const int count = (part_images + a.bands.images - 1) / a.bands.images * row_bands;
    const int64_t part_length = int64_t(taps) * s.in_channels * s.out_channels;
    float* const partial = a.partial + blockIdx.y * part_length + int64_t(first_panel) * taps * panels * kSide * kSide;
    POLDER_DYNAMIC_SHARED(uint16_t, memory);
    for (int index = 0; index < count; ++index) {
        const Band band = band_at(a.bands, index, part_images, s.out_height);
        const Numbering n(s, band.rows);
        SplitBand operands{};
        operands.images = band.images, operands.partial = partial, operands.add = index > 0;
        operands.gradient_panel = int64_t(band.images) * n.chunks * kTile;
        operands.gradient_piece = panels * operands.gradient_panel;
        const int64_t parity_pitch = int64_t(band.images) * n.pairs * kDepth;
        operands.pair_plane = n.parities * parity_pitch;
        operands.pair_panel = n.planes * n.planes * operands.pair_plane;
        operands.pair_piece = in_panels * operands.pair_panel;
        uint16_t* const gradients = memory;
        uint16_t* const pairs = memory + P::pieces * operands.gradient_piece;
        operands.gradients = gradients, operands.pairs = pairs;
        for (int i = 0; i < band.images; ++i) {
            const int64_t image = first_image + band.first_image + i;
            const auto* dy = a.dy + (image * s.out_height + band.first_row) * s.out_width * s.out_channels;
            for (int panel = 0; panel < panels; ++panel) {
                const Window window{0, band.rows, 0, n.columns};
                const PixelWalk walk(dy + panel * kSide, band.rows, s.out_width, s.out_channels, window, 1);
                split_gradients<P>(gradients + panel * operands.gradient_panel + int64_t(i) * n.chunks * kTile,
                                   operands.gradient_piece, walk, n.chunks);
            }
            for (int panel = 0; panel < in_panels; ++panel) {
                const auto* x = a.x + image * s.height * s.width * s.in_channels + (first_panel + panel) * kSide;
                for (int plane = 0; plane < n.planes * n.planes; ++plane) {
                    const Window window{band.first_row * s.stride - s.padding + plane / n.planes, n.rows,
                                        plane % n.planes - s.padding, n.columns};
                    const PixelWalk walk(x, s.height, s.width, s.in_channels, window, s.stride);
                    split_pairs<P>(pairs + panel * operands.pair_panel + plane * operands.pair_plane +
                                       int64_t(i) * n.pairs * kDepth,
                                   operands.pair_piece, parity_pitch, walk, n.pairs, n.parities > 1);
                }
            }
        }
        const Band next = band_after(a.bands, index, index + 1 < count, part_images, s.out_height);
        const int64_t next_image = first_image + next.first_image, next_rows = int64_t(next.images) * next.rows;
        const int64_t next_outputs = next_rows * s.out_width * s.out_channels;
        // With a slice of the channels, their lines do not follow one another.
        const int64_t next_inputs =
            in_panels * kSide < s.in_channels ? 0 : next_rows * s.stride * s.width * s.in_channels;
        const int64_t steps = int64_t(in_panels) * taps * panels / 4 * band.images * n.chunks, size = sizeof *a.x;
        Ahead x_ahead(a.x, (next_image * s.height + next.first_row * s.stride) * s.width * s.in_channels, kLineBytes,
                      next_inputs * size / kLineBytes, steps);
        Ahead dy_ahead(a.dy, (next_image * s.out_height + next.first_row) * s.out_width * s.out_channels, kLineBytes,
                       next_outputs * size / kLineBytes, steps);
        operands.x_ahead = &x_ahead, operands.dy_ahead = &dy_ahead;
        gradient_tiles<P>(operands, s, n, in_panels);
    }
}

struct SplitSumArgs {
    const float* partial;
    float* dw;
    ConvShape shape;
    int32_t parts;
    uint32_t accumulate;
};

/// dw[tap][c][o] = sum over parts, in order, of the partial sums, or added to the previous dw
__device__ void split_sum_parts(const SplitSumArgs& a) {
    const ConvShape& s = a.shape;
    const int taps = s.kernel * s.kernel, C = s.in_channels, O = s.out_channels, panels = O / kSide;
    const int64_t part_length = int64_t(taps) * C * O;
    for_each_index(uint64_t(C / kSide) * taps * panels, [&](uint64_t index) {
        const int panel = int(index % panels), tap = int(index / panels % taps), in = int(index / panels / taps);
        const float* from = a.partial + int64_t(index) * kSide * kSide;
        Floats sums[kSide];
        for (int o = 0; o < kSide; ++o) {
            sums[o] = load_floats(from + o * kSide);
            for (int part = 1; part < a.parts; ++part) sums[o] += load_floats(from + part * part_length + o * kSide);
        }
        transpose(sums);
        float* to = a.dw + (int64_t(tap) * C + in * kSide) * O + panel * kSide;
        for (int c = 0; c < kSide; ++c, to += O) {
            if (a.accumulate) sums[c] += load_floats(to);
            memcpy(to, &sums[c], sizeof sums[c]);
        }
    });
}

}  // namespace

POLDER_HOST_KERNEL(conv_split_weights_bf16, split_weights<Bf16>, SplitWeightsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_split_weights_bf16x3, split_weights<Bf16x3>, SplitWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_split_weights_bf16x6, split_weights<Bf16x6>, SplitWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_split_turned_weights_bf16, split_turned_weights<Bf16>, SplitWeightsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_split_turned_weights_bf16x3, split_turned_weights<Bf16x3>, SplitWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_split_turned_weights_bf16x6, split_turned_weights<Bf16x6>, SplitWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_split_forward_bf16, split_forward<Bf16>, SplitForwardArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_split_forward_bf16x3, split_forward<Bf16x3>, SplitForwardArgs<float>)
POLDER_HOST_KERNEL(conv_split_forward_bf16x6, split_forward<Bf16x6>, SplitForwardArgs<float>)
POLDER_HOST_KERNEL(conv_split_input_gradient_bf16, split_input_gradient<Bf16>, SplitInputGradientArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_split_input_gradient_bf16x3, split_input_gradient<Bf16x3>, SplitInputGradientArgs<float>)
POLDER_HOST_KERNEL(conv_split_input_gradient_bf16x6, split_input_gradient<Bf16x6>, SplitInputGradientArgs<float>)
POLDER_HOST_KERNEL(conv_split_weight_gradient_bf16, split_weight_gradient<Bf16>, SplitGradientArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_split_weight_gradient_bf16x3, split_weight_gradient<Bf16x3>, SplitGradientArgs<float>)
POLDER_HOST_KERNEL(conv_split_weight_gradient_bf16x6, split_weight_gradient<Bf16x6>, SplitGradientArgs<float>)
POLDER_HOST_KERNEL(conv_split_sum_parts, split_sum_parts, SplitSumArgs)
