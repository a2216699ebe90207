// The peak rate of `mma` on a GPU's tensor cores, against which the convolutions are measured. The operands stay in
// registers, so there is no traffic.
#include "include/mma.cuh"

namespace {

struct MmaPeakArgs {
    float* out;  // [threads], only so that the compiler keeps the work
    uint32_t rounds;
};

/// Independent products of a warp, enough to hide their latency.
constexpr int kMmaChains = 8;

/// Two numbers of f16 between 1 and 2 in size. On zeros a GPU draws less power and runs faster.
__device__ __forceinline__ uint32_t noise_of(uint32_t number) {
    return 0x3c003c00u | ((number * 0x9e3779b9u) & 0x83ff83ffu);
}

/// Each warp does `rounds` times kMmaChains products of 16 × 16 by 16 × 8 in f16.
__device__ void mma_peak(const MmaPeakArgs& a) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    float sums[kMmaChains][4] = {};
    uint32_t left[4], right[2];
    POLDER_UNROLL
    for (uint32_t i = 0; i < 4; ++i) left[i] = noise_of(6 * thread + i);
    POLDER_UNROLL
    for (uint32_t i = 0; i < 2; ++i) right[i] = noise_of(6 * thread + 4 + i);
    for (uint32_t round = 0; round < a.rounds; ++round) {
        POLDER_UNROLL
        for (int chain = 0; chain < kMmaChains; ++chain) mma<__half>(sums[chain], left, right);
    }
    float total = 0.0f;
    POLDER_UNROLL
    for (int chain = 0; chain < kMmaChains; ++chain) total += sums[chain][0];
    a.out[thread] = total;
}

}  // namespace

POLDER_KERNEL(mma_peak_f16, mma_peak, MmaPeakArgs)
