// The last stage of a gradient, in whichever kernel writes it for the last time: it divides by the loss scale, raises a
// flag if an element is not finite, and sums squares for the norm, which then needs no pass of its own.
#pragma once
#include "polder.cuh"

namespace {

/// The top bit of the result is set if x is infinite or NaN: its exponent, all ones, overflows by one.
__device__ __forceinline__ uint32_t exponent_overflow(float x) {
    return (__float_as_uint(x) & 0x7fffffffu) + 0x00800000u;
}
__device__ __forceinline__ uint32_t exponent_overflow(double x) {
    return (uint32_t(uint64_t(__double_as_longlong(x)) >> 32) & 0x7fffffffu) + 0x00100000u;
}

struct FinishArgs {
    const double* scale;  // the loss scale; null if there is none
    uint32_t* flag;       // becomes 1 if an element is not finite; null if this is not the last stage
    double* squares;      // the launch's partial sums of squares; null if no norm is wanted
};

/// The elements that a thread has finished.
template <class T>
struct Finished {
    T inverse;
    uint32_t seen = 0;

    __device__ __forceinline__ explicit Finished(const FinishArgs& a)
        : inverse(a.scale != nullptr ? once_per_block([&] { return T(1.0 / a.scale[0]); }) : T(1)) {}

    /// The element without the loss scale. This is a power of two, so the result is exact unless it is subnormal.
    __device__ __forceinline__ T value(T scaled) {
        seen |= exponent_overflow(scaled);
        return scaled * inverse;
    }
    /// All threads that write write the same value.
    __device__ __forceinline__ void raise(const FinishArgs& a) const {
        if (seen >> 31 && a.flag != nullptr) atomicOr(a.flag, 1u);
    }
};

}  // namespace
