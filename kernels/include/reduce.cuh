// Deterministic reductions over a warp, a block and a grid.
//
// There are no float atomics: the order of every sum depends only on the launch shape, so the same inputs give the same
// bits on every run. A grid is reduced in two stages: each block writes one partial result, and a second kernel of one
// block combines them. In the CPU's shape (one thread per block) the block functions return their argument, and
// `serial_sums` does the work without warp operations.
#pragma once
#include "elementwise.cuh"

namespace {

struct Add {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return a + b;
    }
};

struct Maximum {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return max(a, b);
    }
};

/// K sums that are computed together, in double precision: a product of two floats is exact there, and nothing
/// overflows.
template <int K>
struct Sums {
    double v[K];

    __device__ __forceinline__ void add(const Sums& other) {
        POLDER_UNROLL
        for (int k = 0; k < K; ++k) v[k] += other.v[k];
    }
};

__device__ __forceinline__ unsigned block_threads() { return blockDim.x * blockDim.y * blockDim.z; }

/// The thread's number in its block. x varies fastest.
__device__ __forceinline__ unsigned thread_in_block() {
    return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

/// Combines the values of WIDTH neighbouring lanes (a power of two). Each of them gets the result, with the same bits.
/// All 32 lanes must call it.
template <class Op, int WIDTH = 32, class T>
__device__ __forceinline__ T warp_reduce(T value) {
    POLDER_UNROLL
    for (int distance = WIDTH / 2; distance > 0; distance /= 2) {
        value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    return warp_reduce<Add>(value);
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
    return warp_reduce<Maximum>(value);
}

constexpr int kMaxWarpsPerBlock = int(kBlockThreads) / 32;

/// Combines K values per thread over the block. Every thread gets the results, with the same bits. All threads of the
/// block must call it, and the block must have one thread, or a multiple of 32 up to kBlockThreads.
template <class Op, int K, class T>
__device__ __forceinline__ void block_reduce(T (&values)[K]) {
    if (block_threads() == 1) return;
    __shared__ T partial[kMaxWarpsPerBlock][K];
    const unsigned thread = thread_in_block(), warps = block_threads() / 32;
    POLDER_UNROLL
    for (int k = 0; k < K; ++k) {
        values[k] = warp_reduce<Op>(values[k]);
        if (thread % 32 == 0) partial[thread / 32][k] = values[k];
    }
    __syncthreads();
    POLDER_UNROLL
    for (int k = 0; k < K; ++k) {
        T result = partial[0][k];
        for (unsigned warp = 1; warp < warps; ++warp) result = Op::of(result, partial[warp][k]);
        values[k] = result;
    }
    __syncthreads();  // `partial` may be written again
}

template <int K>
__device__ __forceinline__ Sums<K> block_sum(Sums<K> sums) {
    block_reduce<Add>(sums.v);
    return sums;
}

/// The sum of f(i), a `Sums<K>`, over [begin, end) by one thread, for the CPU's shape. With 32 partial sums on every
/// instruction set, the compiler can vectorise it without reordering anything.
template <int K, class F>
__device__ __forceinline__ Sums<K> serial_sums(uint64_t begin, uint64_t end, F f) {
    constexpr int kLanes = 32;
    double lanes[K][kLanes] = {};
    uint64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const Sums<K> term = f(i + lane);
            for (int k = 0; k < K; ++k) lanes[k][lane] += term.v[k];
        }
    }
    Sums<K> sums = {};
    for (; i < end; ++i) sums.add(f(i));
    for (int k = 0; k < K; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) sums.v[k] += lanes[k][lane];
    }
    return sums;
}

/// The sum of f(x[i], y[i], ...) over this block's share of [0, n). Every thread of the block gets it. f takes one
/// element of each vector as a double and returns a `Sums<K>`.
template <int K, class F, class T, class... Rest>
__device__ __forceinline__ Sums<K> block_sums_of(uint64_t n, F f, const T* x, const Rest*... rest) {
#if defined(POLDER_HOST)
    if (block_threads() == 1) {
        const uint64_t begin = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;
        return serial_sums<K>(begin, end, [=](uint64_t i) { return f(double(x[i]), double(rest[i])...); });
    }
#endif
    constexpr int V = kPackBytes / sizeof(T);
    Sums<K> sums = {};
    const auto add = [&](const auto&... pack) {
        POLDER_UNROLL
        for (int v = 0; v < V; ++v) sums.add(f(double(pack.v[v])...));
    };
    const uint64_t packs = aligned16(x, rest...) ? n / V : 0;
    for_each_index(packs, [&](uint64_t p) { add(load<V>(x, p * V), load<V>(rest, p * V)...); });
    for_each_index(n - packs * V, [&](uint64_t tail) {
        const uint64_t i = packs * V + tail;
        sums.add(f(double(x[i]), double(rest[i])...));
    });
    return block_sum(sums);
}

/// The sum of f(i), a `Sums<K>`, over this block's share of [0, n). Every thread of the block gets it.
template <int K, class F>
__device__ __forceinline__ Sums<K> block_sums_of_index(uint64_t n, F f) {
#if defined(POLDER_HOST)
    if (block_threads() == 1) {
        return serial_sums<K>(n * blockIdx.x / gridDim.x, n * (blockIdx.x + 1) / gridDim.x, f);
    }
#endif
    Sums<K> sums = {};
    for_each_index(n, [&](uint64_t i) { sums.add(f(i)); });
    return block_sum(sums);
}

/// The first stage of a grid's reduction: block b leaves its sums in partials[b * K ...].
template <int K>
__device__ __forceinline__ void store_partials(double* partials, const Sums<K>& sums) {
    if (thread_in_block() == 0) {
        for (int k = 0; k < K; ++k) partials[uint64_t(blockIdx.x) * K + k] = sums.v[k];
    }
}

/// The second stage, by one block: the sums of all partials. Every thread of the block gets them.
template <int K>
__device__ __forceinline__ Sums<K> sum_partials(const double* partials, unsigned count) {
    Sums<K> sums = {};
    for (unsigned i = thread_in_block(); i < count; i += block_threads()) {
        POLDER_UNROLL
        for (int k = 0; k < K; ++k) sums.v[k] += partials[uint64_t(i) * K + k];
    }
    return block_sum(sums);
}

}  // namespace
