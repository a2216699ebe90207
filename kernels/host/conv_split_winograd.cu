// Convolution of 3x3 with stride 1 on the CPU by Winograd's minimal filtering (conv_winograd.cu) in bf16 pieces, for
// matrix units (split.cuh).
//
// Images, gradients and weights are transformed in f32, and the transformed numbers are split. So the only further
// error is that of the products. A left tile of the forward pass is 16 tiles of the image, one element of each, and its
// depth runs over channels. The weight gradient's depth runs over tiles of the image: its left tiles are the input with
// 32 tiles along a row, and its right tiles the output gradient in pairs of neighbouring tiles.
//
// There is one thread per block. Channels are multiples of 16 on both sides. The order of a sum depends only on the
// shape.
#include "split.cuh"
#include "winograd.cuh"

namespace {

// ---- Weights -------------------------------------------------------------------------------------------------------

struct SplitWinogradWeightsArgs {
    const float* weight;
    uint16_t* packed;
    ConvShape shape;
};

/// Packs transformed weights [element][channel][16], of up to 32 channels, as right tiles: to[element][right tile],
/// with `pitch` numbers between elements.
template <class P>
__forceinline__ void pack_elements(const float (&transformed)[kElements][kDepth][kSide], int channels, uint16_t* to,
                                   int64_t pitch) {
    for (int e = 0; e < kElements; ++e) {
        pack_channels<P>(to + e * pitch, channels, [&](int channel) { return load_floats(transformed[e][channel]); });
    }
}

/// weight [3][3][in][out] to packed [element][panel of out][right tile].
template <class P>
__device__ void split_winograd_weights(const SplitWinogradWeightsArgs& a) {
    const int C = a.shape.in_channels, O = a.shape.out_channels, tiles = row_tiles<P>(C),
              chunks = (C + kDepth - 1) / kDepth;
    const int64_t pitch = int64_t(O / kSide) * tiles * kTile;
    for_each_index(uint64_t(O / kSide) * chunks, [&](uint64_t index) {
        const int panel = int(index / chunks), first = int(index % chunks) * kDepth;
        const int channels = C - first < kDepth ? C - first : kDepth;
        float transformed[kElements][kDepth][kSide], w[9][kSide];
        for (int c = 0; c < channels; ++c) {
            for (int tap = 0; tap < 9; ++tap) {
                memcpy(w[tap], a.weight + (int64_t(tap) * C + first + c) * O + panel * kSide, sizeof w[tap]);
            }
            transform_weights<float>(w, transformed[0][c], kDepth * kSide);
        }
        pack_elements<P>(transformed, channels,
                         a.packed + (int64_t(panel) * tiles + first / kDepth * P::pieces) * kTile, pitch);
    });
}

/// weight [3][3][in][out], turned by 180 degrees, to packed [element][panel of in][right tile].
template <class P>
__device__ void split_winograd_turned_weights(const SplitWinogradWeightsArgs& a) {
    const int C = a.shape.in_channels, O = a.shape.out_channels, tiles = row_tiles<P>(O),
              chunks = (O + kDepth - 1) / kDepth;
    const int64_t pitch = int64_t(C / kSide) * tiles * kTile;
    for_each_index(uint64_t(C / kSide) * chunks, [&](uint64_t index) {
        const int panel = int(index / chunks), first = int(index % chunks) * kDepth;
        const int channels = O - first < kDepth ? O - first : kDepth;
        float transformed[kElements][kDepth][kSide], w[9][kSide];
        for (int square = 0; square < channels; square += kSide) {
            Floats turned[9][kSide];
            for (int tap = 0; tap < 9; ++tap) {
                const float* from = a.weight + (int64_t(8 - tap) * C + panel * kSide) * O + first + square;
                for (int c = 0; c < kSide; ++c) turned[tap][c] = load_floats(from + int64_t(c) * O);
                transpose(turned[tap]);
            }
            for (int o = 0; o < kSide; ++o) {
                for (int tap = 0; tap < 9; ++tap) memcpy(w[tap], &turned[tap][o], sizeof w[tap]);
                transform_weights<float>(w, transformed[0][square + o], kDepth * kSide);
            }
        }
        pack_elements<P>(transformed, channels,
                         a.packed + (int64_t(panel) * tiles + first / kDepth * P::pieces) * kTile, pitch);
    });
}

// ---- Forward and input gradient ------------------------------------------------------------------------------------

struct SplitWinogradArgs {
    const float* x;
    const uint16_t* packed;
    float* y;
    ConvShape shape;  // for the input gradient that of the convolution which it is
    int32_t tiles;    // of a band, a multiple of 16
    uint32_t accumulate;
};

/// Loads the 4x4 pixels of a tile, 16 channels of each.
__forceinline__ void load_pixels(Floats (&d)[4][4], const float* tensor, int height, int width, int pitch,
                                 const TileWalk& at, int padding) {
    const int row = at.row - padding, column = at.column - padding;
    const float* from = tensor + ((int64_t(at.image) * height + row) * width + column) * pitch;
    const bool whole = row >= 0 && row + 4 <= height && column >= 0 && column + 4 <= width;
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            const bool there = whole || (inside(row + i, height) && inside(column + j, width));
            d[i][j] = there ? load_floats(from + (int64_t(i) * width + j) * pitch) : Floats{};
        }
    }
}

/// From one tile's row of channels to the next in a transformed band.
template <class P>
__forceinline__ int tile_pitch(int channels) {
    return row_length<P>(channels) + (channels <= kDenseChannels ? 0 : kDepth);
}

/// Transforms and splits tiles: to[element][tile][row of channels], with `plane` numbers between elements.
template <class P>
__attribute__((noinline)) void split_transformed(const float* x, const ConvShape& s, TileWalk at, int tiles,
                                                 uint16_t* to, int64_t plane) {
    const int C = s.in_channels, length = tile_pitch<P>(C);
    for (int tile = 0; tile < tiles; ++tile, at.next(), to += length) {
        for (int channel = 0; channel < C; channel += kSide) {
            Floats d[4][4];
            load_pixels(d, x + channel, s.height, s.width, C, at, s.padding);
            transform_input(d);
            for (int e = 0; e < kElements; ++e) store_split<P>(to + e * plane, channel, C, d[e / 4][e % 4]);
        }
    }
}

/// M times 16 tiles by N panels, for one element.
template <class P, int M, int N>
__forceinline__ void element_tile(const MatrixUnit& unit, const uint16_t* band, const uint16_t* packed, float* to,
                                  int C, int O) {
    const int length = tile_pitch<P>(C);
    const uint16_t* left[M];
    const uint16_t* right[N];
    for (int m = 0; m < M; ++m) left[m] = band + int64_t(m) * kSide * length;
    for (int n = 0; n < N; ++n) right[n] = packed + int64_t(n) * row_tiles<P>(C) * kTile;
    TileSums<M, N> sums(unit, left, length, right);
    sums.clear();
    multiply_channels<P>(sums, 0, 0, C);
    for (int i = 0; i < M * N; ++i) sums.store_sum(i, to + int64_t(i / N) * kSide * O + i % N * kSide, O);
}

/// products[element][tile][out channel] of a band of `tiles` tiles, a multiple of 16, for some output channels.
template <class P>
__attribute__((noinline)) void multiply_split_band(const uint16_t* band, int64_t plane, int tiles, const ConvShape& s,
                                                   const OutputChannels& channels, const uint16_t* packed,
                                                   float* products, int products_plane) {
    const MatrixUnit unit(kSide);
    const int C = s.in_channels, O = channels.count, length = tile_pitch<P>(C), panels = O / kSide;
    const int64_t panel_length = int64_t(row_tiles<P>(C)) * kTile, element = s.out_channels / kSide * panel_length;
    packed += channels.first / kSide * panel_length;
    for (int e = 0; e < kElements; ++e, band += plane, packed += element, products += products_plane) {
        int panel = 0;
        for (; panel + 2 <= panels; panel += 2) {
            const uint16_t* right = packed + panel * panel_length;
            int tile = 0;
            for (; tile + 2 * kSide <= tiles; tile += 2 * kSide) {
                element_tile<P, 2, 2>(unit, band + int64_t(tile) * length, right, products + tile * O + panel * kSide,
                                      C, O);
            }
            if (tile < tiles) {
                element_tile<P, 1, 2>(unit, band + int64_t(tile) * length, right, products + tile * O + panel * kSide,
                                      C, O);
            }
        }
        if (panel == panels) continue;
        for (int tile = 0; tile < tiles; tile += kSide) {
            element_tile<P, 1, 1>(unit, band + int64_t(tile) * length, packed + panel * panel_length,
                                  products + tile * O + panel * kSide, C, O);
        }
    }
}

/// y[n, i, j, o] = sum over taps and c of x[n, i + tap row - padding, j + tap column - padding, c] * weight
template <class P>
__device__ void split_winograd(const SplitWinogradArgs& a) {
    const ConvShape& s = a.shape;
    const int all = s.batch * tiles_of(s), first = int(blockIdx.x) * a.tiles;
    const int tiles = all - first < a.tiles ? all - first : a.tiles, rounded = round_up(tiles, kSide);
    const TileWalk at(s, first);
    const OutputChannels channels(s.out_channels, kSide);
    // One more line keeps the planes apart in the cache.
    const int64_t plane = int64_t(a.tiles) * tile_pitch<P>(s.in_channels) + kDepth;
    const int products_plane = a.tiles * channels.count + kSide;
    POLDER_DYNAMIC_SHARED(uint16_t, band);                                       // [element][tile][row of channels]
    float* const products = reinterpret_cast<float*>(band + kElements * plane);  // [element][tile][out channel]
    split_transformed<P>(a.x, s, at, tiles, band, plane);
    // Rows of a tile that stand for no tile of the image give products that are not used.
    for (int e = 0; e < kElements; ++e) {
        const int length = tile_pitch<P>(s.in_channels);
        memset(band + e * plane + int64_t(tiles) * length, 0, size_t(rounded - tiles) * length * sizeof *band);
    }
    multiply_split_band<P>(band, plane, rounded, s, channels, a.packed, products, products_plane);
    finish_band<float, float>(products, at, tiles, products_plane, s, channels, a.y, a.accumulate != 0);
}

// ---- Weight gradient -----------------------------------------------------------------------------------------------

struct SplitWinogradGradientArgs {
    const float* x;
    const float* dy;
    float* partial;  // [part][slice of in][panel of out][element][in of the slice][kPanel]
    ConvShape shape;
    int32_t tiles, slice, parts;  // tiles of a band, a multiple of 32; input channels of a slice; parts of the batch
};

/// Where an operand's tiles of one panel are: [piece][element], with these pitches.
struct ElementPitch {
    int64_t piece, element;
};

/// Where the pixels of 16 channels of a tile are, and which of its rows and of the columns from its first one on are in
/// the image.
struct TilePixels {
    int64_t first;
    unsigned rows, columns;

    TilePixels() : first(0), rows(0), columns(0) {}
    __forceinline__ TilePixels(const ConvShape& s, const TileWalk& at) : TilePixels() {
        const int row = at.row - s.padding, column = at.column - s.padding;
        first = ((int64_t(at.image) * s.height + row) * s.width + column) * s.in_channels;
        for (int i = 0; i < 4; ++i) rows |= unsigned(inside(row + i, s.height)) << i;
        for (int j = 0; j < 6; ++j) columns |= unsigned(inside(column + j, s.width)) << j;
    }
};

/// Transforms and splits 16 channels of the input: to[piece][element][chunk][channel][32 tiles]. Tiles beyond the last
/// are zero. If PAIRED, tiles are neighbours in pairs, which share two of their columns.
///
/// Rows and columns are exchanged before the transformation: there are fewer pixels than pieces of elements.
template <class P, bool PAIRED>
__attribute__((noinline)) void split_inputs(const float* x, const ConvShape& s, TileWalk at, int tiles, int chunks,
                                            uint16_t* to, const ElementPitch& pitch) {
    constexpr int COLUMNS = PAIRED ? 6 : 8, SECOND = COLUMNS - 4;  // of both tiles of a pair; the second one's first
    const Floats zeros{};
    for (int chunk = 0; chunk < chunks; ++chunk, to += kTile) {
        TilePixels places[2][kSide];
        for (int tile = 0; tile < kDepth && chunk * kDepth + tile < tiles; ++tile, at.next()) {
            places[tile % 2][tile / 2] = TilePixels(s, at);
        }
        Floats pixels[4][COLUMNS][kSide];
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < COLUMNS; ++j) {
                const int half = PAIRED ? 0 : j / 4, column = PAIRED ? j : j % 4;
                const int64_t shift = (int64_t(i) * s.width + column) * s.in_channels;
                for (int k = 0; k < kSide; ++k) {
                    const TilePixels& tile = places[half][k];
                    const bool there = (tile.rows >> i & tile.columns >> column & 1u) != 0;
                    pixels[i][j][k] =
                        load_floats(there ? x + tile.first + shift : reinterpret_cast<const float*>(&zeros));
                }
                transpose(pixels[i][j]);
            }
        }
        for (int channel = 0; channel < kSide; ++channel) {
            Floats both[4][COLUMNS], d[2][4][4];
            for (int i = 0; i < 4; ++i) {
                for (int j = 0; j < COLUMNS; ++j) both[i][j] = pixels[i][j][channel];
            }
            transform_columns(both);
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < 4; ++i) {
                    for (int j = 0; j < 4; ++j) d[half][i][j] = both[i][half * SECOND + j];
                }
                transform_rows(d[half]);
            }
            for (int e = 0; e < kElements; ++e) {
                const SplitPair<P> split(d[0][e / 4][e % 4], d[1][e / 4][e % 4]);
                for (int p = 0; p < P::pieces; ++p) {
                    memcpy(to + p * pitch.piece + e * pitch.element + channel * kDepth, &split.piece[p], sizeof(Words));
                }
            }
        }
    }
}

/// A dy A^T of one tile, 16 channels. Pixels outside the output are zero.
__forceinline__ void transform_gradient(Floats (&d)[4][4], const float* dy, const ConvShape& s, const TileWalk& at) {
    const float* from = dy + ((int64_t(at.image) * s.out_height + at.row) * s.out_width + at.column) * s.out_channels;
    Floats rows[4][2];
    for (int j = 0; j < 2; ++j) {
        Floats pixel[2];
        for (int i = 0; i < 2; ++i) {
            const bool there = at.row + i < s.out_height && at.column + j < s.out_width;
            pixel[i] = there ? load_floats(from + (int64_t(i) * s.out_width + j) * s.out_channels) : Floats{};
        }
        rows[0][j] = pixel[0], rows[1][j] = pixel[0] + pixel[1], rows[2][j] = pixel[0] - pixel[1],
        rows[3][j] = -pixel[1];
    }
    for (int i = 0; i < 4; ++i) {
        d[i][0] = rows[i][0], d[i][1] = rows[i][0] + rows[i][1], d[i][2] = rows[i][0] - rows[i][1],
        d[i][3] = -rows[i][1];
    }
}

/// Transforms and splits 16 channels of the output gradient: to[piece][element][pair of tiles][channel][2].
template <class P>
__attribute__((noinline)) void split_output_gradients(const float* dy, const ConvShape& s, TileWalk at, int tiles,
                                                      int chunks, uint16_t* to, const ElementPitch& pitch) {
    for (int pair = 0; pair < chunks * kSide; ++pair, to += kDepth) {
        Floats d[2][4][4];
        for (int half = 0; half < 2; ++half) {
            if (2 * pair + half >= tiles) {
                memset(d[half], 0, sizeof d[half]);
                continue;
            }
            transform_gradient(d[half], dy, s, at);
            at.next();
        }
        for (int e = 0; e < kElements; ++e) {
            const SplitPair<P> split(d[0][e / 4][e % 4], d[1][e / 4][e % 4]);
            for (int p = 0; p < P::pieces; ++p) {
                memcpy(to + p * pitch.piece + e * pitch.element, &split.piece[p], sizeof(Words));
            }
        }
    }
}

/// M panels of the input times N panels of the output, for one element.
template <class P, int M, int N>
__forceinline__ void gradient_element(const MatrixUnit& unit, const uint16_t* left_first, int64_t left_panel,
                                      const ElementPitch& left_pitch, const uint16_t* right_first, int64_t right_panel,
                                      const ElementPitch& right_pitch, int chunks, float* to, int64_t to_panel,
                                      bool add) {
    const uint16_t* left[M];
    const uint16_t* right[N];
    for (int m = 0; m < M; ++m) left[m] = left_first + m * left_panel;
    for (int n = 0; n < N; ++n) right[n] = right_first + n * right_panel;
    const auto sum = [&](int i) { return to + i % N * to_panel + int64_t(i / N) * kSide * kSide; };
    TileSums<M, N> sums(unit, left, kDepth, right);
    sums.clear();
    for (int i = 0; add && i < M * N; ++i) sums.load_sum(i, sum(i), kSide);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        multiply_pieces<P>(sums, int64_t(chunk) * kTile, left_pitch.piece, int64_t(chunk) * kTile, right_pitch.piece);
    }
    for (int i = 0; i < M * N; ++i) sums.store_sum(i, sum(i), kSide);
}

/// Sums over the images of one part, for one slice of the input channels.
template <class P>
__device__ void split_winograd_weight_gradient(const SplitWinogradGradientArgs& a) {
    const ConvShape& s = a.shape;
    const int C = s.in_channels, O = s.out_channels, first_channel = int(blockIdx.x) * a.slice;
    const int width = C - first_channel < a.slice ? C - first_channel : a.slice, in_panels = width / kSide;
    float* const partial = a.partial + (int64_t(blockIdx.y) * C + first_channel) * kElements * O;
    const int begin = int(int64_t(s.batch) * blockIdx.y / a.parts) * tiles_of(s);
    const int end = int(int64_t(s.batch) * (blockIdx.y + 1) / a.parts) * tiles_of(s);
    // [panel][piece][element][chunk] tiles
    const int64_t element = int64_t(a.tiles / kDepth) * kTile + kDepth;
    const ElementPitch pitch{kElements * element, element};
    const int64_t panel_pitch = P::pieces * pitch.piece, element_sums = int64_t(width) * kSide;
    POLDER_DYNAMIC_SHARED(uint16_t, inputs);
    uint16_t* const gradients = inputs + a.slice / kSide * panel_pitch;  // of two panels
    for (int first = begin; first < end; first += a.tiles) {
        const int tiles = end - first < a.tiles ? end - first : a.tiles, chunks = (tiles + kDepth - 1) / kDepth;
        const TileWalk at(s, first);
        for (int panel = 0; panel < in_panels; ++panel) {
            const float* x = a.x + first_channel + panel * kSide;
            uint16_t* const to = inputs + panel * panel_pitch;
            if (at.columns % 2 == 0) split_inputs<P, true>(x, s, at, tiles, chunks, to, pitch);
            else split_inputs<P, false>(x, s, at, tiles, chunks, to, pitch);
        }
        for (int out = 0; out < O / kSide; out += 2) {
            const int panels = O / kSide - out < 2 ? 1 : 2;
            for (int panel = 0; panel < panels; ++panel) {
                split_output_gradients<P>(a.dy + (out + panel) * kSide, s, at, tiles, chunks,
                                          gradients + panel * panel_pitch, pitch);
            }
            const MatrixUnit unit(kSide);
            for (int e = 0; e < kElements; ++e) {
                float* const to = partial + int64_t(out) * kElements * element_sums + e * element_sums;
                const auto multiply = [&](auto m, auto n, int panel) {
                    gradient_element<P, decltype(m)::value, decltype(n)::value>(
                        unit, inputs + panel * panel_pitch + e * element, panel_pitch, pitch, gradients + e * element,
                        panel_pitch, pitch, chunks, to + int64_t(panel) * kSide * kSide, kElements * element_sums,
                        first > begin);
                };
                for (int panel = 0; panel < in_panels; panel += 2) {
                    const bool two = panel + 2 <= in_panels;
                    if (two && panels == 2) multiply(RowCount<2>{}, RowCount<2>{}, panel);
                    else if (two) multiply(RowCount<2>{}, RowCount<1>{}, panel);
                    else if (panels == 2) multiply(RowCount<1>{}, RowCount<2>{}, panel);
                    else multiply(RowCount<1>{}, RowCount<1>{}, panel);
                }
            }
        }
    }
}

}  // namespace

POLDER_HOST_KERNEL(conv_split_winograd_weights_bf16x3, split_winograd_weights<Bf16x3>, SplitWinogradWeightsArgs)
POLDER_HOST_KERNEL(conv_split_winograd_weights_bf16x6, split_winograd_weights<Bf16x6>, SplitWinogradWeightsArgs)
POLDER_HOST_KERNEL(conv_split_winograd_turned_weights_bf16x3, split_winograd_turned_weights<Bf16x3>,
                   SplitWinogradWeightsArgs)
POLDER_HOST_KERNEL(conv_split_winograd_turned_weights_bf16x6, split_winograd_turned_weights<Bf16x6>,
                   SplitWinogradWeightsArgs)
POLDER_HOST_KERNEL(conv_split_winograd_bf16x3, split_winograd<Bf16x3>, SplitWinogradArgs)
POLDER_HOST_KERNEL(conv_split_winograd_bf16x6, split_winograd<Bf16x6>, SplitWinogradArgs)
POLDER_HOST_KERNEL(conv_split_winograd_weight_gradient_bf16x3, split_winograd_weight_gradient<Bf16x3>,
                   SplitWinogradGradientArgs)
POLDER_HOST_KERNEL(conv_split_winograd_weight_gradient_bf16x6, split_winograd_weight_gradient<Bf16x6>,
                   SplitWinogradGradientArgs)
