// Combinations of a few vectors, which are computed as the vectors are read and never stored: combined gradients,
// directions, differences.
#pragma once
#include "elementwise.cuh"

namespace {

/// Up to four vectors and their coefficients. `slot` is the index of the coefficient of each vector.
template <class T>
struct CombinationArgs {
    const T* vectors[kMaxTerms];
    const double* coefficients;
    uint32_t slot[kMaxTerms];
};

/// Σ c_k x_k of N vectors.
template <class T, int N>
struct Combined {
    const T* vectors[N];
    T coefficients[N];

    __device__ __forceinline__ explicit Combined(const CombinationArgs<T>& a) {
        POLDER_UNROLL
        for (int k = 0; k < N; ++k) {
            vectors[k] = a.vectors[k];
            coefficients[k] = T(a.coefficients[a.slot[k]]);
        }
    }

    template <int W>
    __device__ __forceinline__ Pack<T, W> at(uint64_t i) const {
        Pack<T, W> sum = load<W>(vectors[0], i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) sum.v[v] *= coefficients[0];
        POLDER_UNROLL
        for (int k = 1; k < N; ++k) {
            const Pack<T, W> next = load<W>(vectors[k], i);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) sum.v[v] += coefficients[k] * next.v[v];
        }
        return sum;
    }

    __device__ __forceinline__ bool aligned() const {
        bool all = true;
        POLDER_UNROLL
        for (int k = 0; k < N; ++k) all = all && aligned16(vectors[k]);
        return all;
    }
};

}  // namespace
