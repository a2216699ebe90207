// Kernels that test the host device: it runs CUDA's device language with CUDA's semantics, and reports behaviour that
// CUDA leaves undefined. They are never compiled for a GPU. In the comments, `in` and `out` are a kernel's `input` and
// `output`.
#include "../include/mma.cuh"
#include "../include/polder.cuh"

namespace {

__device__ uint64_t linear_block() {
    return blockIdx.x + uint64_t(gridDim.x) * (blockIdx.y + uint64_t(gridDim.y) * blockIdx.z);
}
__device__ unsigned linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
__device__ uint64_t block_threads() { return uint64_t(blockDim.x) * blockDim.y * blockDim.z; }
__device__ uint64_t global_thread() { return linear_block() * block_threads() + linear_thread(); }
__device__ uint64_t global_threads() { return block_threads() * gridDim.x * gridDim.y * gridDim.z; }

// out[12 i ..] = threadIdx, blockIdx, blockDim, gridDim of the i-th thread of the grid.
struct PositionArgs {
    uint32_t* output;
};
__device__ void position(const PositionArgs& a) {
    uint32_t* out = a.output + 12 * global_thread();
    out[0] = threadIdx.x, out[1] = threadIdx.y, out[2] = threadIdx.z;
    out[3] = blockIdx.x, out[4] = blockIdx.y, out[5] = blockIdx.z;
    out[6] = blockDim.x, out[7] = blockDim.y, out[8] = blockDim.z;
    out[9] = gridDim.x, out[10] = gridDim.y, out[11] = gridDim.z;
}

// out[i] = 2 in[i], for any grid and block.
struct GridStrideArgs {
    const float* input;
    float* output;
    uint64_t n;
};
__device__ void grid_stride(const GridStrideArgs& a) {
    for (uint64_t i = global_thread(); i < a.n; i += global_threads()) a.output[i] = 2.0f * a.input[i];
}

// ---- Warp operations: whole warps, one value per thread of the grid ------------------------------------------------

// With n threads: out[i], out[n + i], out[2n + i], out[3n + i] = the value that thread i gets by index (from lane
// `parameter`), up, down and xor (by `parameter`), in segments of `width` lanes.
template <class T>
struct ShuffleArgs {
    const T* input;
    T* output;
    uint32_t parameter;
    uint32_t width;
};
template <class T>
__device__ void shuffle(const ShuffleArgs<T>& a) {
    const uint64_t i = global_thread(), n = global_threads();
    const T value = a.input[i];
    a.output[i] = __shfl_sync(0xffffffffu, value, int(a.parameter), int(a.width));
    a.output[n + i] = __shfl_up_sync(0xffffffffu, value, a.parameter, int(a.width));
    a.output[2 * n + i] = __shfl_down_sync(0xffffffffu, value, a.parameter, int(a.width));
    a.output[3 * n + i] = __shfl_xor_sync(0xffffffffu, value, int(a.parameter), int(a.width));
}

// The two halves of a warp in different branches: out[2 i] = in[i ^ 1] in the lower half, in[i + 1] in the upper, whose
// last lane keeps its own. Then the warp as one: out[2 i + 1] = lanes with an odd out[2 i].
struct HalfWarpsArgs {
    const uint32_t* input;
    uint32_t* output;
};
__device__ void half_warps(const HalfWarpsArgs& a) {
    const uint64_t i = global_thread();
    uint32_t value = a.input[i];
    if (threadIdx.x % 32 < 16) {
        value = __shfl_xor_sync(0x0000ffffu, value, 1);
    } else {
        value = __shfl_down_sync(0xffff0000u, value, 1);
        __syncwarp(0xffff0000u);
    }
    a.output[2 * i] = value;
    a.output[2 * i + 1] = __ballot_sync(0xffffffffu, int(value & 1u));
}

// A shuffle from lanes that are not in its mask, in the lower half of a warp: out[i] = in[i + 8] where lane + 8 < 16,
// otherwise NaN (CUDA: undefined). The upper half writes zero.
struct OutsideMaskArgs {
    const float* input;
    float* output;
};
__device__ void outside_mask(const OutsideMaskArgs& a) {
    const uint64_t i = global_thread();
    a.output[i] = threadIdx.x % 32 < 16 ? __shfl_down_sync(0x0000ffffu, a.input[i], 8) : 0.0f;
}

// out[4 i ..] = ballot, any and all of "in[i] is odd" in the warp of thread i, and whether __activemask names thread i.
struct VoteArgs {
    const uint32_t* input;
    uint32_t* output;
};
__device__ void vote(const VoteArgs& a) {
    const uint64_t i = global_thread();
    const int odd = int(a.input[i] & 1u);
    a.output[4 * i] = __ballot_sync(0xffffffffu, odd);
    a.output[4 * i + 1] = uint32_t(__any_sync(0xffffffffu, odd));
    a.output[4 * i + 2] = uint32_t(__all_sync(0xffffffffu, odd));
    a.output[4 * i + 3] = (__activemask() >> (threadIdx.x % 32)) & 1u;
}

// out[9 i ..] = sum, minimum and maximum as signed numbers, the same as unsigned ones, and, or, xor over the warp.
struct WarpReduceArgs {
    const uint32_t* input;
    uint32_t* output;
};
__device__ void warp_reduce(const WarpReduceArgs& a) {
    const uint64_t i = global_thread();
    const unsigned mask = 0xffffffffu, value = a.input[i];
    uint32_t* out = a.output + 9 * i;
    out[0] = uint32_t(__reduce_add_sync(mask, int(value)));
    out[1] = uint32_t(__reduce_min_sync(mask, int(value)));
    out[2] = uint32_t(__reduce_max_sync(mask, int(value)));
    out[3] = __reduce_add_sync(mask, value);
    out[4] = __reduce_min_sync(mask, value);
    out[5] = __reduce_max_sync(mask, value);
    out[6] = __reduce_and_sync(mask, value);
    out[7] = __reduce_or_sync(mask, value);
    out[8] = __reduce_xor_sync(mask, value);
}

// The upper half of each warp exits. The lower half waits with the default mask and continues: out[i] = in[i ^ 1]
// there, passed on through shared memory. At most 256 threads in x.
struct ExitedSyncwarpArgs {
    const uint32_t* input;
    uint32_t* output;
};
__device__ void exited_syncwarp(const ExitedSyncwarpArgs& a) {
    __shared__ uint32_t shared[256];
    if (threadIdx.x % 32 >= 16) return;
    shared[threadIdx.x] = a.input[global_thread()];
    __syncwarp();
    a.output[global_thread()] = shared[threadIdx.x ^ 1u];
}

// ---- Tensor cores: whole warps, at most 256 threads in x ------------------------------------------------------------

// out[4 i ..] = the fragment of c + a * b, of the fragments a = in[10 i ..], b = in[10 i + 4 ..], c = in[10 i + 6 ..].
struct MmaArgs {
    const uint32_t* input;
    float* output;
};
template <class T>
__device__ void multiply_fragments(const MmaArgs& a) {
    const uint32_t* in = a.input + 10 * global_thread();
    const uint32_t left[4] = {in[0], in[1], in[2], in[3]}, right[2] = {in[4], in[5]};
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = __uint_as_float(in[6 + i]);
    mma<T>(sum, left, right);
    for (int i = 0; i < 4; ++i) a.output[4 * global_thread() + i] = sum[i];
}

// out[i] = in[i] rounded to TF32.
struct RoundArgs {
    const float* input;
    uint32_t* output;
    uint64_t n;
};
__device__ void round_to_tf32(const RoundArgs& a) {
    for (uint64_t i = global_thread(); i < a.n; i += global_threads()) a.output[i] = to_tf32(a.input[i]);
}

// out[4 i ..] = the result of ldmatrix in thread i, which gives the address of row in[4 i ..]. The rows are apart and
// not in order.
struct LdmatrixArgs {
    const uint4* input;
    uint4* output;
};
template <bool TRANSPOSED>
__device__ void load_matrices(const LdmatrixArgs& a) {
    alignas(16) __shared__ uint4 rows[512];
    uint4* row = &rows[2 * (threadIdx.x ^ 21u)];
    *row = a.input[global_thread()];
    __syncwarp();
    uint32_t matrices[4];
    ldmatrix<TRANSPOSED>(row, matrices);
    a.output[global_thread()] = {matrices[0], matrices[1], matrices[2], matrices[3]};
}

// Two copies by each thread, each in a group: of in[i], and of in[i] again if i is even, otherwise of nothing. out[5 i
// ..] = the first before and after the wait for it, the second at that time and after the wait for it, and the first of
// the neighbour.
struct AsyncArgs {
    const uint4* input;
    uint4* output;
};
__device__ void copy_asynchronously(const AsyncArgs& a) {
    alignas(16) __shared__ uint4 shared[2][256];
    const uint4* in = a.input + global_thread();
    uint4* out = a.output + 5 * global_thread();
    AsyncCopies copies;
    copies.copy<true>(&shared[0][threadIdx.x], in, true);
    copies.commit();
    copies.copy<false>(&shared[1][threadIdx.x], in, threadIdx.x % 2 == 0);
    copies.commit();
    out[0] = shared[0][threadIdx.x];
    copies.wait<1>();
    out[1] = shared[0][threadIdx.x], out[2] = shared[1][threadIdx.x];
    copies.wait<0>();
    out[3] = shared[1][threadIdx.x];
    __syncthreads();
    out[4] = shared[0][threadIdx.x ^ 1u];
}

// ---- Blocks: of 256 threads in x where shared arrays are static ----------------------------------------------------

// out[3 i ..] = how many threads of the block have in[i] != 0, whether all, whether any (as 0 or 1).
struct SyncCountArgs {
    const int32_t* input;
    int32_t* output;
};
__device__ void sync_count(const SyncCountArgs& a) {
    const uint64_t i = global_thread();
    a.output[3 * i] = __syncthreads_count(a.input[i]);
    a.output[3 * i + 1] = __syncthreads_and(a.input[i]) != 0;
    a.output[3 * i + 2] = __syncthreads_or(a.input[i]) != 0;
}

// out[block] = the sum of the block's 256 elements of in[0 .. n), as a tree: s[t] += s[t + 128], then 64, ... 1.
struct BlockSumArgs {
    const float* input;
    float* output;
    uint64_t n;
};
__device__ void block_sum_static(const BlockSumArgs& a) {
    __shared__ float shared[256];
    const uint64_t i = global_thread();
    shared[threadIdx.x] = i < a.n ? a.input[i] : 0.0f;
    for (unsigned stride = 128; stride > 0; stride /= 2) {
        __syncthreads();
        if (threadIdx.x < stride) shared[threadIdx.x] += shared[threadIdx.x + stride];
    }
    if (threadIdx.x == 0) a.output[blockIdx.x] = shared[0];
}

// The same tree, in dynamic shared memory of 4 bytes per thread, for any block of a power of two.
__device__ void block_sum_dynamic(const BlockSumArgs& a) {
    POLDER_DYNAMIC_SHARED(float, shared);
    const uint64_t i = global_thread();
    shared[threadIdx.x] = i < a.n ? a.input[i] : 0.0f;
    for (unsigned stride = blockDim.x / 2; stride > 0; stride /= 2) {
        __syncthreads();
        if (threadIdx.x < stride) shared[threadIdx.x] += shared[threadIdx.x + stride];
    }
    if (threadIdx.x == 0) a.output[blockIdx.x] = shared[0];
}

// By warps: xor shuffles over 16, 8, ... 1 in each, then the warps' sums in the first warp. Whole warps, at most
// 256 threads.
__device__ void block_sum_shuffle(const BlockSumArgs& a) {
    __shared__ float warp_sums[8];
    const uint64_t i = global_thread();
    float sum = i < a.n ? a.input[i] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < blockDim.x / 32 ? warp_sums[threadIdx.x] : 0.0f;
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x == 0) a.output[blockIdx.x] = sum;
}

// A race, which different orders of threads show: out[i] = 2 in[i] of the right neighbour (cyclic in the block), or
// zero if the neighbour has not yet written, because a barrier is missing. At most 256 threads in x.
struct RaceArgs {
    const uint32_t* input;
    uint32_t* output;
};
__device__ void race(const RaceArgs& a) {
    __shared__ uint32_t shared[256];
    shared[threadIdx.x] = 0;
    __syncthreads();
    shared[threadIdx.x] = 2 * a.input[global_thread()];
    a.output[global_thread()] = shared[(threadIdx.x + 1) % blockDim.x];
}

// out[i] = uninitialised dynamic shared memory (4 bytes per thread): NaN, in every block.
struct UninitialisedArgs {
    float* output;
};
__device__ void uninitialised(const UninitialisedArgs& a) {
    POLDER_DYNAMIC_SHARED(float, shared);
    a.output[global_thread()] = shared[threadIdx.x];
    __syncthreads();
    shared[threadIdx.x] = 1.0f;
}

// ---- Atomics -------------------------------------------------------------------------------------------------------

// From every thread i of n:
// i32:  [0] += i, [1] min= -i, [2] max= i, [3] -= 1, [4] += 1 by compare-and-swap
// u32:  [0] += 1, [1] &= ~(1 << i % 32), [2] |= 1 << i % 32, [3] ^= i, [4] += the number before an exchange by i + 1
// u64:  [0] += 2^32 + i, [1] max= i    f32: [0] += 1    f64: [0] += i
struct AtomicsArgs {
    int32_t* i32;
    uint32_t* u32;
    uint64_t* u64;
    float* f32;
    double* f64;
};
__device__ void atomics(const AtomicsArgs& a) {
    const uint64_t thread = global_thread();
    const int i = int(thread);
    const unsigned bit = 1u << (unsigned(i) % 32u);
    auto* u64 = reinterpret_cast<unsigned long long*>(a.u64);
    atomicAdd(&a.i32[0], i);
    atomicMin(&a.i32[1], -i);
    atomicMax(&a.i32[2], i);
    atomicSub(&a.i32[3], 1);
    int seen = a.i32[4], expected;
    do {
        expected = seen;
        seen = atomicCAS(&a.i32[4], expected, expected + 1);
    } while (seen != expected);
    atomicAdd(&a.u32[0], 1u);
    atomicAnd(&a.u32[1], ~bit);
    atomicOr(&a.u32[2], bit);
    atomicXor(&a.u32[3], unsigned(i));
    atomicAdd(&a.u32[4], atomicExch(&a.u32[5], unsigned(i) + 1u));
    atomicAdd(&u64[0], (1ull << 32) + thread);
    atomicMax(&u64[1], static_cast<unsigned long long>(thread));
    atomicAdd(a.f32, 1.0f);
    atomicAdd(a.f64, double(thread));
}

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

// Conversions of in[0 .. n), and back.
struct HalfArgs {
    const float* input;
    uint16_t* f16;
    uint16_t* bf16;
    float* from_f16;
    float* from_bf16;
    uint64_t n;
};
__device__ void half_conversions(const HalfArgs& a) {
    for (uint64_t i = global_thread(); i < a.n; i += global_threads()) {
        const __half f16 = __float2half_rn(a.input[i]);
        const __nv_bfloat16 bf16 = __float2bfloat16_rn(a.input[i]);
        a.f16[i] = __half_as_ushort(f16);
        a.bf16[i] = __bfloat16_as_ushort(bf16);
        a.from_f16[i] = __half2float(f16);
        a.from_bf16[i] = __bfloat162float(bf16);
    }
}

// out[10 i ..] of x = in[i]: rsqrtf, sinpif, cospif, fminf and fmaxf with 0.5, with NaN, fma of (x, x, 1), and whether
// x is finite, is NaN.
struct MathArgs {
    const float* input;
    float* output;
    uint64_t n;
};
__device__ void math(const MathArgs& a) {
    const float nan = __int_as_float(0x7fc00000);
    for (uint64_t i = global_thread(); i < a.n; i += global_threads()) {
        const float x = a.input[i];
        float* out = a.output + 10 * i;
        out[0] = rsqrtf(x);
        sincospif(x, &out[1], &out[2]);
        out[3] = fminf(x, 0.5f);
        out[4] = fmaxf(0.5f, x);
        out[5] = fminf(nan, x);
        out[6] = fmaxf(x, nan);
        out[7] = __fmaf_rn(x, x, 1.0f);
        out[8] = isfinite(x) ? 1.0f : 0.0f;
        out[9] = isnan(x) ? 1.0f : 0.0f;
    }
}

// out[5 i ..] of x = in[i]: __popc, __clz, __ffs, __umulhi with 0x9e3779b9, __float_as_uint of __uint_as_float.
struct BitsArgs {
    const uint32_t* input;
    uint32_t* output;
    uint64_t n;
};
__device__ void bits(const BitsArgs& a) {
    for (uint64_t i = global_thread(); i < a.n; i += global_threads()) {
        const uint32_t x = a.input[i];
        uint32_t* out = a.output + 5 * i;
        out[0] = uint32_t(__popc(x));
        out[1] = uint32_t(__clz(int(x)));
        out[2] = uint32_t(__ffs(int(x)));
        out[3] = __umulhi(x, 0x9e3779b9u);
        out[4] = __float_as_uint(__uint_as_float(x));
    }
}

// ---- Faults --------------------------------------------------------------------------------------------------------

// The rule that each number breaks; 0 breaks none. out[i] = 1 for every thread i that reaches its end. Only block
// `block` (of the flattened grid) breaks a rule. Blocks have at least 64 threads in x, except for kAbsent.
enum Wrong : uint32_t {
    kNothing = 0,
    kBarrierExit = 1,        // barrier fault: threads 40 and above exit, the others wait at __syncthreads
    kBarrierKinds = 2,       // barrier fault: odd threads wait at __syncthreads_count, even ones at __syncthreads
    kBarrierAndShuffle = 3,  // barrier fault: lanes 16 and above of each warp wait at a barrier, the others for them
    kAbsent = 4,             // warp fault: a full mask in a warp that is not (blocks of 31, 63, ... or 1 thread)
    kExited = 5,             // warp fault: thread 5 exits, its warp shuffles with a full mask
    kNotInMask = 6,          // warp fault: lane 3 shuffles with the mask 0xf7
    kMasks = 7,              // warp fault: odd lanes shuffle with another mask than even ones
    kOperations = 8,         // warp fault: odd lanes shuffle up, even ones down
    kWidth = 9,              // warp fault: a width of 12
};
struct FaultArgs {
    uint32_t* output;
    uint64_t block;
    uint32_t which;
};
__device__ void fault(const FaultArgs& a) {
    const unsigned thread = threadIdx.x, lane = thread % 32, full = 0xffffffffu;
    switch (linear_block() == a.block ? a.which : uint32_t(kNothing)) {
        case kBarrierExit:
            if (thread >= 40) break;
            __syncthreads();
            break;
        case kBarrierKinds:
            if (thread % 2 != 0) {
                __syncthreads_count(1);
            } else {
                __syncthreads();
            }
            break;
        case kBarrierAndShuffle:
            if (lane >= 16) __syncthreads();
            __shfl_sync(full, lane, 0);
            break;
        case kAbsent: __shfl_xor_sync(full, lane, 1); break;
        case kExited:
            if (thread == 5) return;
            __ballot_sync(full, 1);
            break;
        case kNotInMask:
            if (lane < 8) __shfl_sync(lane == 3 ? 0xf7u : 0xffu, lane, 0);
            break;
        case kMasks: __shfl_sync(lane % 2 != 0 ? full : 0x55555555u, lane, 0); break;
        case kOperations:
            if (lane % 2 != 0) {
                __shfl_up_sync(full, lane, 1);
            } else {
                __shfl_down_sync(full, lane, 1);
            }
            break;
        case kWidth: __shfl_sync(full, lane, 0, 12); break;
        default: break;
    }
    a.output[global_thread()] = 1;
}

// Calls itself `depth` times, with a frame of at least 1 KiB each. In blocks of several threads, whose stacks are those
// of fibers, enough calls end the process with status 134 and a line on stderr. Otherwise out[i] = depth.
struct StackOverflowArgs {
    uint32_t* output;
    uint32_t depth;
};
__device__ __attribute__((noinline)) uint32_t descend(uint32_t depth) {
    volatile uint32_t frame[256];
    frame[depth % 256] = depth;
    if (depth == 0) return 0;
    const uint32_t below = descend(depth - 1);
    return below + (frame[depth % 256] == depth ? 1u : 0u);
}
__device__ void stack_overflow(const StackOverflowArgs& a) { a.output[global_thread()] = descend(a.depth); }

}  // namespace

POLDER_HOST_KERNEL(selftest_position, position, PositionArgs)
POLDER_HOST_KERNEL(selftest_grid_stride, grid_stride, GridStrideArgs)
POLDER_HOST_KERNEL(selftest_shuffle_i32, shuffle<int>, ShuffleArgs<int>)
POLDER_HOST_KERNEL(selftest_shuffle_u64, shuffle<unsigned long long>, ShuffleArgs<unsigned long long>)
POLDER_HOST_KERNEL(selftest_shuffle_f32, shuffle<float>, ShuffleArgs<float>)
POLDER_HOST_KERNEL(selftest_shuffle_f64, shuffle<double>, ShuffleArgs<double>)
POLDER_HOST_KERNEL(selftest_shuffle_f16, shuffle<__half>, ShuffleArgs<__half>)
POLDER_HOST_KERNEL(selftest_shuffle_bf16, shuffle<__nv_bfloat16>, ShuffleArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(selftest_half_warps, half_warps, HalfWarpsArgs)
POLDER_HOST_KERNEL(selftest_outside_mask, outside_mask, OutsideMaskArgs)
POLDER_HOST_KERNEL(selftest_vote, vote, VoteArgs)
POLDER_HOST_KERNEL(selftest_warp_reduce, warp_reduce, WarpReduceArgs)
POLDER_HOST_KERNEL(selftest_exited_syncwarp, exited_syncwarp, ExitedSyncwarpArgs)
POLDER_HOST_KERNEL(selftest_mma_f16, multiply_fragments<__half>, MmaArgs)
POLDER_HOST_KERNEL(selftest_mma_bf16, multiply_fragments<__nv_bfloat16>, MmaArgs)
POLDER_HOST_KERNEL(selftest_mma_tf32, multiply_fragments<float>, MmaArgs)
POLDER_HOST_KERNEL(selftest_round_to_tf32, round_to_tf32, RoundArgs)
POLDER_HOST_KERNEL(selftest_ldmatrix, load_matrices<false>, LdmatrixArgs)
POLDER_HOST_KERNEL(selftest_ldmatrix_transposed, load_matrices<true>, LdmatrixArgs)
POLDER_HOST_KERNEL(selftest_async_copies, copy_asynchronously, AsyncArgs)
POLDER_HOST_KERNEL(selftest_sync_count, sync_count, SyncCountArgs)
POLDER_HOST_KERNEL(selftest_block_sum_static, block_sum_static, BlockSumArgs)
POLDER_HOST_KERNEL(selftest_block_sum_dynamic, block_sum_dynamic, BlockSumArgs)
POLDER_HOST_KERNEL(selftest_block_sum_shuffle, block_sum_shuffle, BlockSumArgs)
POLDER_HOST_KERNEL(selftest_race, race, RaceArgs)
POLDER_HOST_KERNEL(selftest_uninitialised, uninitialised, UninitialisedArgs)
POLDER_HOST_KERNEL(selftest_atomics, atomics, AtomicsArgs)
POLDER_HOST_KERNEL(selftest_half_conversions, half_conversions, HalfArgs)
POLDER_HOST_KERNEL(selftest_math, math, MathArgs)
POLDER_HOST_KERNEL(selftest_bits, bits, BitsArgs)
POLDER_HOST_KERNEL(selftest_fault, fault, FaultArgs)
POLDER_HOST_KERNEL(selftest_stack_overflow, stack_overflow, StackOverflowArgs)
