// Muon's step for the matrices among the weights: momentum, orthogonalisation and update. Each launch takes all
// matrices of a network, tile by tile.
//
// Five Newton-Schulz steps X <- X (a I + b G + c G^2), G = X^T X, orthogonalise X. Here X itself is multiplied only
// twice. All G, and all P = a I + b G + c G^2, are polynomials of the first G. So they are symmetric, they commute, the
// next G is P G P, and the result is X P_1 P_2 P_3 P_4 P_5. Only the first G and the last product are as long as X;
// all others are squares of its smaller side, and of these the upper triangle is enough.
//
// Every product is A^T B with the depth along the rows of both factors, because squares are symmetric and X is stored
// twice, once transposed.
#include "include/polder.cuh"

#include "include/combination.cuh"
#include "include/reduce.cuh"
#include "include/update.cuh"

#if defined(POLDER_HOST)
// Fused multiply-adds, if the instruction set has them.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector is passed to a function that is not inlined
#endif
#endif

namespace {

/// A matrix among the weights, row by row.
struct MuonMatrix {
    uint64_t place;    // its first element in the weights
    uint64_t scratch;  // in `x` and `transposed`
    uint64_t square;   // in vectors of squares
    uint32_t rows, columns;
    uint32_t first_partial, partials;  // its sums of squares
};

__device__ __forceinline__ bool is_tall(const MuonMatrix& matrix) { return matrix.rows >= matrix.columns; }
/// The smaller side, which is that of its squares.
__device__ __forceinline__ uint32_t side_of(const MuonMatrix& matrix) {
    return is_tall(matrix) ? matrix.columns : matrix.rows;
}
/// The larger side.
__device__ __forceinline__ uint32_t length_of(const MuonMatrix& matrix) {
    return is_tall(matrix) ? matrix.rows : matrix.columns;
}

/// A tile of a matrix or of a product: its first row and column.
struct MuonTile {
    uint32_t matrix, row, column;
};

__device__ __forceinline__ uint32_t at_most(uint32_t n, uint32_t limit) { return n < limit ? n : limit; }

// ---- Momentum ------------------------------------------------------------------------------------------------------

template <class T>
struct MuonMomentumArgs {
    const MuonMatrix* matrices;
    const MuonTile* tiles;
    CombinationArgs<T> combination;
    T* m;
    T* x;
    T* transposed;
    double* partials;  // of the first tile
    const uint32_t* skip;
    double momentum;
};

/// Calls f(row, column) for each element of a tile; neighbouring threads take neighbouring columns.
template <class F>
__device__ __forceinline__ void for_each_in_tile(uint32_t rows, uint32_t columns, F f) {
#if defined(POLDER_HOST)
    if (block_threads() == 1) {
        for (uint32_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
            for (uint32_t c = 0; c < columns; ++c) f(r, c);
        }
        return;
    }
#endif
    const uint32_t c = threadIdx.x % kMuonCopyTile;
    for (uint32_t r = threadIdx.x / kMuonCopyTile; r < rows; r += kBlockThreads / kMuonCopyTile) {
        if (c < columns) f(r, c);
    }
}

/// g = sum c_k g_k; m = mu m + (1 - mu) g; x = (1 - mu) g + mu m, its transpose, and the sums of squares of its tiles
template <class T, int N>
__device__ void muon_momentum(const MuonMomentumArgs<T>& a) {
    if (*a.skip != 0) return;
    __shared__ T stage[kMuonCopyTile][kMuonCopyTile + 1];
    const MuonTile tile = a.tiles[blockIdx.x];
    const MuonMatrix matrix = a.matrices[tile.matrix];
    const uint32_t rows = at_most(matrix.rows - tile.row, kMuonCopyTile),
                   columns = at_most(matrix.columns - tile.column, kMuonCopyTile);
    const Combined<T, N> gradient(a.combination);
    const T kept = T(a.momentum), added = T(1.0 - a.momentum);
    const uint64_t first = uint64_t(tile.row) * matrix.columns + tile.column;
    T* const m = a.m + matrix.place + first;
    T* const x = a.x + matrix.scratch + first;
    for_each_in_tile(rows, columns, [&](uint32_t r, uint32_t c) {
        const uint64_t i = uint64_t(r) * matrix.columns + c;
        const T g = added * gradient.template at<1>(matrix.place + first + i).v[0];
        const T average = kept * m[i] + g;
        m[i] = average;
        x[i] = stage[r][c] = g + kept * average;
    });
    __syncthreads();
    T* const transposed = a.transposed + matrix.scratch + uint64_t(tile.column) * matrix.rows + tile.row;
    Sums<1> sums = {};
    const auto square = [](T value) -> Sums<1> { return {{double(value) * double(value)}}; };
    for_each_in_tile(columns, rows, [&](uint32_t c, uint32_t r) {
        transposed[uint64_t(c) * matrix.rows + r] = stage[r][c];
        if (block_threads() > 1) sums.add(square(stage[r][c]));
    });
    if (block_threads() == 1) {
        for (uint32_t r = 0; r < rows; ++r) {
            sums.add(serial_sums<1>(0, columns, [&](uint64_t c) { return square(stage[r][c]); }));
        }
    }
    sums = block_sum(sums);
    if (thread_in_block() == 0) a.partials[blockIdx.x] = sums.v[0];
}

/// The reciprocal of the matrix's norm, which counts as at least 1e-7.
__device__ __forceinline__ double inverse_norm(const MuonMatrix& matrix, const double* partials) {
    Sums<1> squares = {};
    for (uint32_t i = thread_in_block(); i < matrix.partials; i += block_threads()) {
        squares.add({{partials[matrix.first_partial + i]}});
    }
    const double all = block_sum(squares).v[0];
    return once_per_block([=] {
        const double norm = sqrt(all);
        return 1.0 / (norm < 1e-7 ? 1e-7 : norm);
    });
}

// ---- Products ------------------------------------------------------------------------------------------------------

/// A factor of a tile's product: element (k, i) is at first[k * pitch + i].
template <class T>
struct Factor {
    const T* first;
    uint64_t pitch;
};

#if defined(POLDER_HOST)
/// 32 bytes: a register of AVX2, two of narrower instruction sets.
template <class T>
struct Lanes {
    typedef T type __attribute__((vector_size(32)));
    static constexpr uint32_t count = 32 / sizeof(T);
};

/// Two registers of columns: with kMuonStrip rows their sums, two columns and a broadcast take 15 of 16 registers.
template <class T>
constexpr uint32_t kPanelColumns = 2 * Lanes<T>::count;

/// sums = (add ? sums : 0) + a strip of the left factor times a panel of the right one
template <class T>
__attribute__((noinline)) void multiply_strip(const T* __restrict__ strip, const T* __restrict__ panel, uint32_t depth,
                                              T* __restrict__ sums, bool add) {
    using V = typename Lanes<T>::type;
    V sum[kMuonStrip][2];
#pragma GCC unroll 6
    for (uint32_t i = 0; i < kMuonStrip; ++i) {
        for (int v = 0; v < 2; ++v) {
            sum[i][v] = V{};
            if (add) memcpy(&sum[i][v], sums + i * kMuonCpuTile + v * Lanes<T>::count, sizeof(V));
        }
    }
    for (uint32_t k = 0; k < depth; ++k, strip += kMuonStrip, panel += kPanelColumns<T>) {
        V columns[2];
        memcpy(columns, panel, sizeof columns);
#pragma GCC unroll 6
        for (uint32_t i = 0; i < kMuonStrip; ++i) {
            for (int v = 0; v < 2; ++v) sum[i][v] += strip[i] * columns[v];
        }
    }
#pragma GCC unroll 6
    for (uint32_t i = 0; i < kMuonStrip; ++i) {
        for (int v = 0; v < 2; ++v) memcpy(sums + i * kMuonCpuTile + v * Lanes<T>::count, &sum[i][v], sizeof(V));
    }
}

/// Some rows of a factor in pieces of WIDTH columns, one piece after the other, with zeros beyond the last column.
template <uint32_t WIDTH, class T>
__forceinline__ void pack_pieces(const Factor<T>& factor, uint32_t first, uint32_t depth, uint32_t columns, T* out) {
    const T* from = factor.first + first * factor.pitch;
    for (uint32_t k = 0; k < depth; ++k, from += factor.pitch, out += WIDTH) {
        T* to = out;
        uint32_t c = 0;
        for (; c + WIDTH <= columns; c += WIDTH, to += kMuonDepth * WIDTH) memcpy(to, from + c, WIDTH * sizeof(T));
        if (c == columns) continue;
        for (uint32_t i = 0; i < WIDTH; ++i) to[i] = c + i < columns ? from[c + i] : T(0);
    }
}

/// The product by one thread: both factors are packed, kMuonDepth rows at a time, and multiplied in register tiles.
template <class T, class F>
__forceinline__ void multiply_serially(const Factor<T>& left, const Factor<T>& right, uint32_t depth, uint32_t rows,
                                       uint32_t columns, bool upper, F sink) {
    constexpr uint32_t kPanel = kPanelColumns<T>, kRows = (kMuonCpuTile + kMuonStrip - 1) / kMuonStrip * kMuonStrip;
    static_assert(kMuonWork == (kRows + kMuonCpuTile) * kMuonDepth + kRows * kMuonCpuTile, "the packed factors, sums");
    POLDER_DYNAMIC_SHARED(T, strips);
    T* const panels = strips + kRows * kMuonDepth;
    T* const sums = panels + kMuonCpuTile * kMuonDepth;
    for (uint32_t first = 0; first < depth; first += kMuonDepth) {
        const uint32_t count = at_most(depth - first, kMuonDepth);
        pack_pieces<kMuonStrip>(left, first, count, rows, strips);
        pack_pieces<kPanel>(right, first, count, columns, panels);
        for (uint32_t c = 0; c < columns; c += kPanel) {
            // Of the upper triangle, register tiles below the diagonal are left out.
            for (uint32_t r = 0; r < rows && !(upper && r >= c + kPanel); r += kMuonStrip) {
                multiply_strip(strips + r * kMuonDepth, panels + c * kMuonDepth, count, sums + r * kMuonCpuTile + c,
                               first > 0);
            }
        }
    }
    for (uint32_t r = 0; r < rows; ++r) {
        for (uint32_t c = upper ? r : 0; c < columns; ++c) sink(r, c, sums[r * kMuonCpuTile + c]);
    }
}
#endif

/// Calls sink(i, j, sum) with the sums over k < depth of left(k, i) right(k, j): for each i < rows and j < columns, or,
/// of the upper triangle, at least for each i <= j.
template <class T, class F>
__device__ __forceinline__ void multiply(const Factor<T>& left, const Factor<T>& right, uint32_t depth, uint32_t rows,
                                         uint32_t columns, [[maybe_unused]] bool upper, F sink) {
#if defined(POLDER_HOST)
    if (block_threads() == 1) {
        multiply_serially(left, right, depth, rows, columns, upper, sink);
        return;
    }
#endif
    // A thread has four rows, one after another, and every 16th column.
    constexpr uint32_t kStage = 16;
    __shared__ T a[kStage][kMuonGpuTile];
    __shared__ T b[kStage][kMuonGpuTile];
    const uint32_t thread = threadIdx.x, column = thread % 16, row = thread / 16 * 4;
    T sums[4][4] = {};
    for (uint32_t first = 0; first < depth; first += kStage) {
        POLDER_UNROLL
        for (uint32_t e = thread; e < kStage * kMuonGpuTile; e += kBlockThreads) {
            const uint32_t k = e / kMuonGpuTile, i = e % kMuonGpuTile;
            const bool inside = first + k < depth;
            a[k][i] = inside && i < rows ? left.first[(first + k) * left.pitch + i] : T(0);
            b[k][i] = inside && i < columns ? right.first[(first + k) * right.pitch + i] : T(0);
        }
        __syncthreads();
        POLDER_UNROLL
        for (uint32_t k = 0; k < kStage; ++k) {
            POLDER_UNROLL
            for (uint32_t i = 0; i < 4; ++i) {
                POLDER_UNROLL
                for (uint32_t j = 0; j < 4; ++j) sums[i][j] += a[k][row + i] * b[k][column + 16 * j];
            }
        }
        __syncthreads();
    }
    POLDER_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
        POLDER_UNROLL
        for (uint32_t j = 0; j < 4; ++j) {
            if (row + i < rows && column + 16 * j < columns) sink(row + i, column + 16 * j, sums[i][j]);
        }
    }
}

/// Rows and columns of a tile.
__device__ __forceinline__ uint32_t tile_size() { return block_threads() == 1 ? kMuonCpuTile : kMuonGpuTile; }

/// A tile of the upper triangle of a symmetric product. Calls write(index, diagonal, sum) for its elements and for
/// those on the other side of the diagonal.
template <class T, class F>
__device__ __forceinline__ void multiply_symmetric(const T* left, const T* right, uint32_t side, uint32_t depth,
                                                   const MuonTile& tile, F write) {
    const uint32_t rows = at_most(side - tile.row, tile_size()), columns = at_most(side - tile.column, tile_size());
    const bool upper = tile.row == tile.column;
    multiply(Factor<T>{left + tile.row, side}, Factor<T>{right + tile.column, side}, depth, rows, columns, upper,
             [&](uint32_t r, uint32_t c, T sum) {
                 const uint32_t i = tile.row + r, j = tile.column + c;
                 if (i > j) return;
                 write(uint64_t(i) * side + j, i == j, sum);
                 if (i < j) write(uint64_t(j) * side + i, false, sum);
             });
}

template <class T>
struct MuonGramArgs {
    const MuonMatrix* matrices;
    const MuonTile* tiles;
    const T* x;
    const T* transposed;
    T* out;
    const double* partials;
    const uint32_t* skip;
};

/// out = X^T X / |X|^2, or X X^T / |X|^2 if that is smaller
template <class T>
__device__ void muon_gram(const MuonGramArgs<T>& a) {
    if (*a.skip != 0) return;
    const MuonTile tile = a.tiles[blockIdx.x];
    const MuonMatrix matrix = a.matrices[tile.matrix];
    const double inverse = inverse_norm(matrix, a.partials);
    const T scale = T(inverse * inverse);
    const T* const x = (is_tall(matrix) ? a.x : a.transposed) + matrix.scratch;
    T* const out = a.out + matrix.square;
    multiply_symmetric(x, x, side_of(matrix), length_of(matrix), tile,
                       [=](uint64_t index, bool, T sum) { out[index] = scale * sum; });
}

template <class T>
struct MuonSquareArgs {
    const MuonMatrix* matrices;
    const MuonTile* tiles;
    const T* left[2];  // of the products blockIdx.y
    const T* right[2];
    T* out[2];
    const T* addend;
    const uint32_t* skip;
    double product, added, identity;
};

/// out = product left right + added addend + identity I, for symmetric matrices that commute
template <class T>
__device__ void muon_square(const MuonSquareArgs<T>& a) {
    if (*a.skip != 0) return;
    const MuonTile tile = a.tiles[blockIdx.x];
    const MuonMatrix matrix = a.matrices[tile.matrix];
    const bool second = blockIdx.y != 0;
    const T* const left = (second ? a.left[1] : a.left[0]) + matrix.square;
    const T* const right = (second ? a.right[1] : a.right[0]) + matrix.square;
    T* const out = (second ? a.out[1] : a.out[0]) + matrix.square;
    const T* const addend = a.addend + matrix.square;
    const T product = T(a.product), added = T(a.added), identity = T(a.identity);
    multiply_symmetric(left, right, side_of(matrix), side_of(matrix), tile, [=](uint64_t index, bool diagonal, T sum) {
        T value = product * sum;
        if (added != T(0)) value += added * addend[index];
        out[index] = diagonal ? value + identity : value;
    });
}

// ---- Update --------------------------------------------------------------------------------------------------------

template <class T>
struct MuonUpdateArgs {
    const MuonMatrix* matrices;
    const MuonTile* tiles;
    const T* x;
    const T* transposed;
    const T* square;
    T* w;
    const double* partials;
    const uint32_t* skip;
    const double* lr_on_device;  // null: `lr` is the rate, otherwise its factor
    uint64_t decay_len;          // elements of w from this one on are not decayed
    double lr, weight_decay;
};

/// w = (1 - eta lambda) w - eta 0.2 sqrt(max(rows, columns)) X S/|X|, or S X/|X| if X is wide
template <class T>
__device__ void muon_update(const MuonUpdateArgs<T>& a) {
    if (*a.skip != 0) return;
    const MuonTile tile = a.tiles[blockIdx.x];
    const MuonMatrix matrix = a.matrices[tile.matrix];
    const double lr = learning_rate(a);
    const double inverse = inverse_norm(matrix, a.partials);
    const T step = once_per_block([=] { return T(lr * 0.2 * sqrt(double(length_of(matrix))) * inverse); });
    const T decay = T(matrix.place < a.decay_len ? 1.0 - lr * a.weight_decay : 1.0);
    const uint32_t rows = at_most(matrix.rows - tile.row, tile_size()),
                   columns = at_most(matrix.columns - tile.column, tile_size());
    const T* const square = a.square + matrix.square;
    const Factor<T> left = is_tall(matrix) ? Factor<T>{a.transposed + matrix.scratch + tile.row, matrix.rows}
                                           : Factor<T>{square + tile.row, matrix.rows};
    const Factor<T> right = is_tall(matrix) ? Factor<T>{square + tile.column, matrix.columns}
                                            : Factor<T>{a.x + matrix.scratch + tile.column, matrix.columns};
    T* const w = a.w + matrix.place + uint64_t(tile.row) * matrix.columns + tile.column;
    multiply(left, right, side_of(matrix), rows, columns, false, [=](uint32_t r, uint32_t c, T sum) {
        const uint64_t index = uint64_t(r) * matrix.columns + c;
        w[index] = decay * w[index] - step * sum;
    });
}

}  // namespace

POLDER_KERNEL(muon_momentum1_f32, (muon_momentum<float, 1>), MuonMomentumArgs<float>)
POLDER_KERNEL(muon_momentum2_f32, (muon_momentum<float, 2>), MuonMomentumArgs<float>)
POLDER_KERNEL(muon_momentum3_f32, (muon_momentum<float, 3>), MuonMomentumArgs<float>)
POLDER_KERNEL(muon_momentum4_f32, (muon_momentum<float, 4>), MuonMomentumArgs<float>)
POLDER_HOST_KERNEL(muon_momentum1_f64, (muon_momentum<double, 1>), MuonMomentumArgs<double>)
POLDER_HOST_KERNEL(muon_momentum2_f64, (muon_momentum<double, 2>), MuonMomentumArgs<double>)
POLDER_HOST_KERNEL(muon_momentum3_f64, (muon_momentum<double, 3>), MuonMomentumArgs<double>)
POLDER_HOST_KERNEL(muon_momentum4_f64, (muon_momentum<double, 4>), MuonMomentumArgs<double>)
POLDER_KERNEL(muon_gram_f32, muon_gram<float>, MuonGramArgs<float>)
POLDER_HOST_KERNEL(muon_gram_f64, muon_gram<double>, MuonGramArgs<double>)
POLDER_KERNEL(muon_square_f32, muon_square<float>, MuonSquareArgs<float>)
POLDER_HOST_KERNEL(muon_square_f64, muon_square<double>, MuonSquareArgs<double>)
POLDER_KERNEL(muon_update_f32, muon_update<float>, MuonUpdateArgs<float>)
POLDER_HOST_KERNEL(muon_update_f64, muon_update<double>, MuonUpdateArgs<double>)
