// Convolution on the GPU, NHWC with HWIO weights, as tiled matrix products whose operands are gathered while they are
// loaded.
//
//   forward:          rows = output pixels,            columns = out channels, depth = taps x in channels
//   input gradient:   rows = input pixels of a class,  columns = in channels,  depth = the class's taps x out channels
//   weight gradient:  rows = taps x in channels,       columns = out channels, depth = output pixels
//
// blockIdx.y is the group of channels. With a stride, the pixels of the input form stride x stride parity classes, each
// with its own taps. blockIdx.z is the class, and no zeros between the pixels of the output gradient are multiplied.
// The weight gradient splits its depth over blockIdx.z into partial sums, which a second kernel (gradient.cu) adds in a
// fixed order, so that the bits are always the same.
//
// A block of kBlockThreads threads computes a tile. Its operands pass through shared memory, DEPTH at a time, while the
// next ones are loaded into registers. Each thread holds a square of accumulators.
#include "include/conv.cuh"

namespace {

// ---- The tiled product ---------------------------------------------------------------------------------------------

/// A block's tile, ROWS x COLUMNS, in steps of DEPTH; a thread computes THREAD_ROWS x THREAD_COLUMNS of it, in squares
/// of 4 x 4 that lie apart, so that a warp reads shared memory without bank conflicts.
template <int ROWS_, int COLUMNS_, int DEPTH_, int THREAD_ROWS_, int THREAD_COLUMNS_>
struct ConvTile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_;
    static constexpr int THREAD_ROWS = THREAD_ROWS_, THREAD_COLUMNS = THREAD_COLUMNS_;
    static constexpr int THREADS = kBlockThreads;
    static_assert(ROWS / THREAD_ROWS * (COLUMNS / THREAD_COLUMNS) == THREADS, "a thread for every square");
    static constexpr int LEFT_PITCH = ROWS + kConvLinePadding, RIGHT_PITCH = COLUMNS + kConvLinePadding;
};

/// Where a thread's packs lie in an operand's EXTENT x DEPTH part in shared memory, [depth][extent].
template <int EXTENT, int DEPTH, bool ALONG_DEPTH>
struct ThreadPacks {
    static constexpr int THREADS = kBlockThreads, PITCH = EXTENT + kConvLinePadding;
    static constexpr int PACKS = EXTENT * DEPTH / 4, COUNT = PACKS < THREADS ? 1 : PACKS / THREADS;
    static_assert(PACKS < THREADS || PACKS % THREADS == 0, "threads load equally many packs");
    static constexpr int IN_A_LINE = (ALONG_DEPTH ? DEPTH : EXTENT) / 4, STEP = THREADS / IN_A_LINE;

    __device__ __forceinline__ static bool has() { return PACKS >= THREADS || int(threadIdx.x) < PACKS; }
    /// The row (or column) at which pack i begins.
    __device__ __forceinline__ static int at(int i) {
        const int line = threadIdx.x / IN_A_LINE + i * STEP, in_line = threadIdx.x % IN_A_LINE * 4;
        return ALONG_DEPTH ? line : in_line;
    }
    __device__ __forceinline__ static int depth_at(int i) {
        const int line = threadIdx.x / IN_A_LINE + i * STEP, in_line = threadIdx.x % IN_A_LINE * 4;
        return ALONG_DEPTH ? in_line : line;
    }
    template <class T>
    __device__ __forceinline__ static void put(T* shared, int i, const Pack<T, 4>& pack) {
        T* to = shared + depth_at(i) * PITCH + at(i);
        if (ALONG_DEPTH) {
            POLDER_UNROLL
            for (int j = 0; j < 4; ++j) to[j * PITCH] = pack.v[j];
        } else {
            store<4>(to, 0, pack);
        }
    }
};

/// Adds to sum the product of the operands over depth [begin, end). The problem gives packs of 4, along the depth or
/// across it: `left(i, k)`, the thread's pack i at depth k, and `right(column, k)`; zeros where the product has ended.
template <class Tile, class T, class Problem>
__device__ __forceinline__ void multiply(const Problem& problem, int first_column, int begin, int end,
                                         T (&sum)[Tile::THREAD_ROWS][Tile::THREAD_COLUMNS]) {
    using Left = ThreadPacks<Tile::ROWS, Tile::DEPTH, Problem::LEFT_ALONG_DEPTH>;
    using Right = ThreadPacks<Tile::COLUMNS, Tile::DEPTH, Problem::RIGHT_ALONG_DEPTH>;
    constexpr int LEFT_SIZE = Tile::DEPTH * Tile::LEFT_PITCH, RIGHT_SIZE = Tile::DEPTH * Tile::RIGHT_PITCH;
    constexpr int ROW_SQUARES = Tile::THREAD_ROWS / 4, COLUMN_SQUARES = Tile::THREAD_COLUMNS / 4;
    constexpr int THREADS_ACROSS = Tile::COLUMNS / Tile::THREAD_COLUMNS;
    POLDER_DYNAMIC_SHARED(T, shared);
    T* const left_shared = shared;
    T* const right_shared = shared + 2 * LEFT_SIZE;
    const int thread_row = threadIdx.x / THREADS_ACROSS * 4, thread_column = threadIdx.x % THREADS_ACROSS * 4;

    Pack<T, 4> left[Left::COUNT], right[Right::COUNT];
    const auto fetch = [&](int k) {
        POLDER_UNROLL
        for (int i = 0; i < Left::COUNT; ++i) left[i] = problem.left(i, k + Left::depth_at(i));
        POLDER_UNROLL
        for (int i = 0; i < Right::COUNT; ++i) {
            if (Right::has()) right[i] = problem.right(first_column + Right::at(i), k + Right::depth_at(i));
        }
    };
    const auto put = [&](int buffer) {
        POLDER_UNROLL
        for (int i = 0; i < Left::COUNT; ++i) Left::put(left_shared + buffer * LEFT_SIZE, i, left[i]);
        POLDER_UNROLL
        for (int i = 0; i < Right::COUNT; ++i) {
            if (Right::has()) Right::put(right_shared + buffer * RIGHT_SIZE, i, right[i]);
        }
    };

    if (begin >= end) return;
    fetch(begin);
    put(0);
    __syncthreads();
    int buffer = 0;
    for (int k = begin; k < end; k += Tile::DEPTH, buffer ^= 1) {
        const bool more = k + Tile::DEPTH < end;
        if (more) fetch(k + Tile::DEPTH);
        const T* rows = left_shared + buffer * LEFT_SIZE + thread_row;
        const T* columns = right_shared + buffer * RIGHT_SIZE + thread_column;
        POLDER_UNROLL
        for (int d = 0; d < Tile::DEPTH; ++d) {
            Pack<T, 4> a[ROW_SQUARES], b[COLUMN_SQUARES];
            POLDER_UNROLL
            for (int i = 0; i < ROW_SQUARES; ++i) {
                a[i] = load<4>(rows, d * Tile::LEFT_PITCH + i * (Tile::ROWS / ROW_SQUARES));
            }
            POLDER_UNROLL
            for (int j = 0; j < COLUMN_SQUARES; ++j) {
                b[j] = load<4>(columns, d * Tile::RIGHT_PITCH + j * (Tile::COLUMNS / COLUMN_SQUARES));
            }
            POLDER_UNROLL
            for (int i = 0; i < Tile::THREAD_ROWS; ++i) {
                POLDER_UNROLL
                for (int j = 0; j < Tile::THREAD_COLUMNS; ++j) sum[i][j] += a[i / 4].v[i % 4] * b[j / 4].v[j % 4];
            }
        }
        // The other buffer was last read before the previous barrier.
        if (more) put(buffer ^ 1);
        __syncthreads();
    }
}

/// The row (or column) of the tile to which row (or column) i of the thread's accumulators belongs.
template <class Tile>
__device__ __forceinline__ int tile_row(int i) {
    constexpr int SQUARES = Tile::THREAD_ROWS / 4;
    return int(threadIdx.x) / (Tile::COLUMNS / Tile::THREAD_COLUMNS) * 4 + i / 4 * (Tile::ROWS / SQUARES) + i % 4;
}
template <class Tile>
__device__ __forceinline__ int tile_column(int j) {
    constexpr int SQUARES = Tile::THREAD_COLUMNS / 4;
    return int(threadIdx.x) % (Tile::COLUMNS / Tile::THREAD_COLUMNS) * 4 + j / 4 * (Tile::COLUMNS / SQUARES) + j % 4;
}

/// Writes the thread's row i of the result to `to`, a row of `columns` elements, or adds it.
template <class Tile, class T>
__device__ __forceinline__ void write_row(T* to, int first_column, int columns, const T (&sum)[Tile::THREAD_COLUMNS],
                                          bool add, bool wide) {
    POLDER_UNROLL
    for (int j = 0; j < Tile::THREAD_COLUMNS; j += 4) {
        const int column = first_column + tile_column<Tile>(j);
        if (column >= columns) continue;
        if (wide) {
            Pack<T, 4> pack{};
            if (add) pack = load<4>(to, column);
            POLDER_UNROLL
            for (int i = 0; i < 4; ++i) pack.v[i] += sum[j + i];
            store<4>(to, column, pack);
            continue;
        }
        POLDER_UNROLL
        for (int i = 0; i < 4; ++i) {
            if (column + i < columns) to[column + i] = add ? to[column + i] + sum[j + i] : sum[j + i];
        }
    }
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <class Tile, class T>
struct ForwardProblem {
    static constexpr bool LEFT_ALONG_DEPTH = true, RIGHT_ALONG_DEPTH = false;
    using Left = ThreadPacks<Tile::ROWS, Tile::DEPTH, LEFT_ALONG_DEPTH>;
    const Windows<T> windows;
    const T* weight;
    int columns, pitch;
    bool wide_right;
    Place places[Left::COUNT];

    __device__ __forceinline__ Pack<T, 4> left(int i, int k) const { return windows.template pack<4>(places[i], k); }
    __device__ __forceinline__ Pack<T, 4> right(int column, int k) const {
        if (k >= windows.depth) return {};
        return row_pack<4>(weight + int64_t(k) * pitch, column, columns, wide_right);
    }
};

/// y[n, i, j, o] = sum over taps and c of x[n, i * stride + tap row - padding, j * stride + tap column - padding, c] *
/// weight
template <class Tile, class T>
__device__ __forceinline__ void forward(const ConvArgs<T>& a) {
    using Problem = ForwardProblem<Tile, T>;
    const ConvShape& s = a.shape;
    const int pixels = s.batch * s.out_height * s.out_width;
    const Raster raster{a.divisors.out_width, a.divisors.out_height};
    const Corner<Tile> corner(s.out_channels);
    const int first_out = int(blockIdx.y) * s.out_channels;
    Problem problem{input_windows(a), a.right + first_out, s.out_channels, s.out_pitch, a.wide_right != 0, {}};
    POLDER_UNROLL
    for (int i = 0; i < Problem::Left::COUNT; ++i) {
        const int number = corner.row + Problem::Left::at(i);
        const Pixel pixel = raster.pixel(number);
        problem.places[i] = number < pixels ? problem.windows.place(pixel.image, pixel.row * s.stride - s.padding,
                                                                    pixel.column * s.stride - s.padding)
                                            : problem.windows.nowhere();
    }
    T sum[Tile::THREAD_ROWS][Tile::THREAD_COLUMNS] = {};
    multiply<Tile>(problem, corner.column, 0, problem.windows.depth, sum);
    POLDER_UNROLL
    for (int i = 0; i < Tile::THREAD_ROWS; ++i) {
        const int pixel = corner.row + tile_row<Tile>(i);
        if (pixel >= pixels) continue;
        write_row<Tile>(a.out + int64_t(pixel) * s.out_pitch + first_out, corner.column, s.out_channels, sum[i],
                        a.accumulate != 0, a.wide_out != 0);
    }
}

// ---- Input gradient ------------------------------------------------------------------------------------------------

template <class Tile, class T>
struct InputGradientProblem {
    static constexpr bool LEFT_ALONG_DEPTH = true, RIGHT_ALONG_DEPTH = true;
    using Left = ThreadPacks<Tile::ROWS, Tile::DEPTH, LEFT_ALONG_DEPTH>;
    const Windows<T> windows;
    const ClassWeights<T> weights;
    Place places[Left::COUNT];

    __device__ __forceinline__ Pack<T, 4> left(int i, int k) const { return windows.template pack<4>(places[i], k); }
    __device__ __forceinline__ Pack<T, 4> right(int channel, int k) const {
        return weights.template pack<4>(channel, k);
    }
};

/// dx[n, i, j, c] = sum over o and the taps by which y depends on x[n, i, j, c] of dy * weight
template <class Tile, class T>
__device__ __forceinline__ void input_gradient(const ConvArgs<T>& a) {
    using Problem = InputGradientProblem<Tile, T>;
    const ConvShape& s = a.shape;
    const int row_remainder = int(blockIdx.z) / s.stride, column_remainder = int(blockIdx.z) % s.stride;
    const ParityClass rows = parity_class(s, row_remainder, s.height);
    const ParityClass columns = parity_class(s, column_remainder, s.width);
    const int pixels = s.batch * rows.extent * columns.extent;
    const Corner<Tile> corner(s.in_channels);
    if (corner.row >= pixels) return;
    const Raster raster = class_raster(a.divisors, rows, columns);
    const int first_out = int(blockIdx.y) * s.out_channels;
    T* const out = a.out + int(blockIdx.y) * s.in_channels;
    Problem problem{class_windows(a, rows, columns),
                    ClassWeights<T>(a.right + first_out, s, a.divisors, rows, columns, a.wide_right != 0),
                    {}};
    POLDER_UNROLL
    for (int i = 0; i < Problem::Left::COUNT; ++i) {
        const int number = corner.row + Problem::Left::at(i);
        const Pixel pixel = raster.pixel(number);
        problem.places[i] =
            number < pixels ? problem.windows.place(pixel.image, pixel.row + rows.first, pixel.column + columns.first)
                            : problem.windows.nowhere();
    }
    T sum[Tile::THREAD_ROWS][Tile::THREAD_COLUMNS] = {};
    multiply<Tile>(problem, corner.column, 0, problem.windows.depth, sum);
    POLDER_UNROLL
    for (int i = 0; i < Tile::THREAD_ROWS; ++i) {
        const int number = corner.row + tile_row<Tile>(i);
        if (number >= pixels) continue;
        const Pixel pixel = raster.pixel(number);
        const int row = pixel.row * s.stride + row_remainder, column = pixel.column * s.stride + column_remainder;
        write_row<Tile>(out + (int64_t(pixel.image * s.height + row) * s.width + column) * s.in_pitch, corner.column,
                        s.in_channels, sum[i], a.accumulate != 0, a.wide_out != 0);
    }
}

// ---- Weight gradient -----------------------------------------------------------------------------------------------

template <class Tile, class T>
struct WeightGradientProblem {
    static constexpr bool LEFT_ALONG_DEPTH = false, RIGHT_ALONG_DEPTH = false;
    const Windows<T> windows;
    const T* dy;
    Raster raster;
    int stride, padding, columns, pitch, end, first;  // end: of the depth; first: the row of the thread's packs
    bool wide_right;

    __device__ __forceinline__ Pack<T, 4> left(int, int number) const {
        if (number >= end) return {};
        const Pixel pixel = raster.pixel(number);
        const int row = pixel.row * stride - padding, column = pixel.column * stride - padding;
        return windows.template pack<4>(windows.place(pixel.image, row, column), first);
    }
    __device__ __forceinline__ Pack<T, 4> right(int column, int number) const {
        if (number >= end) return {};
        return row_pack<4>(dy + int64_t(number) * pitch, column, columns, wide_right);
    }
};

/// out[split][tap][c][o] = sum over the split's pixels of x[pixel at the tap, c] * dy[pixel, o]
template <class Tile, class T>
__device__ __forceinline__ void weight_gradient(const ConvArgs<T>& a) {
    using Problem = WeightGradientProblem<Tile, T>;
    using Left = ThreadPacks<Tile::ROWS, Tile::DEPTH, Problem::LEFT_ALONG_DEPTH>;
    const ConvShape& s = a.shape;
    const int pixels = s.batch * s.out_height * s.out_width;
    const int begin = min(int(blockIdx.z) * a.part_pixels, pixels), end = min(begin + a.part_pixels, pixels);
    const Corner<Tile> corner(s.out_channels);
    const int first_out = int(blockIdx.y) * s.out_channels;
    const Problem problem{input_windows(a),
                          a.right + first_out,
                          Raster{a.divisors.out_width, a.divisors.out_height},
                          s.stride,
                          s.padding,
                          s.out_channels,
                          s.out_pitch,
                          end,
                          corner.row + Left::at(0),
                          a.wide_right != 0};
    T sum[Tile::THREAD_ROWS][Tile::THREAD_COLUMNS] = {};
    multiply<Tile>(problem, corner.column, begin, end, sum);
    const int rows = problem.windows.depth;
    T* out = a.out + int64_t(blockIdx.z) * rows * s.out_pitch + first_out;
    POLDER_UNROLL
    for (int i = 0; i < Tile::THREAD_ROWS; ++i) {
        const int row = corner.row + tile_row<Tile>(i);
        if (row >= rows) continue;
        write_row<Tile>(out + int64_t(row) * s.out_pitch, corner.column, s.out_channels, sum[i], a.accumulate != 0,
                        a.wide_out != 0);
    }
}

// Tile16 ... Tile128.
#define POLDER_TILE(NAME, ...) using Tile##NAME = ConvTile<__VA_ARGS__>;
POLDER_CONV_TILES(POLDER_TILE)
#undef POLDER_TILE

}  // namespace

POLDER_KERNEL(conv_forward_16_f32, (forward<Tile16, float>), ConvArgs<float>)
POLDER_KERNEL(conv_forward_32_f32, (forward<Tile32, float>), ConvArgs<float>)
POLDER_KERNEL(conv_forward_64_f32, (forward<Tile64, float>), ConvArgs<float>)
POLDER_KERNEL(conv_forward_128_f32, (forward<Tile128, float>), ConvArgs<float>)
POLDER_KERNEL(conv_input_gradient_16_f32, (input_gradient<Tile16, float>), ConvArgs<float>)
POLDER_KERNEL(conv_input_gradient_32_f32, (input_gradient<Tile32, float>), ConvArgs<float>)
POLDER_KERNEL(conv_input_gradient_64_f32, (input_gradient<Tile64, float>), ConvArgs<float>)
POLDER_KERNEL(conv_input_gradient_128_f32, (input_gradient<Tile128, float>), ConvArgs<float>)
POLDER_KERNEL(conv_weight_gradient_16_f32, (weight_gradient<Tile16, float>), ConvArgs<float>)
POLDER_KERNEL(conv_weight_gradient_32_f32, (weight_gradient<Tile32, float>), ConvArgs<float>)
POLDER_KERNEL(conv_weight_gradient_64_f32, (weight_gradient<Tile64, float>), ConvArgs<float>)
POLDER_KERNEL(conv_weight_gradient_128_f32, (weight_gradient<Tile128, float>), ConvArgs<float>)
POLDER_HOST_KERNEL(conv_forward_16_f64, (forward<Tile16, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_forward_32_f64, (forward<Tile32, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_forward_64_f64, (forward<Tile64, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_forward_128_f64, (forward<Tile128, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_input_gradient_16_f64, (input_gradient<Tile16, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_input_gradient_32_f64, (input_gradient<Tile32, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_input_gradient_64_f64, (input_gradient<Tile64, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_input_gradient_128_f64, (input_gradient<Tile128, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_weight_gradient_16_f64, (weight_gradient<Tile16, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_weight_gradient_32_f64, (weight_gradient<Tile32, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_weight_gradient_64_f64, (weight_gradient<Tile64, double>), ConvArgs<double>)
POLDER_HOST_KERNEL(conv_weight_gradient_128_f64, (weight_gradient<Tile128, double>), ConvArgs<double>)
