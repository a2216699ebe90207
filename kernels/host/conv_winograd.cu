// Convolution of 3x3 with stride 1 on the CPU by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast
// algorithms for convolutional neural networks", CVPR 2016): four products a pixel and pair of channels instead of
// nine. Forward, input gradient and weight gradient, NHWC with HWIO weights.
//
// An output is cut into tiles of 2x2 pixels, which read 4x4 pixels of the input. With
//
//     B^T = 1  0 -1  0     G =  1    0    0     A^T = 1  1  1  0
//           0  1  1  0         1/2  1/2  1/2          0  1 -1 -1
//           0 -1  1  0         1/2 -1/2  1/2
//           0  1  0 -1          0    0    1
//
//     y = A^T [(G w G^T) . (B^T x B)] A       (. multiplies element by element, summed over the input's channels)
//
// each of the 16 elements is a product of matrices: tiles x in channels by in channels x out channels. The input
// gradient is the same for the gradient of the output and the turned weights. The weight gradient is the adjoint,
// dw = G^T [(B^T x B) . (A dy A^T)] G, summed over the tiles.
//
// There is one thread per block. A block transforms some tiles at a time into its scratch memory, which is about as
// large as the L2 cache at most. Channels are whole panels on both sides; other convolutions are those of
// conv_direct.cu. The order of a sum depends only on the shape.
//
// In a whole network the gradient is about as exact as by direct convolutions (docs/results.md). Numbers stored in 16
// bits (S) become floats (T) when they are transformed, and results are rounded once.
#include "../include/conv.cuh"
#include "winograd.cuh"

namespace {

/// From one tile's channels to the next in a transformed band.
template <class T>
__forceinline__ int tile_pitch(int channels) {
    return channels <= kDenseChannels ? channels : channels + kPanel<T>;
}

/// From one element's plane of a transformed band to the next. One more line keeps the planes apart in the cache.
template <class T>
__forceinline__ int plane_pitch(int tiles, int channels) {
    return tiles * tile_pitch<T>(channels) + kPanel<T>;
}

/// Transforms tiles, which begin `padding` pixels before their place in the output: to[element][tile][channel].
template <class S, class T>
__attribute__((noinline)) void transform_tiles(const Channels<S>& x, TileWalk at, int tiles, int padding, T* to) {
    using V = typename Vector<T>::type;
    const int plane = plane_pitch<T>(tiles, x.count), row_pitch = x.width * x.pitch;
    for (int tile = 0; tile < tiles; ++tile, at.next()) {
        const int row = at.row - padding, column = at.column - padding;
        const S* from = x.tensor + ((int64_t(at.image) * x.height + row) * x.width + column) * x.pitch;
        const bool whole = row >= 0 && row + 4 <= x.height && column >= 0 && column + 4 <= x.width;
        for (int c = 0; c < x.count; c += Vector<T>::lanes, from += Vector<T>::lanes) {
            V d[4][4];
            if (whole) {
                for (int i = 0; i < 4; ++i) {
                    for (int j = 0; j < 4; ++j) d[i][j] = load_channels<S, T>(from + i * row_pitch + j * x.pitch);
                }
            } else {
                for (int i = 0; i < 4; ++i) {
                    for (int j = 0; j < 4; ++j) {
                        const bool there = inside(row + i, x.height) && inside(column + j, x.width);
                        d[i][j] = there ? load_channels<S, T>(from + i * row_pitch + j * x.pitch) : V{};
                    }
                }
            }
            transform_input(d);
            T* out = to + tile * tile_pitch<T>(x.count) + c;
            for (int e = 0; e < kElements; ++e) store_vector(out + e * plane, d[e / 4][e % 4]);
        }
    }
}

// ---- Weights -------------------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct WinogradWeightsArgs {
    const S* weight;
    T* packed;
    ConvShape shape;
};

/// weight [3][3][in][out] to packed [element][panel of out][in][kPanel].
template <class S>
__device__ void winograd_weights(const WinogradWeightsArgs<S>& a) {
    typedef Arithmetic<S> T;
    constexpr int W = kPanel<T>;
    const int C = a.shape.in_channels, O = a.shape.out_channels;
    for_each_index(uint64_t(C) * (O / W), [&](uint64_t index) {
        const int c = int(index % C), panel = int(index / C);
        T w[9][W];
        for (int tap = 0; tap < 9; ++tap) copy_widened(w[tap], a.weight + (int64_t(tap) * C + c) * O + panel * W, W);
        transform_weights<T>(w, a.packed + (int64_t(panel) * C + c) * W, int64_t(C) * O);
    });
}

/// weight [3][3][in][out], turned by 180 degrees, to packed [element][panel of in][out][kPanel].
template <class S>
__device__ void winograd_turned_weights(const WinogradWeightsArgs<S>& a) {
    typedef Arithmetic<S> T;
    constexpr int W = kPanel<T>;
    const int C = a.shape.in_channels, O = a.shape.out_channels;
    // One index is a square of a panel each way.
    for_each_index(uint64_t(C / W) * (O / W), [&](uint64_t index) {
        const int first = int(index % (O / W)) * W, panel = int(index / (O / W));
        T squares[W][9][W];
        for (int tap = 0; tap < 9; ++tap) {
            for (int c = 0; c < W; ++c) {
                const S* from = a.weight + (int64_t(8 - tap) * C + panel * W + c) * O + first;
                for (int o = 0; o < W; ++o) squares[o][tap][c] = widen(from[o]);
            }
        }
        for (int o = 0; o < W; ++o) {
            transform_weights<T>(squares[o], a.packed + (int64_t(panel) * O + first + o) * W, int64_t(C) * O);
        }
    });
}

// ---- Forward and input gradient ------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct WinogradArgs {
    const S* x;
    const T* packed;
    S* y;
    ConvShape shape;  // for the input gradient that of the convolution which it is
    int32_t tiles;    // of a band
    uint32_t accumulate;
};

/// Multiplies ROWS tiles, whose rows are `pitch` apart, by one panel: sums over `depth` rows of weights for one
/// element, which are added to those of the rows before if `add` is set. PITCH is the pitch and the depth, or zero if
/// they are not known: then each row has a pointer.
template <int ROWS, int PITCH, class T>
__forceinline__ void multiply_tile(const T* x, int pitch, int depth, const T* __restrict__ b, T* __restrict__ to,
                                   int to_pitch, bool add) {
    using V = typename Vector<T>::type;
    constexpr int L = Vector<T>::lanes;
    V sum[ROWS][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v] = add ? load_vector(to + int64_t(i) * to_pitch + v * L) : V{};
    }
    if constexpr (PITCH > 0) {
        for (int k = 0; k < PITCH; ++k, ++x, b += kPanel<T>) {
            V panel[kVectors];
            for (int v = 0; v < kVectors; ++v) panel[v] = load_vector(b + v * L);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) {
                for (int v = 0; v < kVectors; ++v) sum[i][v] += x[i * PITCH] * panel[v];
            }
        }
    } else {
        const T* a[ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) a[i] = x + int64_t(i) * pitch + depth;
        // The pointers are at the end of their rows and the loop counts up to zero: a separate end would need one
        // register too many.
        for (int64_t k = -int64_t(depth); k < 0; ++k, b += kPanel<T>) {
            V panel[kVectors];
            for (int v = 0; v < kVectors; ++v) panel[v] = load_vector(b + v * L);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; ++i) {
                for (int v = 0; v < kVectors; ++v) sum[i][v] += a[i][k] * panel[v];
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i, to += to_pitch) {
        for (int v = 0; v < kVectors; ++v) store_vector(to + v * L, sum[i][v]);
    }
}

/// Some rows of one element's weights for one panel, times all tiles of a band.
template <int PITCH, class T>
__attribute__((noinline)) void multiply_element(const T* x, int pitch, int tiles, int depth, const T* b, T* to,
                                                int to_pitch, bool add) {
    int tile = 0;
    for (; tile + kTileRows <= tiles; tile += kTileRows) {
        multiply_tile<kTileRows, PITCH>(x, pitch, depth, b, to, to_pitch, add);
        x += int64_t(kTileRows) * pitch, to += int64_t(kTileRows) * to_pitch;
    }
    with_rows<kTileRows - 1>(tiles - tile, [&](auto rest) {
        multiply_tile<decltype(rest)::value, PITCH>(x, pitch, depth, b, to, to_pitch, add);
    });
}

/// Rows of weights that are multiplied with a band before the next ones. So much of one element of 48 tiles and of one
/// panel of weights fits in the L1 cache.
constexpr int kBlockDepth = 128;

/// products[element][tile][out channel] of a band, for some output channels. One element of the band stays in the cache
/// while it is multiplied by all their weights, which are read once.
template <class T>
__forceinline__ void multiply_band(const T* band, int tiles, const ConvShape& s, const OutputChannels& channels,
                                   const T* packed, T* products) {
    const int C = s.in_channels, pitch = tile_pitch<T>(C);
    for (int e = 0; e < kElements; ++e) {
        const T* x = band + int64_t(e) * plane_pitch<T>(tiles, C);
        T* to = products + int64_t(e) * plane_pitch<T>(tiles, channels.count);
        const T* weights = packed + (int64_t(e) * s.out_channels + channels.first) * C;
        for (int first = 0; first < C; first += kBlockDepth) {
            const int depth = C - first < kBlockDepth ? C - first : kBlockDepth;
            const T* panel = weights + int64_t(first) * kPanel<T>;
            for (int channel = 0; channel < channels.count; channel += kPanel<T>, panel += int64_t(C) * kPanel<T>) {
                if (C == 16) multiply_element<16>(x, C, tiles, C, panel, to + channel, channels.count, false);
                else
                    multiply_element<0>(x + first, pitch, tiles, depth, panel, to + channel, channels.count, first > 0);
            }
        }
    }
}

/// y[n, i, j, o] = sum over taps and c of x[n, i + tap row - padding, j + tap column - padding, c] * weight
template <class S>
__device__ void winograd(const WinogradArgs<S>& a) {
    typedef Arithmetic<S> T;
    const ConvShape& s = a.shape;
    const int C = s.in_channels, all = s.batch * tiles_of(s);
    const int first = int(blockIdx.x) * a.tiles, tiles = all - first < a.tiles ? all - first : a.tiles;
    const TileWalk at(s, first);
    const OutputChannels channels(s.out_channels, kPanel<T>);
    POLDER_DYNAMIC_SHARED(T, band);                                              // [element][tile][in channel]
    T* const products = band + int64_t(kElements) * plane_pitch<T>(a.tiles, C);  // [element][tile][out channel]
    transform_tiles<S, T>({a.x, s.height, s.width, C, C}, at, tiles, s.padding, band);
    multiply_band(band, tiles, s, channels, a.packed, products);
    const int plane = plane_pitch<T>(tiles, channels.count);
    finish_band<S, T>(products, at, tiles, plane, s, channels, a.y, a.accumulate != 0);
}

// ---- Weight gradient -----------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct WinogradGradientArgs {
    const S* x;
    const S* dy;
    T* partial;  // [part][slice of in][panel of out][element][in of the slice][kPanel]
    ConvShape shape;
    int32_t tiles, slice, parts;  // tiles of a band; input channels of a slice; parts of the batch
};

/// to[element][tile][kPanel] = A dy A^T, for one panel of output channels. Pixels outside the output are zero.
template <class S, class T>
__attribute__((noinline)) void transform_gradients(const S* dy, TileWalk at, int tiles, const ConvShape& s, int channel,
                                                   T* to) {
    using V = typename Vector<T>::type;
    constexpr int W = kPanel<T>, L = Vector<T>::lanes;
    const int plane = plane_pitch<T>(tiles, W);
    for (int tile = 0; tile < tiles; ++tile, at.next()) {
        const int64_t pixel = (int64_t(at.image) * s.out_height + at.row) * s.out_width + at.column;
        for (int v = 0; v < kVectors; ++v) {
            const S* from = dy + pixel * s.out_channels + channel + v * L;
            V rows[4][2];
            for (int j = 0; j < 2; ++j) {
                V d[2];
                for (int i = 0; i < 2; ++i) {
                    const bool there = at.row + i < s.out_height && at.column + j < s.out_width;
                    d[i] = there ? load_channels<S, T>(from + (int64_t(i) * s.out_width + j) * s.out_channels) : V{};
                }
                rows[0][j] = d[0], rows[1][j] = d[0] + d[1], rows[2][j] = d[0] - d[1], rows[3][j] = -d[1];
            }
            T* out = to + tile * W + v * L;
            for (int i = 0; i < 4; ++i, out += 4 * plane) {
                store_vector(out, rows[i][0]);
                store_vector(out + plane, rows[i][0] + rows[i][1]);
                store_vector(out + 2 * plane, rows[i][0] - rows[i][1]);
                store_vector(out + 3 * plane, -rows[i][1]);
            }
        }
    }
}

/// Multiplies ROWS channels by one panel, summed over tiles, and adds the result to the partial sums.
template <int ROWS, class T>
__forceinline__ void outer_product(const T* a, int pitch, const T* __restrict__ b, int tiles, T* partial, bool add) {
    using V = typename Vector<T>::type;
    constexpr int L = Vector<T>::lanes;
    V sum[ROWS][kVectors];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
        for (V& lanes : sum[i]) lanes = V{};
    }
    for (int tile = 0; tile < tiles; ++tile, a += pitch, b += kPanel<T>) {
        V panel[kVectors];
        for (int v = 0; v < kVectors; ++v) panel[v] = load_vector(b + v * L);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            for (int v = 0; v < kVectors; ++v) sum[i][v] += a[i] * panel[v];
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

/// partial[element][channel][kPanel] of a band of the input, `width` channels, and a panel of the output's gradient.
template <class T>
__attribute__((noinline)) void multiply_gradients(const T* band, const T* gradients, int tiles, int width, T* partial,
                                                  bool add) {
    constexpr int W = kPanel<T>;
    const int blocks = (width + kTileRows - 1) / kTileRows;
    for (int e = 0; e < kElements; ++e) {
        const T* a = band + int64_t(e) * plane_pitch<T>(tiles, width);
        const T* b = gradients + e * plane_pitch<T>(tiles, W);
        T* to = partial + int64_t(e) * width * W;
        for (int block = 0; block < blocks; ++block) {
            const int start = width * block / blocks, rows = width * (block + 1) / blocks - start;
            with_rows<kTileRows>(rows, [&](auto count) {
                outer_product<decltype(count)::value>(a + start, width, b, tiles, to + start * W, add);
            });
        }
    }
}

/// Sums over the images of one part, for one slice of the input channels.
template <class S>
__device__ void winograd_weight_gradient(const WinogradGradientArgs<S>& a) {
    typedef Arithmetic<S> T;
    constexpr int W = kPanel<T>;
    const ConvShape& s = a.shape;
    const int C = s.in_channels, O = s.out_channels;
    const int first_channel = int(blockIdx.x) * a.slice;
    const int width = C - first_channel < a.slice ? C - first_channel : a.slice;
    T* const partial = a.partial + (int64_t(blockIdx.y) * C + first_channel) * kElements * O;
    const int begin = int(int64_t(s.batch) * blockIdx.y / a.parts) * tiles_of(s);
    const int end = int(int64_t(s.batch) * (blockIdx.y + 1) / a.parts) * tiles_of(s);
    POLDER_DYNAMIC_SHARED(T, band);  // [element][tile][in channel of the slice]
    T* const gradients = band + int64_t(kElements) * plane_pitch<T>(a.tiles, a.slice);  // [element][tile][kPanel]
    for (int first = begin; first < end; first += a.tiles) {
        const int tiles = end - first < a.tiles ? end - first : a.tiles;
        const TileWalk at(s, first);
        transform_tiles<S, T>({a.x + first_channel, s.height, s.width, C, width}, at, tiles, s.padding, band);
        for (int channel = 0; channel < O; channel += W) {
            transform_gradients<S, T>(a.dy, at, tiles, s, channel, gradients);
            multiply_gradients(band, gradients, tiles, width, partial + int64_t(channel) * kElements * width,
                               first > begin);
        }
    }
}

template <class T>
struct WinogradSumArgs {
    const T* partial;
    T* dw;
    ConvShape shape;
    int32_t slice, parts;
    uint32_t accumulate;
};

/// dw = G^T u G, or added to the previous dw, where u is the sum over parts, in order, of the partial sums.
template <class T>
__device__ void winograd_sum_parts(const WinogradSumArgs<T>& a) {
    using V = typename Vector<T>::type;
    constexpr int W = kPanel<T>, L = Vector<T>::lanes;
    const int C = a.shape.in_channels, O = a.shape.out_channels;
    const int64_t part_pitch = int64_t(kElements) * C * O;
    const T half = T(0.5);
    // One index is a panel each way: W neighbouring input channels make runs of W panels in the partial sums.
    for_each_index(uint64_t(C / W) * (O / W), [&](uint64_t index) {
        const int first = int(index / (O / W)) * W, channel = int(index % (O / W)) * W;
        const int first_channel = first / a.slice * a.slice;
        const int width = C - first_channel < a.slice ? C - first_channel : a.slice;
        const T* from = a.partial + int64_t(first_channel) * kElements * O + int64_t(channel) * kElements * width +
                        int64_t(first - first_channel) * W;
        T u[kElements][W * W];
        for (int e = 0; e < kElements; ++e) {
            const T* part = from + int64_t(e) * width * W;
            for (int i = 0; i < W * W; i += L) {
                V sum = load_vector(part + i);
                for (int p = 1; p < a.parts; ++p) sum += load_vector(part + p * part_pitch + i);
                store_vector(u[e] + i, sum);
            }
        }
        for (int i = 0; i < W * W; i += L) {
            V rows[3][4];
            for (int j = 0; j < 4; ++j) {
                const V one = load_vector(u[4 + j] + i), two = load_vector(u[8 + j] + i);
                const V sum = half * (one + two);
                rows[0][j] = load_vector(u[j] + i) + sum;
                rows[1][j] = half * (one - two);
                rows[2][j] = sum + load_vector(u[12 + j] + i);
            }
            T* to = a.dw + int64_t(first + i / W) * O + channel + i % W;
            for (int tap_row = 0; tap_row < 3; ++tap_row) {
                const V* row = rows[tap_row];
                const V sum = half * (row[1] + row[2]);
                const V taps[3] = {row[0] + sum, half * (row[1] - row[2]), sum + row[3]};
                for (int tap = 0; tap < 3; ++tap, to += int64_t(C) * O) {
                    store_vector(to, a.accumulate ? load_vector(to) + taps[tap] : taps[tap]);
                }
            }
        }
    });
}

}  // namespace

POLDER_HOST_KERNEL(conv_winograd_weights_f32, winograd_weights<float>, WinogradWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_winograd_weights_f16, winograd_weights<__half>, WinogradWeightsArgs<__half>)
POLDER_HOST_KERNEL(conv_winograd_weights_bf16, winograd_weights<__nv_bfloat16>, WinogradWeightsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_winograd_weights_f64, winograd_weights<double>, WinogradWeightsArgs<double>)
POLDER_HOST_KERNEL(conv_winograd_turned_weights_f32, winograd_turned_weights<float>, WinogradWeightsArgs<float>)
POLDER_HOST_KERNEL(conv_winograd_turned_weights_f16, winograd_turned_weights<__half>, WinogradWeightsArgs<__half>)
POLDER_HOST_KERNEL(conv_winograd_turned_weights_bf16, winograd_turned_weights<__nv_bfloat16>,
                   WinogradWeightsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_winograd_turned_weights_f64, winograd_turned_weights<double>, WinogradWeightsArgs<double>)
POLDER_HOST_KERNEL(conv_winograd_f32, winograd<float>, WinogradArgs<float>)
POLDER_HOST_KERNEL(conv_winograd_f16, winograd<__half>, WinogradArgs<__half>)
POLDER_HOST_KERNEL(conv_winograd_bf16, winograd<__nv_bfloat16>, WinogradArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_winograd_f64, winograd<double>, WinogradArgs<double>)
POLDER_HOST_KERNEL(conv_winograd_weight_gradient_f32, winograd_weight_gradient<float>, WinogradGradientArgs<float>)
POLDER_HOST_KERNEL(conv_winograd_weight_gradient_f16, winograd_weight_gradient<__half>, WinogradGradientArgs<__half>)
POLDER_HOST_KERNEL(conv_winograd_weight_gradient_bf16, winograd_weight_gradient<__nv_bfloat16>,
                   WinogradGradientArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(conv_winograd_weight_gradient_f64, winograd_weight_gradient<double>, WinogradGradientArgs<double>)
POLDER_HOST_KERNEL(conv_winograd_sum_parts_f32, winograd_sum_parts<float>, WinogradSumArgs<float>)
POLDER_HOST_KERNEL(conv_winograd_sum_parts_f64, winograd_sum_parts<double>, WinogradSumArgs<double>)
