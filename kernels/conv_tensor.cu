// Convolution on tensor cores, NHWC with HWIO weights, for operands of 16 bits, as the matrix products of conv.cu:
//
//   forward:          rows = output pixels,            columns = out channels, depth = taps x in channels
//   input gradient:   rows = input pixels of a class,  columns = in channels,  depth = the class's taps x out channels
//   weight gradient:  rows = taps x in channels,       columns = out channels, depth = output pixels
//
// As there, blockIdx.z is the parity class of the input gradient or the split of the weight gradient's depth. Products are
// summed in f32; y and dx are rounded once, at the end, and the weight gradient stays in f32.
//
// From memory to the tensor cores, an operand takes three steps.
//
// 1. Global to shared memory. The unit is a chunk of 16 bytes: neighbours in memory, so neighbouring channels. Where channels
//    come in whole chunks, cp.async copies them past the registers, zeros for what lies outside the image or the product;
//    otherwise threads gather a chunk element by element. A block works on one stage of its operands while the next ones are
//    under way.
// 2. Shared memory holds an operand in lines of chunks. A line is 64 bytes of the depth of one row (or column) of the product
//    where memory runs along the depth, and all rows (or columns) at one depth where memory runs across it. The place of a
//    chunk in its line is XORed with bits of the line's number, so that the eight rows of a matrix that ldmatrix reads, one
//    chunk in each of eight lines, lie in different banks.
// 3. Shared memory to registers. ldmatrix yields the fragments as mma takes them, transposed where memory runs across the
//    depth.
//
// A warp computes a part of the tile as large as its registers allow, since each fragment is used once for every fragment of
// the other operand: at 64 x 64, shared memory keeps up with the tensor cores.
#include "include/conv.cuh"
#include "include/elementwise.cuh"
#include "include/mma.cuh"

namespace {

/// A block's tile, ROWS x COLUMNS, of which each warp computes WARP_ROWS x WARP_COLUMNS, with operands in STAGES stages.
template <int ROWS_, int COLUMNS_, int WARP_ROWS_, int WARP_COLUMNS_, int STAGES_>
struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_;
    static constexpr int STAGES = STAGES_;
    static constexpr int WARPS_ACROSS = COLUMNS / WARP_COLUMNS, THREADS = ROWS / WARP_ROWS * WARPS_ACROSS * 32;
    static_assert(WARP_ROWS % 16 == 0 && WARP_COLUMNS % 16 == 0, "whole fragments");
    /// Bytes of the depth in a stage, and with them the bytes of the operands' parts.
    static constexpr int DEPTH_BYTES = 64, LEFT_BYTES = ROWS * DEPTH_BYTES, RIGHT_BYTES = COLUMNS * DEPTH_BYTES;

    /// A warp's sums, in fragments of 16 x 8.
    using Sums = float[WARP_ROWS / 16][WARP_COLUMNS / 8][4];

    __device__ __forceinline__ static int warp_row() { return int(threadIdx.x) / 32 / WARPS_ACROSS * WARP_ROWS; }
    __device__ __forceinline__ static int warp_column() { return int(threadIdx.x) / 32 % WARPS_ACROSS * WARP_COLUMNS; }
};

// ---- Operands in shared memory ---------------------------------------------------------------------------------------

/// A warp's fragments of 16 rows (or columns) of an operand: [upper 8][upper half of an mma's depth].
struct Fragments {
    uint32_t r[2][2];
};

/// An operand's part in shared memory, EXTENT rows (or columns) of the product, and how a block's threads fill it. A thread's
/// chunks all lie at the same place of their lines, so most of what it takes to find them is computed once.
template <class T, int EXTENT, int THREADS, bool ALONG_DEPTH>
struct Operand {
    static constexpr int CHUNK = Tensor<T>::CHUNK, DEPTH = 64 / int(sizeof(T));
    static constexpr int LINES = ALONG_DEPTH ? EXTENT : DEPTH, CHUNKS = (ALONG_DEPTH ? DEPTH : EXTENT) / CHUNK;
    static constexpr int STEP = THREADS / CHUNKS, COUNT = LINES < STEP ? 1 : LINES / STEP;
    static_assert(THREADS % CHUNKS == 0 && (LINES < STEP || LINES % STEP == 0), "threads copy equally many chunks");

    __device__ __forceinline__ static int line(int i) { return int(threadIdx.x) / CHUNKS + i * STEP; }
    __device__ __forceinline__ static int first_in_line() { return int(threadIdx.x) % CHUNKS * CHUNK; }
    /// The row (or column) and the depth at which the thread's chunk i begins.
    __device__ __forceinline__ static int at(int i) { return ALONG_DEPTH ? line(i) : first_in_line(); }
    __device__ __forceinline__ static int depth_at(int i) { return ALONG_DEPTH ? first_in_line() : line(i); }

    /// Bytes from the part's beginning to a chunk.
    __device__ __forceinline__ static int place(int line, int chunk) {
        // Eight chunks fill all banks once. Lines shorter than that share them, so fewer of their numbers' bits are needed.
        constexpr int SWIZZLED = CHUNKS < 8 ? CHUNKS : 8;
        return (line * CHUNKS + (chunk ^ (line / (8 / SWIZZLED) % SWIZZLED))) * 16;
    }

    /// Starts to fill the part with what the source has from `depth` on.
    template <class Source>
    __device__ __forceinline__ static void fill(unsigned char* part, const Source& source, int first, int depth,
                                                AsyncCopies& copies) {
        if (LINES < STEP && line(0) >= LINES) return;
        if (source.wide) {
            POLDER_UNROLL
            for (int i = 0; i < COUNT; ++i) {
                const Found found = source.find(i, first + at(i), depth + depth_at(i));
                copies.copy<Source::READ_AGAIN>(part + place(line(i), first_in_line() / CHUNK),
                                                source.tensor + (found.there ? found.offset : 0), found.there);
            }
        } else {
            POLDER_UNROLL
            for (int i = 0; i < COUNT; ++i) {
                const Pack<T, CHUNK> pack = source.pack(i, first + at(i), depth + depth_at(i));
                store<CHUNK>(reinterpret_cast<T*>(part + place(line(i), first_in_line() / CHUNK)), 0, pack);
            }
        }
    }

    /// The fragments of the 16 rows (or columns) from `first` on at step `step` of a stage's two.
    __device__ __forceinline__ static Fragments fragments(const unsigned char* part, int first, int step) {
        // ldmatrix reads four matrices: first down the lines, then along them.
        const int lane = int(threadIdx.x) % 32, line = lane % 16, chunk = lane / 16;
        uint32_t m[4];
        if constexpr (ALONG_DEPTH) {
            ldmatrix<false>(part + place(first + line, step * 2 + chunk), m);
            return {{{m[0], m[2]}, {m[1], m[3]}}};
        } else {
            ldmatrix<true>(part + place(step * Tensor<T>::DEPTH + line, first / CHUNK + chunk), m);
            return {{{m[0], m[1]}, {m[2], m[3]}}};
        }
    }
};

// ---- Operands in global memory: where the source's chunk i of a thread lies, and the same element by element -----------

/// Windows as rows of the product, along the depth. Those of neighbouring pixels and taps overlap.
template <class Rows, class T>
struct WindowRows {
    static constexpr bool READ_AGAIN = true;
    const T* tensor;
    bool wide;
    const Windows<T> windows;
    Place places[Rows::COUNT];

    __device__ __forceinline__ explicit WindowRows(const Windows<T>& windows)
        : tensor(windows.tensor), wide(windows.wide), windows(windows) {}

    __device__ __forceinline__ Found find(int i, int, int depth) const {
        const int tap = windows.by_channels.quotient(depth);
        const Found found = windows.find(places[i], tap, depth - tap * windows.channels);
        return {found.there && depth < windows.depth, found.offset};
    }
    __device__ __forceinline__ Pack<T, Rows::CHUNK> pack(int i, int, int depth) const {
        return windows.template pack<Rows::CHUNK>(places[i], depth);
    }
};

/// Windows as columns of the depth: the weight gradient's rows run over taps and channels, its depth over pixels up to `end`.
template <class Rows, class T>
struct WindowColumns {
    static constexpr bool READ_AGAIN = true;
    const T* tensor;
    bool wide;
    const Windows<T> windows;
    const Raster raster;
    int stride, padding, end;

    __device__ __forceinline__ WindowColumns(const Windows<T>& windows, const ConvShape& s, int end)
        : tensor(windows.tensor), wide(windows.wide), windows(windows), raster(s.out_height, s.out_width), stride(s.stride),
          padding(s.padding), end(end) {}

    __device__ __forceinline__ Place place(int number) const {
        if (number >= end) return windows.nowhere();
        const Pixel pixel = raster.pixel(number);
        return windows.place(pixel.image, pixel.row * stride - padding, pixel.column * stride - padding);
    }
    __device__ __forceinline__ Found find(int, int row, int number) const {
        const int tap = windows.by_channels.quotient(row);
        const Found found = windows.find(place(number), tap, row - tap * windows.channels);
        return {found.there && row < windows.depth, found.offset};
    }
    __device__ __forceinline__ Pack<T, Rows::CHUNK> pack(int, int row, int number) const {
        return windows.template pack<Rows::CHUNK>(place(number), row);
    }
};

/// A matrix [depth][columns]: the weights of the forward, and the output gradient, whose depth are the pixels up to `end`.
template <class Columns, class T>
struct Matrix {
    static constexpr bool READ_AGAIN = false;
    const T* tensor;
    bool wide;
    int columns, end;

    __device__ __forceinline__ Found find(int, int column, int depth) const {
        return {column < columns && depth < end, int64_t(depth) * columns + column};
    }
    __device__ __forceinline__ Pack<T, Columns::CHUNK> pack(int, int column, int depth) const {
        if (depth >= end) return {};
        return row_pack<Columns::CHUNK>(tensor + int64_t(depth) * columns, column, columns, wide);
    }
};

/// The weights as the input gradient meets them.
template <class Columns, class T>
struct ClassMatrix {
    static constexpr bool READ_AGAIN = false;
    const T* tensor;
    bool wide;
    const ClassWeights<T> weights;

    __device__ __forceinline__ explicit ClassMatrix(const ClassWeights<T>& weights)
        : tensor(weights.tensor), wide(weights.wide), weights(weights) {}

    __device__ __forceinline__ Found find(int, int channel, int depth) const {
        const int tap = weights.by_out_channels.quotient(depth);
        return {channel < weights.channels && depth < weights.depth,
                weights.offset(tap, channel, depth - tap * weights.out_channels)};
    }
    __device__ __forceinline__ Pack<T, Columns::CHUNK> pack(int, int channel, int depth) const {
        return weights.template pack<Columns::CHUNK>(channel, depth);
    }
};

// ---- The product -------------------------------------------------------------------------------------------------------

/// Adds to the warp's sums its part of the block's tile of left * right over the depth [begin, end).
template <class Tile, class T, class Rows, class Columns, class Left, class Right>
__device__ __forceinline__ void multiply(const Left& left, const Right& right, const Corner<Tile>& corner, int begin, int end,
                                         typename Tile::Sums& sum) {
    constexpr int STAGES = Tile::STAGES, STAGE_BYTES = Tile::LEFT_BYTES + Tile::RIGHT_BYTES;
    POLDER_DYNAMIC_SHARED(unsigned char, shared);
    AsyncCopies copies;
    int filled = 0;  // the stage to fill next
    const auto fill = [&](int depth) {
        if (depth < end) {
            unsigned char* stage = shared + filled * STAGE_BYTES;
            Rows::fill(stage, left, corner.row, depth, copies);
            Columns::fill(stage + Tile::LEFT_BYTES, right, corner.column, depth, copies);
        }
        // Empty groups keep the count right at the end.
        copies.commit();
        filled = filled + 1 == STAGES ? 0 : filled + 1;
    };
    for (int stage = 0; stage < STAGES - 1; ++stage) fill(begin + stage * Rows::DEPTH);
    int read = 0;
    for (int depth = begin; depth < end; depth += Rows::DEPTH) {
        copies.template wait<STAGES - 2>();
        // Now everyone's part of this stage is there, and everyone has done with the one before, which is filled again.
        __syncthreads();
        fill(depth + (STAGES - 1) * Rows::DEPTH);
        const unsigned char* rows = shared + read * STAGE_BYTES;
        const unsigned char* columns = rows + Tile::LEFT_BYTES;
        read = read + 1 == STAGES ? 0 : read + 1;
        POLDER_UNROLL
        for (int step = 0; step < 2; ++step) {
            Fragments a[Tile::WARP_ROWS / 16], b[Tile::WARP_COLUMNS / 16];
            POLDER_UNROLL
            for (int i = 0; i < Tile::WARP_ROWS / 16; ++i) a[i] = Rows::fragments(rows, Tile::warp_row() + i * 16, step);
            POLDER_UNROLL
            for (int j = 0; j < Tile::WARP_COLUMNS / 16; ++j) {
                b[j] = Columns::fragments(columns, Tile::warp_column() + j * 16, step);
            }
            POLDER_UNROLL
            for (int i = 0; i < Tile::WARP_ROWS / 16; ++i) {
                const uint32_t rows16[4] = {a[i].r[0][0], a[i].r[1][0], a[i].r[0][1], a[i].r[1][1]};
                POLDER_UNROLL
                for (int j = 0; j < Tile::WARP_COLUMNS / 8; ++j) mma<T>(sum[i][j], rows16, b[j / 2].r[j % 2]);
            }
        }
    }
}

/// Writes the warp's sums, or adds them: `row_at(row)` is where the tile's row lies, null past the end of the product. `pairs`:
/// whether neighbouring columns can be written as one.
template <class Tile, class D, class RowAt>
__device__ __forceinline__ void write(const typename Tile::Sums& sum, int first_column, int columns, bool add, bool pairs,
                                      RowAt row_at) {
    const int lane = int(threadIdx.x) % 32;
    first_column += Tile::warp_column() + lane % 4 * 2;
    POLDER_UNROLL
    for (int i = 0; i < Tile::WARP_ROWS / 8; ++i) {
        D* to = row_at(Tile::warp_row() + i * 8 + lane / 4);
        if (to == nullptr) continue;
        POLDER_UNROLL
        for (int j = 0; j < Tile::WARP_COLUMNS / 8; ++j) {
            const int column = first_column + j * 8;
            if (column >= columns) continue;
            const float* both = &sum[i / 2][j][i % 2 * 2];
            if (pairs) {
                Pack<D, 2> pack{};
                if (add) pack = load<2>(to, column);
                POLDER_UNROLL
                for (int e = 0; e < 2; ++e) pack.v[e] = convert_to<D>(add ? widen(pack.v[e]) + both[e] : both[e]);
                store<2>(to, column, pack);
                continue;
            }
            POLDER_UNROLL
            for (int e = 0; e < 2; ++e) {
                if (column + e >= columns) continue;
                to[column + e] = convert_to<D>(add ? widen(to[column + e]) + both[e] : both[e]);
            }
        }
    }
}

// ---- The three passes --------------------------------------------------------------------------------------------------

/// y[n, i, j, o] = sum over taps and c of x[n, i * stride + tap row - padding, j * stride + tap column - padding, c] * weight
template <class Tile, class T>
__device__ __forceinline__ void forward(const ConvArgs<T>& a) {
    using Rows = Operand<T, Tile::ROWS, Tile::THREADS, true>;
    using Columns = Operand<T, Tile::COLUMNS, Tile::THREADS, false>;
    const ConvShape& s = a.shape;
    const int pixels = s.batch * s.out_height * s.out_width;
    const Raster raster(s.out_height, s.out_width);
    const Corner<Tile> corner(s.out_channels);
    WindowRows<Rows, T> left(
        Windows<T>(a.left, s.height, s.width, s.in_channels, s.kernel, s.kernel, a.wide_left != 0));
    POLDER_UNROLL
    for (int i = 0; i < Rows::COUNT; ++i) {
        const int number = corner.row + Rows::at(i);
        const Pixel pixel = raster.pixel(number);
        left.places[i] = number < pixels ? left.windows.place(pixel.image, pixel.row * s.stride - s.padding,
                                                              pixel.column * s.stride - s.padding)
                                         : left.windows.nowhere();
    }
    const int depth = left.windows.depth;
    const Matrix<Columns, T> right{a.right, a.wide_right != 0, s.out_channels, depth};
    typename Tile::Sums sum = {};
    multiply<Tile, T, Rows, Columns>(left, right, corner, 0, depth, sum);
    write<Tile, T>(sum, corner.column, s.out_channels, a.accumulate != 0, a.wide_out != 0, [&](int row) {
        return corner.row + row < pixels ? a.out + int64_t(corner.row + row) * s.out_channels : nullptr;
    });
}

/// dx[n, i, j, c] = sum over o and the taps through which y sees x[n, i, j, c] of dy * weight
template <class Tile, class T>
__device__ __forceinline__ void input_gradient(const ConvArgs<T>& a) {
    using Rows = Operand<T, Tile::ROWS, Tile::THREADS, true>;
    using Columns = Operand<T, Tile::COLUMNS, Tile::THREADS, true>;
    const ConvShape& s = a.shape;
    const int row_remainder = int(blockIdx.z) / s.stride, column_remainder = int(blockIdx.z) % s.stride;
    const ParityClass rows(s, row_remainder, s.height), columns(s, column_remainder, s.width);
    const int pixels = s.batch * rows.extent * columns.extent;
    const Corner<Tile> corner(s.in_channels);
    if (corner.row >= pixels) return;
    const Raster raster(rows.extent, columns.extent);
    WindowRows<Rows, T> left(
        Windows<T>(a.left, s.out_height, s.out_width, s.out_channels, rows.taps, columns.taps, a.wide_left != 0));
    POLDER_UNROLL
    for (int i = 0; i < Rows::COUNT; ++i) {
        const int number = corner.row + Rows::at(i);
        const Pixel pixel = raster.pixel(number);
        left.places[i] = number < pixels
                             ? left.windows.place(pixel.image, pixel.row + rows.first, pixel.column + columns.first)
                             : left.windows.nowhere();
    }
    const ClassMatrix<Columns, T> right(ClassWeights<T>(a.right, s, rows, columns, a.wide_right != 0));
    typename Tile::Sums sum = {};
    multiply<Tile, T, Rows, Columns>(left, right, corner, 0, left.windows.depth, sum);
    write<Tile, T>(sum, corner.column, s.in_channels, a.accumulate != 0, a.wide_out != 0, [&](int row) -> T* {
        const int number = corner.row + row;
        if (number >= pixels) return nullptr;
        const Pixel pixel = raster.pixel(number);
        const int image_row = pixel.row * s.stride + row_remainder, image_column = pixel.column * s.stride + column_remainder;
        return a.out + (int64_t(pixel.image * s.height + image_row) * s.width + image_column) * s.in_channels;
    });
}

/// The result and its partial sums are f32, whatever the operands.
template <class T>
using WeightGradientArgs = ConvArgs<T, float>;

/// out[split][tap][c][o] = sum over the split's pixels of x[pixel seen through the tap, c] * dy[pixel, o]
template <class Tile, class T>
__device__ __forceinline__ void weight_gradient(const WeightGradientArgs<T>& a) {
    using Rows = Operand<T, Tile::ROWS, Tile::THREADS, false>;
    using Columns = Operand<T, Tile::COLUMNS, Tile::THREADS, false>;
    const ConvShape& s = a.shape;
    const int pixels = s.batch * s.out_height * s.out_width;
    const int begin = int(int64_t(pixels) * blockIdx.z / a.splits), end = int(int64_t(pixels) * (blockIdx.z + 1) / a.splits);
    const Corner<Tile> corner(s.out_channels);
    const WindowColumns<Rows, T> left(
        Windows<T>(a.left, s.height, s.width, s.in_channels, s.kernel, s.kernel, a.wide_left != 0), s, end);
    const Matrix<Columns, T> right{a.right, a.wide_right != 0, s.out_channels, end};
    typename Tile::Sums sum = {};
    multiply<Tile, T, Rows, Columns>(left, right, corner, begin, end, sum);
    const int rows = left.windows.depth;
    float* out = a.out + int64_t(blockIdx.z) * rows * s.out_channels;
    write<Tile, float>(sum, corner.column, s.out_channels, a.accumulate != 0, a.wide_out != 0, [&](int row) {
        return corner.row + row < rows ? out + int64_t(corner.row + row) * s.out_channels : nullptr;
    });
}

// The tiles by their columns; src/kernels/conv/tensor.rs chooses among them by the same numbers.
using Tile16 = Tile<256, 16, 32, 16, 4>;
using Tile32 = Tile<128, 32, 32, 32, 4>;
using Tile64 = Tile<128, 64, 64, 32, 4>;
using Tile128 = Tile<128, 128, 64, 64, 3>;

}  // namespace

POLDER_KERNEL(conv_tensor_forward_16_f16, (forward<Tile16, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_32_f16, (forward<Tile32, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_64_f16, (forward<Tile64, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_128_f16, (forward<Tile128, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_16_f16, (input_gradient<Tile16, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_32_f16, (input_gradient<Tile32, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_64_f16, (input_gradient<Tile64, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_128_f16, (input_gradient<Tile128, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_weight_gradient_16_f16, (weight_gradient<Tile16, __half>), WeightGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_weight_gradient_32_f16, (weight_gradient<Tile32, __half>), WeightGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_weight_gradient_64_f16, (weight_gradient<Tile64, __half>), WeightGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_weight_gradient_128_f16, (weight_gradient<Tile128, __half>), WeightGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_16_bf16, (forward<Tile16, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_32_bf16, (forward<Tile32, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_64_bf16, (forward<Tile64, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_128_bf16, (forward<Tile128, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_16_bf16, (input_gradient<Tile16, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_32_bf16, (input_gradient<Tile32, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_64_bf16, (input_gradient<Tile64, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_128_bf16, (input_gradient<Tile128, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_weight_gradient_16_bf16, (weight_gradient<Tile16, __nv_bfloat16>), WeightGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_weight_gradient_32_bf16, (weight_gradient<Tile32, __nv_bfloat16>), WeightGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_weight_gradient_64_bf16, (weight_gradient<Tile64, __nv_bfloat16>), WeightGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_weight_gradient_128_bf16, (weight_gradient<Tile128, __nv_bfloat16>), WeightGradientArgs<__nv_bfloat16>)
