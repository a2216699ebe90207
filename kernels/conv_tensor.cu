// Convolution on tensor cores, NHWC with HWIO weights, as the matrix products of conv.cu, for operands of 16 bits, and
// for operands of 32 bits that are rounded to TF32 or multiplied as sums of numbers of bf16:
//
//   forward:          rows = output pixels,            columns = out channels, depth = taps x in channels
//   input gradient:   rows = input pixels of a class,  columns = in channels,  depth = the class's taps x out channels
//   weight gradient:  rows = taps x in channels,       columns = out channels, depth = output pixels
//
// blockIdx.y is the group of channels. blockIdx.z is the parity class of the input gradient, or the split of the weight
// gradient's depth. Products are summed in f32; y and dx are rounded once, at the end, and the weight gradient stays in
// f32.
//
// An operand moves from memory to the tensor cores in three steps.
//
// 1. Global to shared memory. The unit is a chunk of 16 bytes of neighbouring channels. If the channels form whole
//    chunks, cp.async copies them without registers, with zeros for what is outside the image or the product. Otherwise
//    threads gather a chunk element by element. A block works on one stage of its operands while the next ones are
//    copied.
// 2. Shared memory holds an operand in lines of chunks. If memory runs along the depth, a line is 64 bytes of the depth
//    of one row (or column) of the product. If it runs across the depth, a line is all rows (or columns) at one depth.
//    The place of a chunk in its line is XORed with bits of the line's number. So the eight rows of a matrix that
//    ldmatrix reads, one chunk in each of eight lines, are in different banks.
// 3. Shared memory to registers. ldmatrix loads fragments as mma reads them, transposed if memory runs across the
//    depth. It cannot transpose elements of 32 bits, which are then read one by one. Operands of 32 bits are rounded to
//    TF32, or taken apart into numbers of bf16, in registers.
//
// A warp computes a part of the tile that is as large as its registers allow, because each fragment is used once for
// every fragment of the other operand. At 64 x 64, shared memory is as fast as the tensor cores.
#include "include/batch_norm.cuh"
#include "include/conv.cuh"
#include "include/finish.cuh"
#include "include/mma.cuh"

namespace {

/// Sums over the rows of a tile, one for each column, are first computed over lines of this many rows, in every tile.
/// So their bits do not depend on the tile.
constexpr int LINE_ROWS = 32;

/// A block's tile, ROWS x COLUMNS, of which each warp computes WARP_ROWS x WARP_COLUMNS, with operands in STAGES
/// stages.
template <int COLUMNS_, int WARP_ROWS_, int WARP_COLUMNS_, int THREADS_, int STAGES_>
struct TensorTile {
    static constexpr int ROWS = kMomentRows, COLUMNS = COLUMNS_, WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_;
    static constexpr int THREADS = THREADS_, STAGES = STAGES_, WARPS_ACROSS = COLUMNS / WARP_COLUMNS;
    static_assert(THREADS == ROWS / WARP_ROWS * WARPS_ACROSS * 32, "a warp for every part of the tile");
    static_assert(WARP_ROWS % LINE_ROWS == 0 && WARP_COLUMNS % 16 == 0, "whole lines, and whole fragments");
    /// Bytes of the depth in a stage, and with them the bytes of the operands' parts.
    static constexpr int DEPTH_BYTES = kStageBytes, LEFT_BYTES = ROWS * DEPTH_BYTES,
                         RIGHT_BYTES = COLUMNS * DEPTH_BYTES;

    /// A warp's sums, in fragments of 16 x 8, as each thread holds them.
    using Accumulators = float[WARP_ROWS / 16][WARP_COLUMNS / 8][4];

    __device__ __forceinline__ static int warp_row() { return int(threadIdx.x) / 32 / WARPS_ACROSS * WARP_ROWS; }
    __device__ __forceinline__ static int warp_column() { return int(threadIdx.x) / 32 % WARPS_ACROSS * WARP_COLUMNS; }
};

// ---- Operands in shared memory --------------------------------------------------------------------------------------

enum class Side { kLeft, kRight };

/// A warp's fragments of 16 rows of the left operand, which is one fragment of an mma, or of 16 columns of the right
/// one, which are two.
struct Fragments {
    uint32_t r[4];
};

/// The fragments of a Split<PIECES>, from the largest piece to the smallest.
template <int PIECES>
struct SplitFragments {
    Fragments of[PIECES];
};

/// An operand's part in shared memory, EXTENT rows (or columns) of the product, and how a block's threads fill it. A
/// thread's chunks are all at the same place of their lines or, BY_LINE, in the same line. So most of the computation
/// of their addresses is done once: the tap along the depth, or the pixel of a line across it.
template <class P, Side SIDE, int EXTENT, int THREADS, bool ALONG_DEPTH, bool BY_LINE = false>
struct Operand {
    typedef Stored<P> T;
    static constexpr int PIECES = Factor<P>::PIECES;
    /// Elements of a chunk, and of the depth of a stage.
    static constexpr int CHUNK = 16 / int(sizeof(T)), DEPTH = kStageBytes / int(sizeof(T));
    static constexpr int LINES = ALONG_DEPTH ? EXTENT : DEPTH, CHUNKS = (ALONG_DEPTH ? DEPTH : EXTENT) / CHUNK;
    static constexpr int LINE_BYTES = CHUNKS * 16;
    /// Whether fragments are read element by element. A matrix is then two chunks in each of four lines.
    static constexpr bool BY_ELEMENTS = sizeof(T) == 4 && !ALONG_DEPTH;
    /// The number of lines after which the order of the chunks repeats.
    static constexpr int PERIOD = BY_ELEMENTS ? 4 : 8;
    /// The distance of a thread's chunks, in lines or, BY_LINE, in places.
    static constexpr int STEP = THREADS / (BY_LINE ? LINES : CHUNKS), COPIED = BY_LINE ? CHUNKS : LINES;
    static constexpr int COUNT = COPIED < STEP ? 1 : COPIED / STEP;
    static_assert(THREADS % (BY_LINE ? LINES : CHUNKS) == 0 && (COPIED < STEP || COPIED % STEP == 0),
                  "equally many chunks each");
    static_assert(BY_LINE || COUNT == 1 || STEP % PERIOD == 0, "a thread's chunks are equally far apart");
    static_assert(!BY_LINE || (STEP & (STEP - 1)) == 0, "bits of a chunk's number that its thread's first one has not");

    /// The line and the place in it of the thread's chunk i.
    __device__ __forceinline__ static int line(int i) {
        if (!BY_LINE) return int(threadIdx.x) / CHUNKS + i * STEP;
        const int number = int(threadIdx.x) / STEP;
        // Eight lanes write at a time. If they write to two lines, these differ in the bit that moves a chunk to other
        // banks.
        return STEP == 4 ? (number & ~7) | (number & 1) << 2 | (number >> 1 & 3) : number;
    }
    __device__ __forceinline__ static int chunk(int i) {
        return BY_LINE ? int(threadIdx.x) % STEP + i * STEP : int(threadIdx.x) % CHUNKS;
    }
    /// The row (or column) and the depth at which the thread's chunk i begins.
    __device__ __forceinline__ static int at(int i) { return ALONG_DEPTH ? line(i) : chunk(i) * CHUNK; }
    __device__ __forceinline__ static int depth_at(int i) { return ALONG_DEPTH ? chunk(i) * CHUNK : line(i); }

    /// Bytes from the beginning of a period of lines to a chunk.
    __device__ __forceinline__ static int place(int line, int chunk) {
        // Eight chunks fill all banks once. Several shorter lines do so together, and need no different order.
        constexpr int TOLD_APART = CHUNKS < 8 ? CHUNKS : 8;
        const int number = line / (8 / TOLD_APART) * (BY_ELEMENTS ? 2 : 1);
        return line * LINE_BYTES + (chunk ^ number % TOLD_APART) * 16;
    }

    /// Starts to fill the part from the source, beginning at row (or column) `first` and depth `depth`. `WIDE`: the
    /// source consists of whole chunks.
    template <bool WIDE, class Source>
    __device__ __forceinline__ static void fill(unsigned char* part, const Source& source, int first, int depth,
                                                AsyncCopies& copies) {
        if (!BY_LINE && LINES < STEP && line(0) >= LINES) return;
        // This is place(line(i), chunk(i)). In a line, STEP chunks further means other bits of the place, which is
        // XORed as a whole.
        const int first_place = place(line(0), chunk(0));
        const auto to = [&](int i) {
            if (!BY_LINE) return part + first_place + i * STEP * LINE_BYTES;
            return part + (first_place ^ i * STEP % 8 * 16) + i * STEP / 8 * 128;
        };
        if (WIDE || source.wide) {
            const auto shared = source.share(depth + depth_at(0));
            POLDER_UNROLL
            for (int i = 0; i < COUNT; ++i) {
                const Found found = source.find(i, shared, first + at(i), depth + depth_at(i));
                // If the chunk is outside, nothing is read, and the address may be any.
                copies.copy<Source::READ_AGAIN>(to(i), source.tensor + found.offset, found.there);
            }
        } else {
            POLDER_UNROLL
            for (int i = 0; i < COUNT; ++i) {
                const Pack<T, CHUNK> pack = source.pack(i, first + at(i), depth + depth_at(i));
                store<CHUNK>(reinterpret_cast<T*>(to(i)), 0, pack);
            }
        }
    }

    /// The register of an mma that holds the upper (or lower) eight rows or columns, and the first (or second) half of
    /// the depth.
    __device__ __forceinline__ static constexpr int number(int upper, int deeper) {
        return SIDE == Side::kLeft ? upper + 2 * deeper : 2 * upper + deeper;
    }
    /// What a lane holds of the 16 rows (or columns) from `first` on in half `half` of a stage's depth, as stored.
    __device__ __forceinline__ static Fragments read(const unsigned char* part, int first, int half) {
        const int lane = int(threadIdx.x) % 32;
        Fragments result;
        if constexpr (BY_ELEMENTS) {
            const int group = lane / 4, member = lane % 4;
            POLDER_UNROLL
            for (int upper = 0; upper < 2; ++upper) {
                const int in_lines =
                    place(member, first / CHUNK + upper * 2 + group / CHUNK) + group % CHUNK * int(sizeof(T));
                POLDER_UNROLL
                for (int deeper = 0; deeper < 2; ++deeper) {
                    const unsigned char* lines = part + (half * (DEPTH / 2) + deeper * PERIOD) * LINE_BYTES;
                    result.r[number(upper, deeper)] = *reinterpret_cast<const uint32_t*>(lines + in_lines);
                }
            }
        } else {
            // The lane's row belongs to the matrix that is loaded into register lane / 8.
            const int upper = lane / (SIDE == Side::kLeft ? 8 : 16) % 2,
                      deeper = lane / (SIDE == Side::kLeft ? 16 : 8) % 2;
            const int line = (ALONG_DEPTH ? upper : deeper) * 8 + lane % 8;
            if constexpr (ALONG_DEPTH) {
                ldmatrix<false>(part + first * LINE_BYTES + place(line, half * 2 + deeper), result.r);
            } else {
                ldmatrix<true>(part + half * (DEPTH / 2) * LINE_BYTES + place(line, first / CHUNK + upper), result.r);
            }
        }
        return result;
    }
    /// The fragments of the 16 rows (or columns) from `first` on in half `half` of a stage's depth.
    __device__ __forceinline__ static Fragments fragments(const unsigned char* part, int first, int half) {
        Fragments result = read(part, first, half);
        if constexpr (sizeof(T) == 4) {
            POLDER_UNROLL
            for (uint32_t& bits : result.r) bits = to_tf32(__uint_as_float(bits));
        }
        return result;
    }
    /// The fragments of the 16 rows (or columns) from `first` on over a stage's depth, that of one mma of bf16.
    ///
    /// A lane reads the elements t, t + 4, t + 8 and t + 12 of the depth of a row, where t = lane % 4. An mma expects
    /// that it holds the elements 2t, 2t + 1, 2t + 8 and 2t + 9. Both operands have their elements in these places, so
    /// the depth is summed in another order, and nothing else changes.
    __device__ __forceinline__ static SplitFragments<PIECES> split(const unsigned char* part, int first) {
        SplitFragments<PIECES> result;
        POLDER_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Fragments stored = read(part, first, half);
            POLDER_UNROLL
            for (int upper = 0; upper < 2; ++upper) {
                float low = __uint_as_float(stored.r[number(upper, 0)]),
                      high = __uint_as_float(stored.r[number(upper, 1)]);
                POLDER_UNROLL
                for (int piece = 0; piece < PIECES; ++piece) {
                    const uint32_t pair = to_bf16_pair(low, high);
                    result.of[piece].r[number(upper, half)] = pair;
                    // Both differences are exact.
                    low -= __uint_as_float(pair << 16);
                    high -= __uint_as_float(pair & 0xffff0000u);
                }
            }
        }
        return result;
    }
};

// ---- Operands in global memory: shared parts of the addresses, the address of chunk i, and single elements ----------

/// Windows as rows of the product, along the depth. A thread's chunks have the same tap. Windows of neighbouring pixels
/// and taps overlap.
template <class Rows, class T>
struct WindowRows {
    static constexpr bool READ_AGAIN = true;
    const T* tensor;
    bool wide;
    const Windows<T> windows;
    Place places[Rows::COUNT];

    __device__ __forceinline__ explicit WindowRows(const Windows<T>& windows)
        : tensor(windows.tensor), wide(windows.wide), windows(windows) {}

    __device__ __forceinline__ Place share(int depth) const {
        return depth < windows.depth ? windows.step(depth) : windows.nowhere();
    }
    __device__ __forceinline__ Found find(int i, const Place& step, int, int) const {
        return windows.find(places[i], step);
    }
    __device__ __forceinline__ Pack<T, Rows::CHUNK> pack(int i, int, int depth) const {
        return windows.template pack<Rows::CHUNK>(places[i], depth);
    }
};

/// Windows as columns of the depth: the rows of the weight gradient run over taps and channels, its depth over pixels
/// up to `end`. A thread's chunks have the same pixel, so `Rows` is an operand BY_LINE.
template <class Rows, class T>
struct WindowColumns {
    static constexpr bool READ_AGAIN = true;
    const T* tensor;
    bool wide;
    const Windows<T> windows;
    const Raster raster;
    int stride, padding, end;
    /// The steps from the first tap's first channel to the taps and channels of the thread's chunks.
    Place steps[Rows::COUNT];

    __device__ __forceinline__ WindowColumns(const Windows<T>& windows, const ConvDivisors& by, const ConvShape& s,
                                             int first_row, int end)
        : tensor(windows.tensor), wide(windows.wide), windows(windows), raster{by.out_width, by.out_height},
          stride(s.stride), padding(s.padding), end(end) {
        POLDER_UNROLL
        for (int i = 0; i < Rows::COUNT; ++i) {
            const int row = first_row + Rows::at(i);
            // Rows beyond the end of the product are outside. This is selected without a branch, which needs fewer
            // registers.
            steps[i] = windows.step(row < windows.depth ? row : 0);
            if (row >= windows.depth) steps[i].row = windows.nowhere().row;
        }
    }

    __device__ __forceinline__ Place share(int number) const {
        if (number >= end) return windows.nowhere();
        const Pixel pixel = raster.pixel(number);
        return windows.place(pixel.image, pixel.row * stride - padding, pixel.column * stride - padding);
    }
    __device__ __forceinline__ Found find(int i, const Place& place, int, int) const {
        return windows.find(place, steps[i]);
    }
    __device__ __forceinline__ Pack<T, Rows::CHUNK> pack(int, int row, int number) const {
        return windows.template pack<Rows::CHUNK>(share(number), row);
    }
};

/// Some columns of a matrix [depth][pitch]: the weights of the forward, or the output gradient, whose depth is the
/// pixels up to `end`.
template <class Columns, class T>
struct Matrix {
    static constexpr bool READ_AGAIN = false;
    const T* tensor;
    bool wide;
    int columns, pitch, end;

    struct Nothing {};
    __device__ __forceinline__ Nothing share(int) const { return {}; }
    __device__ __forceinline__ Found find(int, Nothing, int column, int depth) const {
        return {column < columns && depth < end, int32_t(uint32_t(depth) * pitch + column)};
    }
    __device__ __forceinline__ Pack<T, Columns::CHUNK> pack(int, int column, int depth) const {
        if (depth >= end) return {};
        return row_pack<Columns::CHUNK>(tensor + int64_t(depth) * pitch, column, columns, wide);
    }
};

/// The weights as the input gradient reads them.
template <class Columns, class T>
struct ClassMatrix {
    static constexpr bool READ_AGAIN = false;
    const T* tensor;
    bool wide;
    const ClassWeights<T> weights;

    __device__ __forceinline__ explicit ClassMatrix(const ClassWeights<T>& weights)
        : tensor(weights.tensor), wide(weights.wide), weights(weights) {}

    __device__ __forceinline__ uint32_t share(int depth) const {
        const int tap = quotient(depth, weights.by_out_channels);
        return weights.offset(tap, 0, depth - tap * weights.out_channels);
    }
    __device__ __forceinline__ Found find(int, uint32_t offset, int channel, int depth) const {
        return {channel < weights.channels && depth < weights.depth,
                int32_t(offset + uint32_t(channel) * weights.pitch)};
    }
    __device__ __forceinline__ Pack<T, Columns::CHUNK> pack(int, int channel, int depth) const {
        return weights.template pack<Columns::CHUNK>(channel, depth);
    }
};

// ---- The product ----------------------------------------------------------------------------------------------------

/// Adds the products of split fragments, 16 rows of the left operand and all columns of the right one, to the sums: the
/// small products first, and the products of the largest pieces last.
///
/// The additions of an mma are not specified. Tensor cores have been found to cut off the bits below a sum's last one
/// (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 2021), and
/// then each mma moves a long sum towards zero. Beside the error of two pieces that is little. With three, the products
/// of a stage are summed from zero, and then added and rounded to nearest (Ootomo and Yokota, "Recovering single
/// precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance", IJHPCA 2022).
template <class Tile, int PIECES>
__device__ __forceinline__ void add_split_products(float (&sum)[Tile::WARP_COLUMNS / 8][4],
                                                   const SplitFragments<PIECES>& a,
                                                   const SplitFragments<PIECES> (&b)[Tile::WARP_COLUMNS / 16]) {
    constexpr int COLUMNS = Tile::WARP_COLUMNS / 8;
    constexpr bool APART = PIECES > 2;
    float products[COLUMNS][4] = {};
    auto& to = APART ? products : sum;
    POLDER_UNROLL
    for (int order = PIECES - 1; order >= 0; --order) {
        POLDER_UNROLL
        for (int piece = 0; piece <= order; ++piece) {
            POLDER_UNROLL
            for (int j = 0; j < COLUMNS; ++j) {
                const uint32_t* columns8 = &b[j / 2].of[order - piece].r[j % 2 * 2];
                mma<__nv_bfloat16>(to[j], a.of[piece].r, {columns8[0], columns8[1]});
            }
        }
    }
    if constexpr (APART) {
        POLDER_UNROLL
        for (int j = 0; j < COLUMNS; ++j) {
            POLDER_UNROLL
            for (int e = 0; e < 4; ++e) sum[j][e] += products[j][e];
        }
    }
}

/// Adds the products of a stage to the warp's sums. `meanwhile` is called when all fragments, or those of the columns,
/// have been read: without branches in it, its instructions overlap with the products.
template <class Tile, class P, class Rows, class Columns, class Meanwhile>
__device__ __forceinline__ void multiply_stage(const unsigned char* rows, const unsigned char* columns,
                                               Meanwhile meanwhile, typename Tile::Accumulators& sum) {
    if constexpr (Factor<P>::PIECES == 1) {
        POLDER_UNROLL
        for (int half = 0; half < 2; ++half) {
            Fragments a[Tile::WARP_ROWS / 16], b[Tile::WARP_COLUMNS / 16];
            POLDER_UNROLL
            for (int i = 0; i < Tile::WARP_ROWS / 16; ++i)
                a[i] = Rows::fragments(rows, Tile::warp_row() + i * 16, half);
            POLDER_UNROLL
            for (int j = 0; j < Tile::WARP_COLUMNS / 16; ++j) {
                b[j] = Columns::fragments(columns, Tile::warp_column() + j * 16, half);
            }
            if (half == 0) meanwhile();
            POLDER_UNROLL
            for (int i = 0; i < Tile::WARP_ROWS / 16; ++i) {
                POLDER_UNROLL
                for (int j = 0; j < Tile::WARP_COLUMNS / 8; ++j) {
                    const uint32_t* columns8 = &b[j / 2].r[j % 2 * 2];
                    mma<P>(sum[i][j], a[i].r, {columns8[0], columns8[1]});
                }
            }
        }
    } else {
        constexpr int PIECES = Factor<P>::PIECES;
        SplitFragments<PIECES> b[Tile::WARP_COLUMNS / 16];
        POLDER_UNROLL
        for (int j = 0; j < Tile::WARP_COLUMNS / 16; ++j) b[j] = Columns::split(columns, Tile::warp_column() + j * 16);
        meanwhile();
        POLDER_UNROLL
        for (int i = 0; i < Tile::WARP_ROWS / 16; ++i) {
            const SplitFragments<PIECES> a = Rows::split(rows, Tile::warp_row() + i * 16);
            add_split_products<Tile>(sum[i], a, b);
        }
    }
}

/// Adds the warp's part of the block's tile of left * right over the depth [begin, end) to its sums.
template <bool WIDE, class Tile, class P, class Rows, class Columns, class Left, class Right>
__device__ __forceinline__ void multiply_as(const Left& left, const Right& right, const Corner<Tile>& corner, int begin,
                                            int end, typename Tile::Accumulators& sum) {
    constexpr int STAGES = Tile::STAGES, STAGE_BYTES = Tile::LEFT_BYTES + Tile::RIGHT_BYTES;
    POLDER_DYNAMIC_SHARED(unsigned char, shared);
    AsyncCopies copies;
    int filled = 0, read = 0;
    // Beyond the end of the depth a stage is filled with zeros, and is not read.
    const auto fill = [&](int depth) {
        unsigned char* stage = shared + filled * STAGE_BYTES;
        Rows::template fill<WIDE>(stage, left, corner.row, depth, copies);
        Columns::template fill<WIDE>(stage + Tile::LEFT_BYTES, right, corner.column, depth, copies);
        copies.commit();
        filled = filled + 1 == STAGES ? 0 : filled + 1;
    };
    for (int stage = 0; stage < STAGES - 1; ++stage) fill(begin + stage * Rows::DEPTH);
    for (int depth = begin; depth < end; depth += Rows::DEPTH) {
        copies.template wait<STAGES - 2>();
        // Now all parts of this stage have arrived, and all threads have finished the previous stage, which is filled
        // again.
        __syncthreads();
        const unsigned char* rows = shared + read * STAGE_BYTES;
        const unsigned char* columns = rows + Tile::LEFT_BYTES;
        read = read + 1 == STAGES ? 0 : read + 1;
        const int ahead = depth + (STAGES - 1) * Rows::DEPTH;
        if (!WIDE) fill(ahead);
        const auto meanwhile = [&]() {
            if (WIDE) fill(ahead);
        };
        multiply_stage<Tile, P, Rows, Columns>(rows, columns, meanwhile, sum);
    }
    // Wait for the copies beyond the end of the depth. From here on, shared memory is free for other uses.
    copies.template wait<0>();
    __syncthreads();
}

/// The same, with the loop for these operands.
template <class Tile, class P, class Rows, class Columns, class Left, class Right>
__device__ __forceinline__ void multiply(const Left& left, const Right& right, const Corner<Tile>& corner, int begin,
                                         int end, typename Tile::Accumulators& sum) {
    if (left.wide && right.wide) {
        multiply_as<true, Tile, P, Rows, Columns>(left, right, corner, begin, end, sum);
    } else {
        multiply_as<false, Tile, P, Rows, Columns>(left, right, corner, begin, end, sum);
    }
}

/// Transposes four words of each of four lanes: word w of lane l becomes word l of lane w.
__device__ __forceinline__ void transpose_among_four(uint32_t (&words)[4]) {
    POLDER_UNROLL
    for (int distance = 1; distance < 4; distance *= 2) {
        const bool upper = (int(threadIdx.x) & distance) != 0;
        POLDER_UNROLL
        for (int i = 0; i < 2; ++i) {
            uint32_t &low = words[distance == 1 ? 2 * i : i], &high = words[distance == 1 ? 2 * i + 1 : i + 2];
            const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
            (upper ? low : high) = received;
        }
    }
}

/// The warp's sums as chunks of eight results of 16 bits. Of a 16 x 16 part, four lanes hold two rows, with two columns
/// of each eight. They exchange them, so that each has one chunk: single pairs would fill only half of a sector of
/// memory.
template <class Tile, class D>
struct Chunks {
    static_assert(sizeof(D) == 2, "pairs are words");

    /// The row and the column of this lane's chunk (i, j) in the block's tile.
    __device__ __forceinline__ static int row(int i) { return row(i, int(threadIdx.x) % 2); }
    __device__ __forceinline__ static int column(int j) {
        return Tile::warp_column() + j * 16 + int(threadIdx.x) % 4 / 2 * 8;
    }
    /// The two rows of the sums that the lane holds before the exchange.
    __device__ __forceinline__ static int row(int i, int lower) {
        return Tile::warp_row() + i * 16 + int(threadIdx.x) % 32 / 4 + lower * 8;
    }

    /// Chunk (i, j) of the sums, or with `add` of the sums plus the previous results. `row_at(i, lower)` is the address
    /// of such a row; null beyond the end of the product.
    template <class RowAt>
    __device__ __forceinline__ static Pack<D, 8> chunk(const typename Tile::Accumulators& sum, int i, int j,
                                                       int first_column, int columns, bool add, RowAt row_at) {
        uint32_t words[4];
        POLDER_UNROLL
        for (int part = 0; part < 4; ++part) {
            const int lower = part % 2, right = part / 2;
            const int column = first_column + Tile::warp_column() + j * 16 + right * 8 + int(threadIdx.x) % 4 * 2;
            const float* both = &sum[i][2 * j + right][2 * lower];
            Pack<D, 2> old{}, pair;
            if (add) {
                const D* from = row_at(i, lower);
                if (from != nullptr && column < columns) old = load<2>(from, column);
            }
            POLDER_UNROLL
            for (int e = 0; e < 2; ++e) pair.v[e] = convert_to<D>(add ? widen(old.v[e]) + both[e] : both[e]);
            memcpy(&words[part], &pair, sizeof pair);
        }
        transpose_among_four(words);
        Pack<D, 8> chunk;
        memcpy(&chunk, words, sizeof chunk);
        return chunk;
    }
};

/// Writes the warp's sums in chunks, or adds them. `row_at` is as below.
template <class Tile, class D, class RowAt>
__device__ __forceinline__ void write_chunks(const typename Tile::Accumulators& sum, int first_column, int columns,
                                             bool add, RowAt row_at) {
    typedef Chunks<Tile, D> Chunks;
    POLDER_UNROLL
    for (int i = 0; i < Tile::WARP_ROWS / 16; ++i) {
        D* to = row_at(Chunks::row(i));
        POLDER_UNROLL
        for (int j = 0; j < Tile::WARP_COLUMNS / 16; ++j) {
            const Pack<D, 8> chunk = Chunks::chunk(sum, i, j, first_column, columns, add,
                                                   [&](int i, int lower) { return row_at(Chunks::row(i, lower)); });
            const int column = first_column + Chunks::column(j);
            if (to != nullptr && column < columns) store<8>(to, column, chunk);
        }
    }
}

/// Writes the warp's sums, or adds them. `row_at(row)` is the address of a row of the tile; null beyond the end of the
/// product. `wide`: whether rows consist of whole, aligned chunks of eight 16-bit results, or of pairs of 32-bit ones.
template <class Tile, class D, class RowAt>
__device__ __forceinline__ void write(const typename Tile::Accumulators& sum, int first_column, int columns, bool add,
                                      bool wide, RowAt row_at) {
    if constexpr (sizeof(D) == 2) {
        if (wide) return write_chunks<Tile, D>(sum, first_column, columns, add, row_at);
    }
    const int lane = int(threadIdx.x) % 32;
    first_column += Tile::warp_column() + lane % 4 * 2;
    POLDER_UNROLL
    for (int i = 0; i < Tile::WARP_ROWS / 8; ++i) {
        D* to = row_at(Tile::warp_row() + i * 8 + lane / 4);
        if (to == nullptr) continue;
        POLDER_UNROLL
        for (int j = 0; j < Tile::WARP_COLUMNS / 8; ++j) {
            const int column = first_column + j * 8;
            const float* both = &sum[i / 2][j][i % 2 * 2];
            if (sizeof(D) == 4 && wide) {
                if (column >= columns) continue;
                Pack<D, 2> pack{};
                if (add) pack = load<2>(to, column);
                POLDER_UNROLL
                for (int e = 0; e < 2; ++e) pack.v[e] = convert_to<D>(widen(pack.v[e]) + both[e]);
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

/// Sums each of the first COUNT values (a power of two) over the lanes that differ in the bits DISTANCE, REST. The
/// totals are distributed over the lanes: a lane gets COUNT / lanes of them (at least one), in v[0] and on. The number
/// of its first total is returned.
template <int COUNT, int DISTANCE, int... REST, class T, int N>
__device__ __forceinline__ int total_over_lanes(T (&v)[N]) {
    static_assert((COUNT & (COUNT - 1)) == 0 && COUNT <= N, "halves of halves");
    const bool upper = (int(threadIdx.x) & DISTANCE) != 0;
    constexpr int HALF = COUNT > 1 ? COUNT / 2 : 1;
    POLDER_UNROLL
    for (int k = 0; k < HALF; ++k) {
        if constexpr (COUNT > 1) {
            const T given = upper ? v[k] : v[HALF + k], kept = upper ? v[HALF + k] : v[k];
            v[k] = kept + __shfl_xor_sync(0xffffffffu, given, DISTANCE);
        } else {
            v[k] += __shfl_xor_sync(0xffffffffu, v[k], DISTANCE);
        }
    }
    int first = COUNT > 1 && upper ? HALF : 0;
    if constexpr (sizeof...(REST) > 0) first += total_over_lanes<HALF, REST...>(v);
    return first;
}

/// Writes the mean of each column over the tile's first `rows` rows, and the sum of squared deviations from it, of the
/// values as they are stored. Batch norm combines its statistics from these. The mean is computed before the
/// deviations, so that nothing cancels.
template <class Tile, class D>
__device__ __forceinline__ void write_moments(const typename Tile::Accumulators& sum, int rows, int first_column,
                                              int columns, int tile, int tiles, float* moments) {
    constexpr int LINES = Tile::ROWS / LINE_ROWS, COUNT = Tile::WARP_COLUMNS / 8 * 2, PARTS = LINE_ROWS / 8;
    POLDER_DYNAMIC_SHARED(float, shared);
    float* const sums = shared;                         // [LINES][COLUMNS]
    float* const m2s = shared + LINES * Tile::COLUMNS;  // [LINES][COLUMNS]
    const int lane = int(threadIdx.x) % 32, line = Tile::warp_row() / LINE_ROWS;
    const auto column_of = [&](int k) { return Tile::warp_column() + k / 2 * 8 + lane % 4 * 2 + k % 2; };
    const auto stored = [&](int i, int j, int e) { return float(widen(convert_to<D>(sum[i / 2][j][i % 2 * 2 + e]))); };
    // The sums of the columns over a line. A thread has every eighth row of it, and lanes four apart hold the same
    // columns. `value(i, j, e)` is the sum over the thread's four rows, beginning with eighth i.
    const auto for_each_line = [&](float* to, auto value) {
        POLDER_UNROLL
        for (int part = 0; part < Tile::WARP_ROWS / LINE_ROWS; ++part) {
            float values[COUNT];
            POLDER_UNROLL
            for (int k = 0; k < COUNT; ++k) values[k] = value(part * PARTS, k / 2, k % 2);
            const int first = total_over_lanes<COUNT, 4, 8, 16>(values);
            if (COUNT < 8 && lane >= 16) continue;  // the lower lanes have the same totals
            POLDER_UNROLL
            for (int k = 0; k < (COUNT > 8 ? COUNT / 8 : 1); ++k) {
                to[(line + part) * Tile::COLUMNS + column_of(first + k)] = values[k];
            }
        }
    };
    const auto over_lines = [&](const float* of, int column) {
        float total = of[column];
        POLDER_UNROLL
        for (int other = 1; other < LINES; ++other) total += of[other * Tile::COLUMNS + column];
        return total;
    };
    // Rows beyond the end of the product are zero.
    for_each_line(sums, [&](int first, int j, int e) {
        float total = 0.0f;
        POLDER_UNROLL
        for (int i = first; i < first + PARTS; ++i) total += stored(i, j, e);
        return total;
    });
    __syncthreads();
    const float share = 1.0f / float(rows);
    for_each_line(m2s, [&](int first, int j, int e) {
        const float mean = rounded_product(over_lines(sums, column_of(2 * j + e)), share);
        float total = 0.0f;
        POLDER_UNROLL
        for (int i = first; i < first + PARTS; ++i) {
            const float deviation = stored(i, j, e) - mean;
            if (Tile::warp_row() + i * 8 + lane / 4 < rows) total = multiply_add(deviation, deviation, total);
        }
        return total;
    });
    __syncthreads();
    for (int column = int(threadIdx.x); column < Tile::COLUMNS; column += Tile::THREADS) {
        if (first_column + column >= columns) continue;
        float* to = moments + (int64_t(first_column + column) * tiles + tile) * 2;
        to[0] = rounded_product(over_lines(sums, column), share);
        to[1] = over_lines(m2s, column);
    }
}

// ---- A gradient that continues into batch norm ----------------------------------------------------------------------

/// Shared memory of a block that ends here: batch norm's parameters and statistics of each column in the forward, and
/// the lines' sums.
template <class Tile>
struct NormShared {
    static constexpr int LINES = Tile::ROWS / LINE_ROWS;
    float gamma[Tile::COLUMNS], beta[Tile::COLUMNS], mean[Tile::COLUMNS], inv_std[Tile::COLUMNS];
    float dz[LINES][Tile::COLUMNS], dz_x[LINES][Tile::COLUMNS];
};

/// Writes dz, the result where the relu passed and zero elsewhere. Leaves the sums of dz, as it is stored, and of dz (x
/// - mean) over each line, per column. `offset_at(row)` is the offset of a row of the tile in dz, x and y; -1 beyond
/// the end.
template <class Tile, class D, class OffsetAt>
__device__ __forceinline__ void write_masked(const typename Tile::Accumulators& sum, const BatchNormSumsArgs<D>& a,
                                             NormShared<Tile>& shared, D* out, int first_column, bool accumulate,
                                             OffsetAt offset_at) {
    typedef Chunks<Tile, D> Chunks;
    typedef Scalars<float, 8> Group;
    constexpr int PARTS = Tile::WARP_ROWS / 16;
    const int lane = int(threadIdx.x) % 32, columns = int(a.rows.channels), line = Tile::warp_row() / LINE_ROWS;
    const Upstream<D> upstream{nullptr, nullptr, nullptr, shared.gamma, shared.beta, shared.mean, shared.inv_std};
    int offsets[PARTS][2];
    POLDER_UNROLL
    for (int i = 0; i < PARTS; ++i) {
        POLDER_UNROLL
        for (int lower = 0; lower < 2; ++lower) offsets[i][lower] = offset_at(Chunks::row(i, lower));
    }
    const auto row_at = [&](int i, int lower) { return offsets[i][lower] < 0 ? nullptr : out + offsets[i][lower]; };
    POLDER_UNROLL
    for (int j = 0; j < Tile::WARP_COLUMNS / 16; ++j) {
        const int column = first_column + Chunks::column(j);
        const Masked<Group, kMaskRecompute> masked(upstream, uint32_t(Chunks::column(j)));
        float totals[16] = {};  // of dz, and of dz (x - mean)
        POLDER_UNROLL
        for (int i = 0; i < PARTS; ++i) {
            const Pack<D, 8> chunk = Chunks::chunk(sum, i, j, first_column, columns, accumulate, row_at);
            const int offset = lane % 2 == 0 ? offsets[i][0] : offsets[i][1];
            if (offset >= 0 && column < columns) {
                const uint64_t place = uint64_t(offset) + uint64_t(column);
                const Group x = Group::load(a.upstream.x + place);
                Group dz;
                POLDER_UNROLL
                for (int e = 0; e < 8; ++e) dz.v[e] = widen(chunk.v[e]);
                if (a.mask == kMaskOutput) dz = masked.passed(Group::load(a.upstream.y + place), dz);
                else if (a.mask == kMaskRecompute) dz = masked.passed(masked.edge(upstream, place, x), dz);
                dz.store(out + place);
                POLDER_UNROLL
                for (int e = 0; e < 8; ++e) {
                    totals[e] += dz.v[e];
                    totals[8 + e] = multiply_add(dz.v[e], x.v[e] - masked.mean.v[e], totals[8 + e]);
                }
            }
            if (i * 16 % LINE_ROWS != LINE_ROWS - 16) continue;
            // The line is complete. Lanes that differ in all but bit 1 hold the same columns; each gets one of the
            // totals.
            const int number = total_over_lanes<16, 1, 4, 8, 16>(totals);
            auto& sums = number < 8 ? shared.dz : shared.dz_x;
            sums[line + i * 16 / LINE_ROWS][Chunks::column(j) + number % 8] = totals[0];
            POLDER_UNROLL
            for (float& total : totals) total = 0.0f;
        }
    }
}

/// The end of an input gradient whose result is dy of a batch norm. It writes dz instead, and the last block writes
/// dgamma and dbeta, as `batch_norm_sums` would do in a pass over x and dy. Blocks without a pixel call this too.
template <class Tile, class D, class OffsetAt>
__device__ __forceinline__ void write_for_batch_norm(const typename Tile::Accumulators& sum,
                                                     const BatchNormSumsArgs<D>& a, D* out, const Corner<Tile>& corner,
                                                     bool accumulate, OffsetAt offset_at) {
    POLDER_DYNAMIC_SHARED(NormShared<Tile>, shared);
    const uint32_t channels = a.rows.channels;
    static_assert(Tile::COLUMNS <= Tile::THREADS, "a thread for each column");
    if (int(threadIdx.x) < Tile::COLUMNS) {
        const int c = int(threadIdx.x);
        const uint32_t column = uint32_t(corner.column + c);
        const auto of = [&](const float* values) {
            return values != nullptr && column < channels ? values[column] : 0.0f;
        };
        shared->gamma[c] = of(a.upstream.gamma);
        shared->beta[c] = of(a.upstream.beta);
        shared->mean[c] = of(a.upstream.mean);
        shared->inv_std[c] = of(a.upstream.inv_std);
    }
    __syncthreads();
    write_masked(sum, a, *shared, out, corner.column, accumulate, offset_at);
    __syncthreads();
    const uint32_t across = (channels + Tile::COLUMNS - 1) / Tile::COLUMNS, down = gridDim.x / across;
    const uint32_t block = blockIdx.z * down + uint32_t(corner.row / Tile::ROWS), blocks = gridDim.z * down;
    // One thread for each column, so that the order of its sums is the same in every tile.
    const uint32_t c = threadIdx.x, column = uint32_t(corner.column) + c;
    const bool mine = c < uint32_t(Tile::COLUMNS) && column < channels;
    if (mine) {
        TwoSums all = {};
        POLDER_UNROLL
        for (int line = 0; line < NormShared<Tile>::LINES; ++line) {
            all = add(all, {{double(shared->dz[line][c]), double(shared->dz_x[line][c])}});
        }
        a.dz[uint64_t(block) * channels + column] = all.v[0];
        a.dz_x[uint64_t(block) * channels + column] = all.v[1];
    }
    const auto combine = [&](uint64_t first, uint32_t count, uint32_t step, auto write) {
        if (!mine) return;
        TwoSums all = {};
#pragma unroll 8
        for (uint32_t i = 0; i < count; ++i) {
            const uint64_t place = (first + uint64_t(i) * step) * channels + column;
            all = add(all, {{a.dz[place], a.dz_x[place]}});
        }
        write(column, all);
    };
    uint32_t* const tickets = a.tickets + uint32_t(corner.column / Tile::COLUMNS) * tickets_of_column(blocks, a.group);
    combine_by_last(a, tickets, block, blocks, combine);
}

// ---- The three passes -----------------------------------------------------------------------------------------------

/// y[n, i, j, o] = sum over taps and c of x[n, i * stride + tap row - padding, j * stride + tap column - padding, c] *
/// weight
template <class Tile, class P>
__device__ __forceinline__ void forward(const ConvArgs<Stored<P>>& a) {
    using T = Stored<P>;
    using Rows = Operand<P, Side::kLeft, Tile::ROWS, Tile::THREADS, true>;
    using Columns = Operand<P, Side::kRight, Tile::COLUMNS, Tile::THREADS, false>;
    const ConvShape& s = a.shape;
    const int pixels = s.batch * s.out_height * s.out_width;
    const Raster raster{a.divisors.out_width, a.divisors.out_height};
    const Corner<Tile> corner(s.out_channels);
    const int first_out = int(blockIdx.y) * s.out_channels;
    WindowRows<Rows, T> left(input_windows(a));
    POLDER_UNROLL
    for (int i = 0; i < Rows::COUNT; ++i) {
        const int number = corner.row + Rows::at(i);
        const Pixel pixel = raster.pixel(number);
        left.places[i] = number < pixels ? left.windows.place(pixel.image, pixel.row * s.stride - s.padding,
                                                              pixel.column * s.stride - s.padding)
                                         : left.windows.nowhere();
    }
    const int depth = left.windows.depth;
    const Matrix<Columns, T> right{a.right + first_out, a.wide_right != 0, s.out_channels, s.out_pitch, depth};
    typename Tile::Accumulators sum = {};
    multiply<Tile, P, Rows, Columns>(left, right, corner, 0, depth, sum);
    write<Tile, T>(sum, corner.column, s.out_channels, a.accumulate != 0, a.wide_out != 0, [&](int row) {
        return corner.row + row < pixels ? a.out + int64_t(corner.row + row) * s.out_pitch + first_out : nullptr;
    });
    if (a.moments == nullptr) return;
    const int rows = pixels - corner.row < Tile::ROWS ? pixels - corner.row : Tile::ROWS;
    const int tile = corner.row / Tile::ROWS, tiles = (pixels + Tile::ROWS - 1) / Tile::ROWS;
    write_moments<Tile, T>(sum, rows, corner.column, s.out_channels, tile, tiles,
                           a.moments + int64_t(first_out) * tiles * 2);
}

template <class T>
struct InputGradientArgs {
    ConvArgs<T> conv;
    BatchNormSumsArgs<T> norm;  // if its `tickets` are given, x is the output of this batch norm, and dx is masked
};

/// dx[n, i, j, c] = sum over o and the taps by which y depends on x[n, i, j, c] of dy * weight
template <class Tile, class P>
__device__ __forceinline__ void input_gradient(const InputGradientArgs<Stored<P>>& args) {
    using T = Stored<P>;
    const ConvArgs<T>& a = args.conv;
    using Rows = Operand<P, Side::kLeft, Tile::ROWS, Tile::THREADS, true>;
    using Columns = Operand<P, Side::kRight, Tile::COLUMNS, Tile::THREADS, true>;
    const ConvShape& s = a.shape;
    const int row_remainder = int(blockIdx.z) / s.stride, column_remainder = int(blockIdx.z) % s.stride;
    const ParityClass rows = parity_class(s, row_remainder, s.height);
    const ParityClass columns = parity_class(s, column_remainder, s.width);
    const int pixels = s.batch * rows.extent * columns.extent;
    const Corner<Tile> corner(s.in_channels);
    const bool normalized = sizeof(T) == 2 && args.norm.tickets != nullptr;
    if (corner.row >= pixels && !normalized) return;
    const Raster raster = class_raster(a.divisors, rows, columns);
    const int first_out = int(blockIdx.y) * s.out_channels;
    WindowRows<Rows, T> left(class_windows(a, rows, columns));
    POLDER_UNROLL
    for (int i = 0; i < Rows::COUNT; ++i) {
        const int number = corner.row + Rows::at(i);
        const Pixel pixel = raster.pixel(number);
        left.places[i] = number < pixels
                             ? left.windows.place(pixel.image, pixel.row + rows.first, pixel.column + columns.first)
                             : left.windows.nowhere();
    }
    const ClassMatrix<Columns, T> right(
        ClassWeights<T>(a.right + first_out, s, a.divisors, rows, columns, a.wide_right != 0));
    typename Tile::Accumulators sum = {};
    multiply<Tile, P, Rows, Columns>(left, right, corner, 0, corner.row < pixels ? left.windows.depth : 0, sum);
    // No tensor has 2^31 elements.
    const auto offset_at = [&](int row) {
        const int number = corner.row + row;
        if (number >= pixels) return -1;
        const Pixel pixel = raster.pixel(number);
        const int image_row = pixel.row * s.stride + row_remainder,
                  image_column = pixel.column * s.stride + column_remainder;
        return ((pixel.image * s.height + image_row) * s.width + image_column) * s.in_pitch;
    };
    if constexpr (sizeof(T) == 2) {
        if (normalized) return write_for_batch_norm<Tile>(sum, args.norm, a.out, corner, a.accumulate != 0, offset_at);
    }
    T* const out = a.out + int(blockIdx.y) * s.in_channels;
    write<Tile, T>(sum, corner.column, s.in_channels, a.accumulate != 0, a.wide_out != 0, [&](int row) {
        const int offset = offset_at(row);
        return offset < 0 ? nullptr : out + offset;
    });
}

/// Finishes the warp's sums if they are a complete weight gradient, and leaves the block's sums of squares, [group of
/// channels][row tiles][groups of kSquareColumns columns]. They are first summed over lines of rows, and then over the
/// lines in order, so that their bits do not depend on the tile. If a gradient is finite, sums beyond the end of the
/// product are zero.
template <class Tile>
__device__ __forceinline__ void finish_sums(typename Tile::Accumulators& sum, const FinishArgs& a,
                                            const Corner<Tile>& corner, int columns, int row_tiles) {
    constexpr int LINES = Tile::ROWS / LINE_ROWS, GROUPS = Tile::COLUMNS / kSquareColumns;
    constexpr int COUNT = Tile::WARP_COLUMNS / kSquareColumns, FRAGMENTS = LINE_ROWS / 16;
    POLDER_DYNAMIC_SHARED(double, shared);  // [LINES][GROUPS]
    const int lane = int(threadIdx.x) % 32, line = Tile::warp_row() / LINE_ROWS;
    const bool squared = a.squares != nullptr;
    Finished<float> finished(a);
    POLDER_UNROLL
    for (int part = 0; part < Tile::WARP_ROWS / LINE_ROWS; ++part) {
        double values[COUNT] = {};
        POLDER_UNROLL
        for (int i = part * FRAGMENTS; i < (part + 1) * FRAGMENTS; ++i) {
            POLDER_UNROLL
            for (int j = 0; j < Tile::WARP_COLUMNS / 8; ++j) {
                POLDER_UNROLL
                for (float& value : sum[i][j]) {
                    value = finished.value(value);
                    if (squared) values[j * 8 / kSquareColumns] += double(value) * double(value);
                }
            }
        }
        if (!squared) continue;
        const int group = total_over_lanes<COUNT, 1, 2, 4, 8, 16>(values);
        if (lane < COUNT) shared[(line + part) * GROUPS + Tile::warp_column() / kSquareColumns + group] = values[0];
    }
    finished.raise(a);
    if (!squared) return;
    __syncthreads();
    const int group = int(threadIdx.x), groups = (columns + kSquareColumns - 1) / kSquareColumns;
    const int first = corner.column / kSquareColumns;
    if (group >= GROUPS || first + group >= groups) return;
    double total = 0.0;
    POLDER_UNROLL
    for (int of = 0; of < LINES; ++of) total += shared[of * GROUPS + group];
    a.squares[(int64_t(blockIdx.y) * row_tiles + corner.row / Tile::ROWS) * groups + first + group] = total;
}

template <class T>
struct WeightGradientArgs {
    ConvArgs<T, float> conv;  // the result and its partial sums are f32 for all operands
    FinishArgs finish;        // if its `flag` is given, the gradient is finished: it has one part and is not added
};

/// out[split][tap][c][o] = sum over the split's pixels of x[pixel at the tap, c] * dy[pixel, o]
template <class Tile, class P>
__device__ __forceinline__ void weight_gradient(const WeightGradientArgs<Stored<P>>& args) {
    using T = Stored<P>;
    const ConvArgs<T, float>& a = args.conv;
    using Rows = Operand<P, Side::kLeft, Tile::ROWS, Tile::THREADS, false, true>;
    using Columns = Operand<P, Side::kRight, Tile::COLUMNS, Tile::THREADS, false>;
    const ConvShape& s = a.shape;
    const int pixels = s.batch * s.out_height * s.out_width;
    const int begin = min(int(blockIdx.z) * a.part_pixels, pixels), end = min(begin + a.part_pixels, pixels);
    const Corner<Tile> corner(s.out_channels);
    const int first_out = int(blockIdx.y) * s.out_channels;
    const WindowColumns<Rows, T> left(input_windows(a), a.divisors, s, corner.row, end);
    const Matrix<Columns, T> right{a.right + first_out, a.wide_right != 0, s.out_channels, s.out_pitch, end};
    typename Tile::Accumulators sum = {};
    multiply<Tile, P, Rows, Columns>(left, right, corner, begin, end, sum);
    const int rows = left.windows.depth;
    if (args.finish.flag != nullptr) {
        finish_sums<Tile>(sum, args.finish, corner, s.out_channels, (rows + Tile::ROWS - 1) / Tile::ROWS);
    }
    float* out = a.out + int64_t(blockIdx.z) * rows * s.out_pitch + first_out;
    write<Tile, float>(sum, corner.column, s.out_channels, a.accumulate != 0, a.wide_out != 0, [&](int row) {
        return corner.row + row < rows ? out + int64_t(corner.row + row) * s.out_pitch : nullptr;
    });
}

// Tile16 ... Tile128; Tile64_BY_8 has eight warps, for products of few tiles.
#define POLDER_TILE(NAME, ...) using Tile##NAME = TensorTile<__VA_ARGS__>;
POLDER_CONV_TENSOR_TILES(POLDER_TILE)
#undef POLDER_TILE
#define POLDER_TILE(NAME, ...) using SplitTile##NAME = TensorTile<__VA_ARGS__>;
POLDER_CONV_SPLIT_TILES(POLDER_TILE)
#undef POLDER_TILE

}  // namespace

POLDER_KERNEL(conv_tensor_forward_16_f16, (forward<Tile16, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_32_f16, (forward<Tile32, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_64_f16, (forward<Tile64, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_64_by_8_f16, (forward<Tile64_BY_8, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_128_f16, (forward<Tile128, __half>), ConvArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_16_f16, (input_gradient<Tile16, __half>), InputGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_32_f16, (input_gradient<Tile32, __half>), InputGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_64_f16, (input_gradient<Tile64, __half>), InputGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_64_by_8_f16, (input_gradient<Tile64_BY_8, __half>), InputGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_input_gradient_128_f16, (input_gradient<Tile128, __half>), InputGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_weight_gradient_16_f16, (weight_gradient<Tile16, __half>), WeightGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_weight_gradient_32_f16, (weight_gradient<Tile32, __half>), WeightGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_weight_gradient_64_f16, (weight_gradient<Tile64, __half>), WeightGradientArgs<__half>)
POLDER_RESIDENT_KERNEL(conv_tensor_weight_gradient_64_by_8_f16, (weight_gradient<Tile64_BY_8, __half>),
                       WeightGradientArgs<__half>, 2)
POLDER_KERNEL(conv_tensor_weight_gradient_128_f16, (weight_gradient<Tile128, __half>), WeightGradientArgs<__half>)
POLDER_KERNEL(conv_tensor_forward_16_bf16, (forward<Tile16, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_32_bf16, (forward<Tile32, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_64_bf16, (forward<Tile64, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_64_by_8_bf16, (forward<Tile64_BY_8, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_128_bf16, (forward<Tile128, __nv_bfloat16>), ConvArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_16_bf16, (input_gradient<Tile16, __nv_bfloat16>),
              InputGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_32_bf16, (input_gradient<Tile32, __nv_bfloat16>),
              InputGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_64_bf16, (input_gradient<Tile64, __nv_bfloat16>),
              InputGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_64_by_8_bf16, (input_gradient<Tile64_BY_8, __nv_bfloat16>),
              InputGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_input_gradient_128_bf16, (input_gradient<Tile128, __nv_bfloat16>),
              InputGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_weight_gradient_16_bf16, (weight_gradient<Tile16, __nv_bfloat16>),
              WeightGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_weight_gradient_32_bf16, (weight_gradient<Tile32, __nv_bfloat16>),
              WeightGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_weight_gradient_64_bf16, (weight_gradient<Tile64, __nv_bfloat16>),
              WeightGradientArgs<__nv_bfloat16>)
POLDER_RESIDENT_KERNEL(conv_tensor_weight_gradient_64_by_8_bf16, (weight_gradient<Tile64_BY_8, __nv_bfloat16>),
                       WeightGradientArgs<__nv_bfloat16>, 2)
POLDER_KERNEL(conv_tensor_weight_gradient_128_bf16, (weight_gradient<Tile128, __nv_bfloat16>),
              WeightGradientArgs<__nv_bfloat16>)
POLDER_KERNEL(conv_tensor_forward_16_tf32, (forward<Tile16, float>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_32_tf32, (forward<Tile32, float>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_64_tf32, (forward<Tile64, float>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_64_by_8_tf32, (forward<Tile64_BY_8, float>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_128_tf32, (forward<Tile128, float>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_16_tf32, (input_gradient<Tile16, float>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_32_tf32, (input_gradient<Tile32, float>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_64_tf32, (input_gradient<Tile64, float>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_64_by_8_tf32, (input_gradient<Tile64_BY_8, float>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_128_tf32, (input_gradient<Tile128, float>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_16_tf32, (weight_gradient<Tile16, float>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_32_tf32, (weight_gradient<Tile32, float>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_64_tf32, (weight_gradient<Tile64, float>), WeightGradientArgs<float>)
POLDER_RESIDENT_KERNEL(conv_tensor_weight_gradient_64_by_8_tf32, (weight_gradient<Tile64_BY_8, float>),
                       WeightGradientArgs<float>, 2)
POLDER_KERNEL(conv_tensor_weight_gradient_128_tf32, (weight_gradient<Tile128, float>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_forward_16_bf16x3, (forward<SplitTile16, Bf16x3>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_32_bf16x3, (forward<SplitTile32, Bf16x3>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_64_bf16x3, (forward<SplitTile64, Bf16x3>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_128_bf16x3, (forward<SplitTile128, Bf16x3>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_16_bf16x3, (input_gradient<SplitTile16, Bf16x3>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_32_bf16x3, (input_gradient<SplitTile32, Bf16x3>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_64_bf16x3, (input_gradient<SplitTile64, Bf16x3>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_128_bf16x3, (input_gradient<SplitTile128, Bf16x3>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_16_bf16x3, (weight_gradient<SplitTile16, Bf16x3>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_32_bf16x3, (weight_gradient<SplitTile32, Bf16x3>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_64_bf16x3, (weight_gradient<SplitTile64, Bf16x3>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_128_bf16x3, (weight_gradient<SplitTile128, Bf16x3>),
              WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_forward_16_bf16x6, (forward<SplitTile16, Bf16x6>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_32_bf16x6, (forward<SplitTile32, Bf16x6>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_64_bf16x6, (forward<SplitTile64, Bf16x6>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_forward_128_bf16x6, (forward<SplitTile128, Bf16x6>), ConvArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_16_bf16x6, (input_gradient<SplitTile16, Bf16x6>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_32_bf16x6, (input_gradient<SplitTile32, Bf16x6>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_64_bf16x6, (input_gradient<SplitTile64, Bf16x6>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_input_gradient_128_bf16x6, (input_gradient<SplitTile128, Bf16x6>), InputGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_16_bf16x6, (weight_gradient<SplitTile16, Bf16x6>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_32_bf16x6, (weight_gradient<SplitTile32, Bf16x6>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_64_bf16x6, (weight_gradient<SplitTile64, Bf16x6>), WeightGradientArgs<float>)
POLDER_KERNEL(conv_tensor_weight_gradient_128_bf16x6, (weight_gradient<SplitTile128, Bf16x6>),
              WeightGradientArgs<float>)
