// CUDA's device language for a host compiler: it compiles a kernel source as C++17 to run on the CPU.
//
// Every kernel source is compiled several times with this header, once per instruction set (-DPOLDER_ISA=avx2 ...), and
// linked with one runtime.cpp. Therefore all code has internal linkage: the linker must never replace a function
// compiled for the baseline by one compiled for AVX2. For the same reason, no C++ standard header is included.
//
// A kernel runs with CUDA's semantics: a block's threads are fibers on one OS thread, `__syncthreads` and the warp
// operations wait for all threads concerned, a block has shared memory, and atomics work between blocks, which run on
// several OS threads concurrently. Undefined behaviour becomes visible: uninitialised dynamic shared memory and a
// shuffle from a lane outside the mask read as NaN, and a barrier that part of a block never reaches is an error.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Only the C header, without the C++ overloads, which are inline functions with external linkage.
#ifdef __GLIBCXX__
#error "include simt.hpp before any C++ standard header"
#endif
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS 1
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS

#ifndef POLDER_ISA
#define POLDER_ISA baseline
#endif

// ---- Declarations --------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(BYTES) __attribute__((aligned(BYTES)))
// A block stays on one OS thread.
#define __shared__ static __thread

// Dynamic shared memory as an array of T. As in CUDA, all declarations in a block name the same memory.
#define POLDER_DYNAMIC_SHARED(T, NAME) \
    [[maybe_unused]] T* const NAME = static_cast<T*>(__builtin_assume_aligned(polder_position.shared, 64))

#define POLDER_ENTRY_PASTE(ISA, NAME) polder_##ISA##_##NAME
#define POLDER_ENTRY(ISA, NAME) POLDER_ENTRY_PASTE(ISA, NAME)
// The entry point polder_<isa>_<NAME>, through which the host device calls FUNCTION with the launch's argument struct.
#define POLDER_KERNEL(NAME, FUNCTION, ARGS)                           \
    extern "C" void POLDER_ENTRY(POLDER_ISA, NAME)(const void* args); \
    extern "C" void POLDER_ENTRY(POLDER_ISA, NAME)(const void* args) { FUNCTION(*static_cast<const ARGS*>(args)); }
#define POLDER_HOST_KERNEL(NAME, FUNCTION, ARGS) POLDER_KERNEL(NAME, FUNCTION, ARGS)

// ---- Vector types --------------------------------------------------------------------------------------------------

#define POLDER_VECTORS(T, NAME, ALIGN2, ALIGN4)                                                 \
    struct NAME##1 {                                                                            \
        T x;                                                                                    \
    };                                                                                          \
    struct __align__(ALIGN2) NAME##2 {                                                          \
        T x, y;                                                                                 \
    };                                                                                          \
    struct NAME##3 {                                                                            \
        T x, y, z;                                                                              \
    };                                                                                          \
    struct __align__(ALIGN4) NAME##4 {                                                          \
        T x, y, z, w;                                                                           \
    };                                                                                          \
    namespace {                                                                                 \
    [[maybe_unused]] inline NAME##1 make_##NAME##1(T x) { return {x}; }                         \
    [[maybe_unused]] inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                 \
    [[maybe_unused]] inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }         \
    [[maybe_unused]] inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; } \
    }
POLDER_VECTORS(signed char, char, 2, 4)
POLDER_VECTORS(unsigned char, uchar, 2, 4)
POLDER_VECTORS(short, short, 4, 8)
POLDER_VECTORS(unsigned short, ushort, 4, 8)
POLDER_VECTORS(int, int, 8, 16)
POLDER_VECTORS(unsigned int, uint, 8, 16)
POLDER_VECTORS(long long, longlong, 16, 16)
POLDER_VECTORS(unsigned long long, ulonglong, 16, 16)
POLDER_VECTORS(float, float, 8, 16)
POLDER_VECTORS(double, double, 16, 16)
#undef POLDER_VECTORS

// ---- The runtime (runtime.cpp) -------------------------------------------------------------------------------------

extern "C" {
// The position in the grid of the thread that runs on this OS thread.
struct PolderPosition {
    uint3 thread, block, block_dim, grid_dim;
    void* shared;
    bool another_follows;  // whether this OS thread runs the next block of the grid next
};
extern __thread PolderPosition polder_position;

// Waits until every thread of the block has called it with the same `operation`: the name to use in messages, told
// apart from others by `kind`. Returns how many threads gave a predicate that is not zero.
unsigned polder_barrier(int kind, int predicate);

// Computes the results of a warp operation. slots[lane] is the argument of a lane in the mask.
typedef void (*PolderWarpOperation)(unsigned mask, void* const* slots);
// Waits until every lane in `mask` has called it with the same mask and operation. The last of them runs `operation`,
// which reads and writes each lane's slot. Without an operation the lanes only wait, and lanes that have exited do not
// count.
void polder_warp(const char* name, PolderWarpOperation operation, unsigned mask, void* slot);

// Ends the launch with an error in the running thread, for an invalid argument of a warp operation.
void polder_misuse(const char* name, const char* what);
}

#define threadIdx polder_position.thread
#define blockIdx polder_position.block
#define blockDim polder_position.block_dim
#define gridDim polder_position.grid_dim

namespace {

constexpr int warpSize = 32;

// ---- Bits ----------------------------------------------------------------------------------------------------------

template <class To, class From>
__forceinline__ To polder_bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

__forceinline__ int __float_as_int(float x) { return polder_bit_cast<int>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return polder_bit_cast<unsigned>(x); }
__forceinline__ float __int_as_float(int x) { return polder_bit_cast<float>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return polder_bit_cast<float>(x); }
__forceinline__ long long __double_as_longlong(double x) { return polder_bit_cast<long long>(x); }
__forceinline__ double __longlong_as_double(long long x) { return polder_bit_cast<double>(x); }

__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
__forceinline__ int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(long long x) { return __builtin_ffsll(x); }
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
__forceinline__ int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ typedef unsigned __int128 Wide;
    return (unsigned long long)((Wide(a) * b) >> 64);
}

template <class T>
__forceinline__ T __ldg(const T* address) {
    return *address;
}

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

// As in CUDA, the result for a NaN and a number is the number. They are written so that the compiler can vectorise
// them.
__forceinline__ float polder_min(float a, float b) { return a < b || b != b ? a : b; }
__forceinline__ float polder_max(float a, float b) { return a > b || b != b ? a : b; }
__forceinline__ double polder_min(double a, double b) { return a < b || b != b ? a : b; }
__forceinline__ double polder_max(double a, double b) { return a > b || b != b ? a : b; }
__forceinline__ float polder_fminf(float a, float b) { return polder_min(a, b); }
__forceinline__ float polder_fmaxf(float a, float b) { return polder_max(a, b); }
__forceinline__ double polder_fmin(double a, double b) { return polder_min(a, b); }
__forceinline__ double polder_fmax(double a, double b) { return polder_max(a, b); }
// The C library's functions would be calls.
#define fminf polder_fminf
#define fmaxf polder_fmaxf
#define fmin polder_fmin
#define fmax polder_fmax

__forceinline__ float min(float a, float b) { return polder_min(a, b); }
__forceinline__ float max(float a, float b) { return polder_max(a, b); }
__forceinline__ double min(double a, double b) { return polder_min(a, b); }
__forceinline__ double max(double a, double b) { return polder_max(a, b); }
#define POLDER_MIN_MAX(T)                                     \
    __forceinline__ T min(T a, T b) { return a < b ? a : b; } \
    __forceinline__ T max(T a, T b) { return a > b ? a : b; }
POLDER_MIN_MAX(int)
POLDER_MIN_MAX(unsigned)
POLDER_MIN_MAX(long)
POLDER_MIN_MAX(unsigned long)
POLDER_MIN_MAX(long long)
POLDER_MIN_MAX(unsigned long long)
#undef POLDER_MIN_MAX

#undef isfinite
#undef isnan
#undef isinf
#undef signbit
#define isfinite(X) __builtin_isfinite(X)
#define isnan(X) __builtin_isnan(X)
#define isinf(X) (__builtin_isinf_sign(X) != 0)
#define signbit(X) (__builtin_signbit(X) != 0)

__forceinline__ float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__forceinline__ double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
__forceinline__ float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
// Newer C libraries declare some of these too, so ours have other names.
#define rsqrtf polder_rsqrtf
#define rsqrt polder_rsqrt
#define sincospif polder_sincospif
#define sinpif polder_sinpif
#define cospif polder_cospif
__forceinline__ float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
__forceinline__ double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }

// sin(pi x) and cos(pi x). In double, 2x and its distance to the nearest integer are exact, so the result is
// correctly rounded except for a few arguments in 2^28.
[[maybe_unused]] inline void sincospif(float x, float* sine, float* cosine) {
    const double half_turns = 2.0 * double(x);
    const double nearest = __builtin_rint(half_turns);
    const double angle = 1.5707963267948966 * (half_turns - nearest);
    const double s = __builtin_sin(angle), c = __builtin_cos(angle);
    const double quadrant = nearest - 4.0 * __builtin_floor(0.25 * nearest);
    *sine = float(quadrant == 0.0 ? s : quadrant == 1.0 ? c : quadrant == 2.0 ? 0.0 - s : 0.0 - c);
    *cosine = float(quadrant == 0.0 ? c : quadrant == 1.0 ? 0.0 - s : quadrant == 2.0 ? 0.0 - c : s);
}
[[maybe_unused]] inline float sinpif(float x) {
    float sine, cosine;
    sincospif(x, &sine, &cosine);
    return sine;
}
[[maybe_unused]] inline float cospif(float x) {
    float sine, cosine;
    sincospif(x, &sine, &cosine);
    return cosine;
}

}  // namespace

// ---- Half precision: storage types, all arithmetic is done in float ------------------------------------------------

struct __half {
    unsigned short bits;
};
struct __nv_bfloat16 {
    unsigned short bits;
};
struct __align__(4) __half2 {
    __half x, y;
};
struct __align__(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __half half;
typedef __half2 half2;

namespace {

__forceinline__ unsigned short __half_as_ushort(__half x) { return x.bits; }
__forceinline__ __half __ushort_as_half(unsigned short bits) { return {bits}; }
__forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
__forceinline__ __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }

// The conversions have no branches, so that loops over them vectorise. NaNs become 0x7fff, as in CUDA.
__forceinline__ __half __float2half_rn(float x) {
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    // Round to nearest even at bit 13 and move the exponent's bias from 127 to 15; a carry goes into the exponent.
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Below 2^-14 the spacing is 2^-24, which is that of floats in [0.5, 1): the addition rounds.
    const uint32_t subnormal = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half |= (bits >> 16) & 0x8000u;
    half = magnitude > 0x7f800000u ? 0x7fffu : half;
    return {static_cast<unsigned short>(half)};
}
__forceinline__ float __half2float(__half x) {
    const uint32_t magnitude = x.bits & 0x7fffu, shifted = magnitude << 13;
    const uint32_t normal = shifted + (112u << 23), special = shifted | 0x7f800000u;
    const uint32_t subnormal = __float_as_uint(float(int32_t(magnitude)) * 0x1p-24f);
    uint32_t bits = magnitude < 0x0400u ? subnormal : normal;
    bits = magnitude >= 0x7c00u ? special : bits;
    return __uint_as_float(bits | (uint32_t(x.bits & 0x8000u) << 16));
}
__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<unsigned short>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded)};
}
__forceinline__ float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__forceinline__ __half __float2half(float x) { return __float2half_rn(x); }
__forceinline__ __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

// ---- Barriers ------------------------------------------------------------------------------------------------------

[[maybe_unused]] inline void __syncthreads() { polder_barrier(0, 0); }
[[maybe_unused]] inline int __syncthreads_count(int predicate) { return int(polder_barrier(1, predicate)); }
[[maybe_unused]] inline int __syncthreads_and(int predicate) {
    return polder_barrier(2, predicate) == blockDim.x * blockDim.y * blockDim.z;
}
[[maybe_unused]] inline int __syncthreads_or(int predicate) { return polder_barrier(3, predicate) != 0; }
[[maybe_unused]] inline void __syncwarp(unsigned mask = 0xffffffffu) {
    polder_warp("__syncwarp", nullptr, mask, nullptr);
}

[[maybe_unused]] inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[maybe_unused]] inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[maybe_unused]] inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- Shuffles ------------------------------------------------------------------------------------------------------

enum class PolderShuffle { kIndex, kUp, kDown, kXor };

template <class T>
struct PolderShuffleSlot {
    T value, result;
    int parameter, width;
};

// The lane that `lane` reads, as PTX defines it. Lanes that would read outside of their segment of `width` lanes read
// themselves.
template <PolderShuffle kind>
inline int polder_shuffle_source(int lane, int parameter, int width) {
    const int first = lane & ~(width - 1), last = first + width - 1;
    // The instruction uses five bits of it.
    const unsigned offset = unsigned(parameter) & 31u;
    switch (kind) {
        case PolderShuffle::kIndex: return first | (parameter & (width - 1));
        case PolderShuffle::kUp: return offset <= unsigned(lane - first) ? lane - int(offset) : lane;
        case PolderShuffle::kDown: return offset <= unsigned(last - lane) ? lane + int(offset) : lane;
        case PolderShuffle::kXor: {
            const unsigned partner = unsigned(lane) ^ offset;
            return partner <= unsigned(last) ? int(partner) : lane;
        }
    }
    return lane;
}

template <class T, PolderShuffle kind>
inline void polder_shuffle_warp(unsigned mask, void* const* slots) {
    for (int lane = 0; lane < warpSize; ++lane) {
        if (((mask >> lane) & 1u) == 0) continue;
        auto* slot = static_cast<PolderShuffleSlot<T>*>(slots[lane]);
        const int source = polder_shuffle_source<kind>(lane, slot->parameter, slot->width);
        if ((mask >> source) & 1u) {
            slot->result = static_cast<const PolderShuffleSlot<T>*>(slots[source])->value;
        } else {
            memset(&slot->result, 0xff, sizeof(T));  // undefined in CUDA: NaN here
        }
    }
}

template <class T, PolderShuffle kind>
inline T polder_shuffle(const char* name, unsigned mask, T value, int parameter, int width) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 16, 32 or 64 bits");
    if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
        polder_misuse(name, "a width that is not 1, 2, 4, 8, 16 or 32");
    }
    PolderShuffleSlot<T> slot{value, value, parameter, width};
    polder_warp(name, polder_shuffle_warp<T, kind>, mask, &slot);
    return slot.result;
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    return polder_shuffle<T, PolderShuffle::kIndex>("__shfl_sync", mask, value, source, width);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    return polder_shuffle<T, PolderShuffle::kUp>("__shfl_up_sync", mask, value, int(delta), width);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
    return polder_shuffle<T, PolderShuffle::kDown>("__shfl_down_sync", mask, value, int(delta), width);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
    return polder_shuffle<T, PolderShuffle::kXor>("__shfl_xor_sync", mask, value, lane_mask, width);
}

// ---- Votes and reductions ------------------------------------------------------------------------------------------

// A warp operation that combines the lanes' values into one result for all.
template <class T, class Combine>
inline void polder_reduce_warp(unsigned mask, void* const* slots) {
    int lane = __builtin_ctz(mask);
    T result = *static_cast<const T*>(slots[lane]);
    for (unsigned rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
        result = Combine::of(result, *static_cast<const T*>(slots[__builtin_ctz(rest)]));
    }
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) *static_cast<T*>(slots[__builtin_ctz(rest)]) = result;
}
template <class Combine, class T>
inline T polder_reduce(const char* name, unsigned mask, T value) {
    polder_warp(name, polder_reduce_warp<T, Combine>, mask, &value);
    return value;
}

// Sums wrap around, as on the GPU.
struct PolderAdd {
    template <class T>
    static T of(T a, T b) {
        return T(unsigned(a) + unsigned(b));
    }
};
struct PolderMin {
    template <class T>
    static T of(T a, T b) {
        return a < b ? a : b;
    }
};
struct PolderMax {
    template <class T>
    static T of(T a, T b) {
        return a > b ? a : b;
    }
};
struct PolderAnd {
    template <class T>
    static T of(T a, T b) {
        return a & b;
    }
};
struct PolderOr {
    template <class T>
    static T of(T a, T b) {
        return a | b;
    }
};
struct PolderBallot : PolderOr {};
struct PolderXor {
    template <class T>
    static T of(T a, T b) {
        return a ^ b;
    }
};

#define POLDER_REDUCE(T, NAME, COMBINE) \
    [[maybe_unused]] inline T NAME(unsigned mask, T value) { return polder_reduce<COMBINE>(#NAME, mask, value); }
POLDER_REDUCE(unsigned, __reduce_add_sync, PolderAdd)
POLDER_REDUCE(unsigned, __reduce_min_sync, PolderMin)
POLDER_REDUCE(unsigned, __reduce_max_sync, PolderMax)
POLDER_REDUCE(int, __reduce_add_sync, PolderAdd)
POLDER_REDUCE(int, __reduce_min_sync, PolderMin)
POLDER_REDUCE(int, __reduce_max_sync, PolderMax)
POLDER_REDUCE(unsigned, __reduce_and_sync, PolderAnd)
POLDER_REDUCE(unsigned, __reduce_or_sync, PolderOr)
POLDER_REDUCE(unsigned, __reduce_xor_sync, PolderXor)
#undef POLDER_REDUCE

__forceinline__ unsigned polder_lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % unsigned(warpSize);
}
[[maybe_unused]] inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return polder_reduce<PolderBallot>("__ballot_sync", mask, predicate != 0 ? 1u << polder_lane() : 0u);
}
[[maybe_unused]] inline int __any_sync(unsigned mask, int predicate) {
    return polder_reduce<PolderOr>("__any_sync", mask, int(predicate != 0));
}
[[maybe_unused]] inline int __all_sync(unsigned mask, int predicate) {
    return polder_reduce<PolderAnd>("__all_sync", mask, int(predicate != 0));
}
// Only the caller: CUDA does not guarantee that any other lane has converged with it.
[[maybe_unused]] inline unsigned __activemask() { return 1u << polder_lane(); }

// ---- Atomics, relaxed as in CUDA. They are real atomics: blocks run on several OS threads ---------------------------

#define POLDER_ATOMICS(T)                                                                                           \
    [[maybe_unused]] inline T atomicExch(T* p, T value) { return __atomic_exchange_n(p, value, __ATOMIC_RELAXED); } \
    [[maybe_unused]] inline T atomicCAS(T* p, T expected, T desired) {                                              \
        __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);              \
        return expected;                                                                                            \
    }                                                                                                               \
    [[maybe_unused]] inline T atomicAdd(T* p, T value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }   \
    [[maybe_unused]] inline T atomicAnd(T* p, T value) { return __atomic_fetch_and(p, value, __ATOMIC_RELAXED); }   \
    [[maybe_unused]] inline T atomicOr(T* p, T value) { return __atomic_fetch_or(p, value, __ATOMIC_RELAXED); }     \
    [[maybe_unused]] inline T atomicXor(T* p, T value) { return __atomic_fetch_xor(p, value, __ATOMIC_RELAXED); }   \
    [[maybe_unused]] inline T atomicMin(T* p, T value) { return polder_atomic_update<PolderMin>(p, value); }        \
    [[maybe_unused]] inline T atomicMax(T* p, T value) { return polder_atomic_update<PolderMax>(p, value); }

struct PolderSum {
    template <class T>
    static T of(T a, T b) {
        return a + b;
    }
};

template <class Combine, class T>
inline T polder_atomic_update(T* p, T value) {
    T old, updated;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do {
        updated = Combine::of(old, value);
    } while (!__atomic_compare_exchange(p, &old, &updated, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
POLDER_ATOMICS(int)
POLDER_ATOMICS(unsigned)
POLDER_ATOMICS(unsigned long long)
#undef POLDER_ATOMICS
[[maybe_unused]] inline int atomicSub(int* p, int value) { return __atomic_fetch_sub(p, value, __ATOMIC_RELAXED); }
[[maybe_unused]] inline unsigned atomicSub(unsigned* p, unsigned value) {
    return __atomic_fetch_sub(p, value, __ATOMIC_RELAXED);
}
[[maybe_unused]] inline float atomicAdd(float* p, float value) { return polder_atomic_update<PolderSum>(p, value); }
[[maybe_unused]] inline double atomicAdd(double* p, double value) { return polder_atomic_update<PolderSum>(p, value); }
[[maybe_unused]] inline float atomicExch(float* p, float value) {
    float old;
    __atomic_exchange(p, &value, &old, __ATOMIC_RELAXED);
    return old;
}

}  // namespace
