// What the kernels that update weights share.
#pragma once

namespace {

/// The learning rate: a number, or so many times one on the device.
template <class Args>
__device__ __forceinline__ double learning_rate(const Args& a) {
    return a.lr_on_device != nullptr ? a.lr * *a.lr_on_device : a.lr;
}

// C has a name for each precision: `sqrt` would convert to double on the CPU.
[[maybe_unused]] __device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
[[maybe_unused]] __device__ __forceinline__ double square_root(double x) { return sqrt(x); }

/// base^exponent by squaring: the same on every device.
[[maybe_unused]] __device__ __forceinline__ double power(double base, uint32_t exponent) {
    double result = 1.0;
    for (; exponent != 0; exponent >>= 1) {
        if (exponent & 1u) result *= base;
        base *= base;
    }
    return result;
}

}  // namespace
