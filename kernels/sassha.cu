// Sassha's direction: the average gradient over the root of the average curvature of each weight.
#include "include/polder.cuh"

#include "include/elementwise.cuh"
#include "include/reduce.cuh"
#include "include/update.cuh"

namespace {

template <class T>
struct SasshaArgs {
    const T* gradient;
    const T* probe;    // null: the curvature stays as it is
    const T* product;  // of the Hessian with the probe
    T* m;
    T* curvature;
    T* out;
    double* correction;     // of the curvature, when it was last updated; 0 before that
    const uint32_t* taken;  // steps before this one
    const uint32_t* skip;
    uint64_t n;
    double beta1, beta2, eps;
};

template <class T, bool UPDATE>
__device__ __forceinline__ void sassha_by(const SasshaArgs<T>& a, T average_scale, T root_scale) {
    const T* const g = a.gradient;
    const T* const z = a.probe;
    const T* const h = a.product;
    T* const m = a.m;
    T* const d = a.curvature;
    T* const out = a.out;
    const T beta1 = T(a.beta1), rest1 = T(1.0 - a.beta1), beta2 = T(a.beta2), rest2 = T(1.0 - a.beta2), eps = T(a.eps);
    const bool packs = aligned16(g, m, d, out) && (!UPDATE || aligned16(z, h));
    for_each_pack_if<kPack<T>>(packs, a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> gradient = load<W>(g, i);
        Pack<T, W> average = load<W>(m, i), curvature = load<W>(d, i), direction;
        if constexpr (UPDATE) {
            const Pack<T, W> probe = load<W>(z, i), product = load<W>(h, i);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) {
                const T diagonal = probe.v[v] * product.v[v];
                curvature.v[v] = beta2 * curvature.v[v] + rest2 * (diagonal < T(0) ? -diagonal : diagonal);
            }
            store<W>(d, i, curvature);
        }
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) {
            average.v[v] = beta1 * average.v[v] + rest1 * gradient.v[v];
            direction.v[v] = average_scale * average.v[v] / (square_root(curvature.v[v]) * root_scale + eps);
        }
        store<W>(m, i, average);
        store<W>(out, i, direction);
    });
}

/// m = β1 m + (1 − β1) g; with a probe d = β2 d + (1 − β2) |z h| and c = 1 − β2^t;
/// out = m/(1 − β1^t) / (sqrt(d/c) + eps), or 0 if no curvature was ever measured
template <class T>
__device__ void sassha(const SasshaArgs<T>& a) {
    if (*a.skip != 0) return;
    const Pack<T, 2> scales = once_per_block([&]() -> Pack<T, 2> {
        const uint32_t t = *a.taken + 1;
        // Only a launch with a probe writes the correction, and it does not read it.
        const double correction = a.probe != nullptr ? 1.0 - power(a.beta2, t) : *a.correction;
        const bool known = correction > 0.0;
        if (a.probe != nullptr && blockIdx.x == 0) *a.correction = correction;
        return {{T(known ? 1.0 / (1.0 - power(a.beta1, t)) : 0.0), T(known ? 1.0 / sqrt(correction) : 0.0)}};
    });
    if (a.probe != nullptr) {
        sassha_by<T, true>(a, scales.v[0], scales.v[1]);
    } else {
        sassha_by<T, false>(a, scales.v[0], scales.v[1]);
    }
}

}  // namespace

POLDER_KERNEL(sassha_f32, sassha<float>, SasshaArgs<float>)
POLDER_HOST_KERNEL(sassha_f64, sassha<double>, SasshaArgs<double>)
