// Element-wise passes over long vectors: packs where the addresses allow them, conversions between floating-point
// types, and outputs that bypass the CPU's caches.
#pragma once
#include "polder.cuh"

namespace {

/// Elements of T in a pack.
template <class T>
constexpr int kPack = kPackBytes / int(sizeof(T));

/// Added to a norm that divides, so that a quotient stays finite where it vanishes.
constexpr double kTiny = 1e-12;

/// rho / (norm + 1e-12), once for each block.
template <class T>
__device__ __forceinline__ T normalized_step(double rho, const double* norm) {
    return once_per_block([=] { return T(rho / (norm[0] + kTiny)); });
}

/// Whether all of these addresses allow 16-byte accesses: a part of a buffer may begin anywhere.
template <class... P>
__device__ __forceinline__ bool aligned16(const P*... p) {
    return ((reinterpret_cast<uintptr_t>(p) | ...) & 15) == 0;
}

/// As `for_each_pack`, or one element at a time if `packs` is false.
template <int V, class F>
__device__ __forceinline__ void for_each_pack_if(bool packs, uint64_t n, F f) {
    if (packs) {
        for_each_pack<V>(n, f);
    } else {
        for_each_index(n, [&](uint64_t i) { f(Width<1>{}, i); });
    }
}

// ---- Conversions, each rounded once to the nearest, ties to even ---------------------------------------------------

template <class A, class B>
struct Same {
    static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
    static constexpr bool value = true;
};

/// x as a float whose last bit says that something was cut off. Rounding it once more to a type at least two bits
/// narrower than float gives what rounding x directly would.
__device__ __forceinline__ float round_to_odd(double x) {
    const float nearest = float(x);
    const double back = double(nearest);
    const bool inexact = back != x && x == x, too_large = (x < 0 ? -back : back) > (x < 0 ? -x : x);
    const uint32_t bits = __float_as_uint(nearest) - uint32_t(inexact && too_large);
    return __uint_as_float(inexact ? bits | 1u : bits);
}

template <class S>
__device__ __forceinline__ auto widen(S x) {
    if constexpr (Same<S, __half>::value) {
        return __half2float(x);
    } else if constexpr (Same<S, __nv_bfloat16>::value) {
        return __bfloat162float(x);
    } else {
        return x;
    }
}

template <class D, class S>
__device__ __forceinline__ D convert_to(S x) {
    if constexpr (Same<D, S>::value) {
        return x;
    } else if constexpr (Same<D, __half>::value || Same<D, __nv_bfloat16>::value) {
        float narrowed;
        if constexpr (Same<S, double>::value) {
            narrowed = round_to_odd(x);
        } else {
            narrowed = widen(x);
        }
        if constexpr (Same<D, __half>::value) {
            return __float2half_rn(narrowed);
        } else {
            return __float2bfloat16_rn(narrowed);
        }
    } else {
        return D(widen(x));
    }
}

/// What numbers stored as S are computed in: themselves, or floats for the 16-bit types.
template <class S>
using Arithmetic = decltype(widen(S{}));

/// V neighbours, loaded in one access and widened.
template <int V, class S>
__device__ __forceinline__ Pack<Arithmetic<S>, V> fetch(const S* p, uint64_t i) {
    if constexpr (Same<S, Arithmetic<S>>::value) {
        return load<V>(p, i);
    } else {
        const Pack<S, V> stored = load<V>(p, i);
        Pack<Arithmetic<S>, V> pack;
        POLDER_UNROLL
        for (int v = 0; v < V; ++v) pack.v[v] = widen(stored.v[v]);
        return pack;
    }
}

/// Rounds V neighbours to S and stores them in one access.
template <class S, class T, int V>
__device__ __forceinline__ void put(S* p, uint64_t i, const Pack<T, V>& pack) {
    if constexpr (Same<S, T>::value) {
        store(p, i, pack);
    } else {
        Pack<S, V> rounded;
        POLDER_UNROLL
        for (int v = 0; v < V; ++v) rounded.v[v] = convert_to<S>(pack.v[v]);
        store(p, i, rounded);
    }
}

// ---- Products whose bits do not depend on what the GPU's compiler contracts around them -----------------------------

/// a b, rounded.
template <class T>
__device__ __forceinline__ T rounded_product(T a, T b) {
#if defined(POLDER_HOST)
    return a * b;
#else
    return __fmul_rn(a, b);
#endif
}

/// a b + c, on the GPU rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
#if defined(POLDER_HOST)
    return a * b + c;
#else
    return fmaf(a, b, c);
#endif
}

// ---- Pure outputs --------------------------------------------------------------------------------------------------

/// Where a pass writes: N vectors of one type.
template <class D, int N>
struct Outputs {
    D* p[N];
};

#if defined(POLDER_HOST)
/// Copies elements from the stack to memory and bypasses the caches, which avoids reading each line before it is
/// overwritten.
template <class D>
__forceinline__ void stream_copy(D* out, const D* stage, uint64_t count) {
    uint64_t done = 0;
#if defined(__SSE2__) || (defined(__clang__) && defined(__aarch64__))
    // Only whole cache lines: a part of a line would have to be merged in memory, which costs many times as much.
    typedef float Line __attribute__((vector_size(16)));
    if ((reinterpret_cast<uintptr_t>(out) & 63) == 0) {
        done = count * sizeof(D) / 64 * 64 / sizeof(D);
        Line* to = reinterpret_cast<Line*>(out);
        const Line* from = reinterpret_cast<const Line*>(stage);
        for (uint64_t i = 0; i < done * sizeof(D) / sizeof(Line); ++i) {
#if defined(__clang__)
            __builtin_nontemporal_store(from[i], to + i);
#else
            __builtin_ia32_movntps(reinterpret_cast<float*>(to + i), from[i]);
#endif
        }
    }
#endif
    for (uint64_t i = done; i < count; ++i) out[i] = stage[i];
}

/// Makes streamed data visible to the other cores before the block is reported as done.
__forceinline__ void stream_fence() {
#if defined(__SSE2__)
    __builtin_ia32_sfence();
#endif
}
#endif

/// A pass over [0, n) that writes N vectors without reading them. It calls f(Width<V>{}, i, o, outputs), which writes
/// the elements of index i to index o of the outputs. `packs` is as in `for_each_pack_if`. If the outputs are parts of
/// longer vectors, these have `whole` elements.
template <int V, class D, int N, class F>
__device__ __forceinline__ void for_each_output(bool packs, uint64_t n, const Outputs<D, N>& outputs, F f,
                                                [[maybe_unused]] uint64_t whole = 0) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1 && (n > whole ? n : whole) * sizeof(D) > kStreamBytes) {
        // Four lines at a time: with more, loads and writes to memory no longer overlap.
        constexpr uint64_t kStage = 256 / sizeof(D);
        alignas(64) D stage[N][kStage];
        Outputs<D, N> staged;
        for (int k = 0; k < N; ++k) staged.p[k] = stage[k];
        const uint64_t begin = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;
        uint64_t next;
        for (uint64_t first = begin; first < end; first = next) {
            next = (first / kStage + 1) * kStage;
            if (next > end) next = end;
#pragma GCC ivdep
            for (uint64_t i = first; i < next; ++i) f(Width<1>{}, i, i - first, staged);
            for (int k = 0; k < N; ++k) stream_copy(outputs.p[k] + first, stage[k], next - first);
        }
        stream_fence();
        return;
    }
#endif
    for_each_pack_if<V>(packs, n, [=](auto width, uint64_t i) { f(width, i, i, outputs); });
}

}  // namespace
