// Exponentials and the Gaussian's distribution function. On the CPU their loops vectorise and have the same bits on
// every instruction set: they consist of additions, multiplications and a division, without calls or branches.
#pragma once
#include "elementwise.cuh"

namespace {

/// e^x for x <= 0. The relative error is below 1e-7. Results below 1e-38 become 0. A NaN stays a NaN.
__device__ __forceinline__ float exp_of_negative(float x) {
#if defined(POLDER_HOST)
    // x = n log 2 + r with |r| <= log(2) / 2. The sum with 1.5 * 2^23 rounds to the integer n and holds it in its last
    // bits.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float power = 1.0f / 5040.0f;
    power = power * r + 1.0f / 720.0f;
    power = power * r + 1.0f / 120.0f;
    power = power * r + 1.0f / 24.0f;
    power = power * r + 1.0f / 6.0f;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    const float scale = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : power * scale;
#else
    return expf(x);
#endif
}

__device__ __forceinline__ float natural_logarithm(float x) { return logf(x); }

/// The standard normal distribution at x: the probability of a smaller number, and the density.
template <class T>
struct Gaussian {
    T below, density;
};

/// Φ(−a) / exp(−a²/2) is a polynomial in 1/(1 + 0.35 a), fitted for 0 <= a <= 13.5; the relative error is below 4e-7.
__device__ __forceinline__ Gaussian<float> gaussian(float x) {
    const float a = x < 0.0f ? -x : x;
    const float exponential = exp_of_negative(-0.5f * a * a);
    const float t = 1.0f / (1.0f + 0.35f * a);
    float ratio = -2.912596378e-02f;
    ratio = ratio * t + 1.438726981e-01f;
    ratio = ratio * t - 2.555054810e-01f;
    ratio = ratio * t + 1.589302857e-01f;
    ratio = ratio * t - 2.293778200e-02f;
    ratio = ratio * t + 1.054331891e-01f;
    ratio = ratio * t + 1.198523792e-01f;
    ratio = ratio * t + 1.398590894e-01f;
    ratio = ratio * t + 1.396215695e-01f;
    const float tail = exponential * (ratio * t);
    return {x < 0.0f ? tail : 1.0f - tail, 0.398942280f * exponential};
}

#if defined(POLDER_HOST)
__forceinline__ double exp_of_negative(double x) { return exp(x); }
__forceinline__ double natural_logarithm(double x) { return log(x); }
__forceinline__ Gaussian<double> gaussian(double x) {
    return {0.5 * erfc(-0.70710678118654752440 * x), 0.39894228040143267794 * exp(-0.5 * x * x)};
}
#endif

}  // namespace
