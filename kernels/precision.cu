// Operations for networks in 16 bits: dynamic loss scaling, and the part of a displacement that remains after rounding.
//
// Dynamic loss scaling (Micikevicius et al., "Mixed precision training", ICLR 2018): in f16 a small gradient would
// vanish, so the loss is multiplied by a power of two before the backward pass, and the gradient is divided by it
// afterwards.
//
// The scale is on the device and changes there once per step. A step with an overflow is skipped and halves it; many
// consecutive good steps double it.
#include "include/elementwise.cuh"
#include "include/finish.cuh"

namespace {

struct UnscaleArgs {
    float* x;
    const double* state;  // the scale, and the number of consecutive good steps
    uint32_t* flag;
    uint64_t n;
};

/// x = x / scale, which is exact unless the result is subnormal; flag[0] = 1 if any x[i] was infinite or NaN.
__device__ void unscale_body(const UnscaleArgs& a) {
    float* __restrict__ x = a.x;
    const FinishArgs finish{a.state, a.flag, nullptr};
    Finished<float> finished(finish);
    for_each_pack_if<kPack<float>>(aligned16(x), a.n, [=, &finished](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        Pack<float, W> pack = load<W>(x, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) pack.v[v] = finished.value(pack.v[v]);
        store(x, i, pack);
    });
    finished.raise(finish);
}

struct UpdateScaleArgs {
    double* state;
    const uint32_t* skip;
    double interval, least, most;
};

/// Ends a step: halves the scale if the step was skipped, and doubles it after `interval` consecutive good ones. One
/// thread.
__device__ void update_scale(const UpdateScaleArgs& a) {
    if (threadIdx.x != 0 || blockIdx.x != 0) return;
    const bool skipped = a.skip[0] != 0, due = a.state[1] + 1.0 >= a.interval;
    if (skipped) a.state[0] = max(a.state[0] * 0.5, a.least);
    else if (due) a.state[0] = min(a.state[0] * 2.0, a.most);
    a.state[1] = skipped || due ? 0.0 : a.state[1] + 1.0;
}

struct DirectionScaleArgs {
    const double* norm;
    const double* state;
    double* out;
    double target;
};

/// The power of two that brings the norm of a vector nearest to the target, as the coefficients of a combination of
/// that vector alone, followed by the divisor of its product with the Hessian, in the layout of a loss scale. One
/// thread.
__device__ void scale_direction(const DirectionScaleArgs& a) {
    if (threadIdx.x != 0 || blockIdx.x != 0) return;
    const double exponent = rint(log2(a.target / a.norm[0]));
    // If the norm is zero, infinite or NaN, the factor is 1, and the passes deal with it.
    const double factor = exponent > -100.0 && exponent < 100.0 ? exp2(exponent) : 1.0;
    a.out[0] = factor;
    a.out[1] = a.out[2] = a.out[3] = 0.0;
    a.out[4] = factor * a.state[0];
    a.out[5] = 0.0;
}

struct DifferenceArgs {
    const float* from;
    const float* to;
    float* out;
    uint64_t n;
};

/// out = S(to) - S(from)
template <class S>
__device__ void rounded_difference(const DifferenceArgs& a) {
    const float* __restrict__ from = a.from;
    const float* __restrict__ to = a.to;
    float* __restrict__ out = a.out;
    for_each_pack_if<kPack<float>>(aligned16(from, to, out), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<float, W> begin = load<W>(from, i), end = load<W>(to, i);
        Pack<float, W> difference;
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) difference.v[v] = widen(convert_to<S>(end.v[v])) - widen(convert_to<S>(begin.v[v]));
        store(out, i, difference);
    });
}

}  // namespace

POLDER_KERNEL(rounded_difference_f16, rounded_difference<__half>, DifferenceArgs)
POLDER_KERNEL(rounded_difference_bf16, rounded_difference<__nv_bfloat16>, DifferenceArgs)
POLDER_KERNEL(unscale, unscale_body, UnscaleArgs)
POLDER_KERNEL(loss_scale_update, update_scale, UpdateScaleArgs)
POLDER_KERNEL(direction_scale, scale_direction, DirectionScaleArgs)
