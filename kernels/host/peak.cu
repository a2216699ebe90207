// The CPU's peak rates, against which kernels are measured: f32 multiply-adds, and products of bf16 tiles by the matrix
// unit. Both work on registers alone.
#include "split.cuh"

namespace {

struct PeakArgs {
    float* out;               // [blocks], only so that the compiler keeps the work
    uint64_t* multiply_adds;  // [blocks], how many a block did
    float factor;
    float addend;
    uint64_t rounds;
};

/// Sums enough for two multiply-adds at a time, whose results take four cycles.
constexpr int kChains = 12;

__device__ void vector_peak(const PeakArgs& a) {
    typedef Vector<float>::type V;
    const V factor = a.factor + V{}, addend = a.addend + V{};
    V sum[kChains];
    // Equal sums would be computed once.
    for (int i = 0; i < kChains; ++i) sum[i] = float(i) + V{};
    for (uint64_t round = 0; round < a.rounds; ++round) {
#pragma GCC unroll 12
        for (V& lanes : sum) lanes = lanes * factor + addend;
    }
    V total{};
    for (const V& lanes : sum) total += lanes;
    a.out[blockIdx.x] = total[0];
    a.multiply_adds[blockIdx.x] = a.rounds * kChains * Vector<float>::lanes;
}

__device__ void matrix_peak(const PeakArgs& a) {
    constexpr int M = 2, N = 2;
    const uint16_t tile[kTile] = {};
    float sum[kSide * kSide];
    const uint16_t* const operands[2] = {tile, tile};
    const MatrixUnit unit(kSide);
    TileSums<M, N> sums(unit, operands, kDepth, operands);
    sums.clear();
    sums.load_left(0);
    sums.load_right(0);
    for (uint64_t round = 0; round < a.rounds; ++round) sums.multiply();
    sums.store_sum(0, sum, kSide);
    a.out[blockIdx.x] = sum[0];
    a.multiply_adds[blockIdx.x] = a.rounds * M * N * kSide * kSide * kDepth;
}

}  // namespace

POLDER_HOST_KERNEL(peak_vector, vector_peak, PeakArgs)
POLDER_HOST_KERNEL(peak_matrix, matrix_peak, PeakArgs)
