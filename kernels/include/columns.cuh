// Sums over the rows of a matrix, one per column: the gradients of biases and of a normalisation's parameters.
//
// There are two stages and no atomics: the rows are split into pieces whose number depends on the shape alone, each
// piece leaves one partial sum per column, and a second launch adds the pieces up in double.
#pragma once
#include "reduce.cuh"

namespace {

/// Columns that a block of a GPU sums at a time: one per lane.
constexpr uint32_t kColumnLanes = 32;

/// Calls `f(row, column, sums)`, which adds K terms, for every row of piece blockIdx.y, and leaves the sums in
/// partials[piece][k][column]. On a GPU a block has one column per lane, and its warps take turns at the rows. In the
/// CPU's shape a block takes all columns of its piece.
template <int K, class T, class F>
__device__ __forceinline__ void sum_columns(T* partials, uint32_t rows, uint32_t columns, const F& f) {
    const uint32_t piece = blockIdx.y, pieces = gridDim.y;
    const uint32_t share = rows / pieces + (rows % pieces != 0 ? 1 : 0);
    const uint32_t begin = min(piece * share, rows), end = min(begin + share, rows);
    T* const out = partials + uint64_t(piece) * K * columns;
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        for (uint32_t i = 0; i < K * columns; ++i) out[i] = T(0);
        for (uint32_t row = begin; row < end; ++row) {
#pragma GCC ivdep
            for (uint32_t c = 0; c < columns; ++c) {
                T sums[K] = {};
                f(row, c, sums);
                for (int k = 0; k < K; ++k) out[uint64_t(k) * columns + c] += sums[k];
            }
        }
        return;
    }
#endif
    constexpr uint32_t kWarps = kBlockThreads / kColumnLanes;
    __shared__ T parts[K][kWarps][kColumnLanes];
    const uint32_t lane = threadIdx.x % kColumnLanes, warp = threadIdx.x / kColumnLanes;
    const uint32_t c = blockIdx.x * kColumnLanes + lane;
    T sums[K] = {};
    if (c < columns) {
        for (uint32_t row = begin + warp; row < end; row += kWarps) f(row, c, sums);
    }
    POLDER_UNROLL
    for (int k = 0; k < K; ++k) parts[k][warp][lane] = sums[k];
    __syncthreads();
    if (warp != 0 || c >= columns) return;
    POLDER_UNROLL
    for (int k = 0; k < K; ++k) {
        T sum = 0;
        for (uint32_t w = 0; w < kWarps; ++w) sum += parts[k][w][lane];
        out[uint64_t(k) * columns + c] = sum;
    }
}

}  // namespace
