// What every kernel source includes first: the kernel convention, index ranges and wide loads.
//
// A kernel takes one plain struct by value and is registered with POLDER_KERNEL(name, function, args). build.rs writes
// the struct as Rust. The same source is compiled by nvcc for the GPU and by the host compiler for the CPU
// (kernels/host/simt.hpp gives it CUDA semantics there).
#pragma once
#include "constants.cuh"

#if defined(__CUDACC__)
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Asking for one resident block keeps ptxas from spilling registers for occupancy. POLDER_RESIDENT_KERNEL asks for
// BLOCKS resident blocks of kBlockThreads threads.
#define POLDER_KERNEL(NAME, FUNCTION, ARGS) POLDER_RESIDENT_KERNEL(NAME, FUNCTION, ARGS, 1)
#define POLDER_RESIDENT_KERNEL(NAME, FUNCTION, ARGS, BLOCKS)                                                      \
    extern "C" __global__ void __launch_bounds__(kBlockThreads, BLOCKS) NAME(const __grid_constant__ ARGS args) { \
        polder_begin();                                                                                           \
        FUNCTION(args);                                                                                           \
    }
#define POLDER_HOST_KERNEL(NAME, FUNCTION, ARGS)  // double precision and CPU-only shapes stay out of the fatbin
#define POLDER_DYNAMIC_SHARED(T, NAME)                              \
    extern __shared__ __align__(32) unsigned char polder_dynamic[]; \
    T* NAME = reinterpret_cast<T*>(polder_dynamic)
#define POLDER_UNROLL _Pragma("unroll")
#else
#define POLDER_HOST 1
#include "../host/simt.hpp"
#define POLDER_RESIDENT_KERNEL(NAME, FUNCTION, ARGS, BLOCKS) POLDER_KERNEL(NAME, FUNCTION, ARGS)
// gcc and clang unroll these short fixed loops themselves.
#define POLDER_UNROLL
#endif

namespace {

#if defined(__CUDACC__)
/// Every kernel begins with this. On Hopper, the blocks of a launch may start while the last blocks of the previous
/// kernel still run (programmatic dependent launch). They wait here until that kernel is done and its writes are
/// visible. After that, the next kernel may start in the same way. src/device/cuda.rs launches code like this only if
/// it was compiled for 9.0 or later, so that it waits.
__device__ __forceinline__ void polder_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

/// `V` neighbours. If V * sizeof(T) is 16, they are loaded and stored by one 16-byte access.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p, uint64_t i) {
    return *reinterpret_cast<const Pack<T, V>*>(p + i);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, uint64_t i, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(p + i) = pack;
}

/// The number of neighbours that an index function handles, as a compile-time constant.
template <int V>
struct Width {
    static constexpr int value = V;
};

/// f(), computed by one thread of the block. Consumer GPUs compute in double at a 64th of the speed of floats, and a
/// division takes a dozen operations. All threads of the block must call it, each kernel once for each f.
template <class F>
__device__ __forceinline__ auto once_per_block(const F& f) {
    __shared__ decltype(f()) value;
    if (threadIdx.x == 0 && threadIdx.y == 0) value = f();
    __syncthreads();
    return value;
}

/// This thread's share of [0, n), one index at a time. On the GPU neighbouring threads take neighbouring indices. In
/// the CPU's shape (one thread per block) a block takes one contiguous chunk, so that the loop vectorises and a core
/// streams through memory.
template <class F>
__device__ __forceinline__ void for_each_index(uint64_t n, F f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const uint64_t begin = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;
#pragma GCC ivdep
        for (uint64_t i = begin; i < end; ++i) f(i);
        return;
    }
#endif
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) f(i);
}

/// Like `for_each_index`, but in packs: calls `f(Width<V>{}, i)` for every V neighbours that start at i (a multiple of
/// V) and `f(Width<1>{}, i)` for the tail. On the CPU the packs have width 1: the compiler chooses the vector width.
template <int V, class F>
__device__ __forceinline__ void for_each_pack(uint64_t n, F f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        for_each_index(n, [&](uint64_t i) { f(Width<1>{}, i); });
        return;
    }
#endif
    const uint64_t packs = n / V;
    for_each_index(packs, [&](uint64_t p) { f(Width<V>{}, p * V); });
    const uint64_t thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread < n - packs * V) f(Width<1>{}, packs * V + thread);
}

}  // namespace
