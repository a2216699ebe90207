// Factors for the samples of a batch, for stochastic depth and ShakeDrop: how they are drawn, and the product.
//
// A draw depends on the seed, the number of the sample in the training run, and the operation. So all passes over a
// batch see the same factors, a resumed run draws what the run would have drawn, and a recorded step draws anew.
#include "include/philox.cuh"
#include "include/pixels.cuh"

namespace {

/// What an operation draws. It keeps a sample with probability `keep`. The factor is then `kept`, and otherwise uniform
/// from `low` on over `width`: [0] in the forward, [1] in the backward.
struct FactorLaw {
    double keep;
    double kept[2], low[2], width[2];
    double per_batch;  // 1 if all samples of the batch are kept or dropped together, otherwise 0
};

template <class T>
struct DrawFactorsArgs {
    T* factors;             // [operations][2][batch]
    const FactorLaw* laws;  // [operations]
    const uint64_t* clock;  // batches and steps done, or null for none
    uint64_t seed;
    uint64_t counter;
    uint64_t stride;  // of the counter, per step of the clock
    uint32_t operations;
    uint32_t batch;
};

/// The words that operation number `operation` uses for the sample with number `sample`.
__device__ __forceinline__ PhiloxBlock words_of(uint64_t seed, uint64_t sample, uint32_t operation) {
    return philox({{uint32_t(sample), uint32_t(sample >> 32), operation, 0}}, uint32_t(seed), uint32_t(seed >> 32));
}

template <class T>
__device__ void draw_factors(const DrawFactorsArgs<T>& a) {
    const uint64_t first = a.counter + (a.clock != nullptr ? a.clock[1] * a.stride : 0);
    for_each_index(uint64_t(a.operations) * a.batch, [&](uint64_t i) {
        const uint32_t operation = uint32_t(i) / a.batch, n = uint32_t(i) - operation * a.batch;
        const FactorLaw& law = a.laws[operation];
        const PhiloxBlock own = words_of(a.seed, first + n, operation);
        const uint32_t gate = law.per_batch != 0 ? words_of(a.seed, first, operation).v[0] : own.v[0];
        const bool kept = double(uniform_from(gate)) < law.keep;
        for (int pass = 0; pass < 2; ++pass) {
            const double other = law.low[pass] + double(uniform_from(own.v[1 + pass])) * law.width[pass];
            a.factors[(uint64_t(operation) * 2 + pass) * a.batch + n] = T(kept ? law.kept[pass] : other);
        }
    });
}

template <class S, class T = Arithmetic<S>>
struct ScaleSamplesArgs {
    const S* from;
    S* to;
    const T* factors;  // [batch]
    uint32_t batch;
    uint32_t values;  // of a sample
    uint32_t accumulate;
};

/// to[n, i] = factors[n] from[n, i], or added to it
template <class S>
__device__ void scale_samples(const ScaleSamplesArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.values % V == 0 && aligned16(a.from, a.to);
    for_each_pixel<V>(a.batch, a.values, packs, [&](uint32_t n) {
        const uint64_t sample = uint64_t(n) * a.values;
        const T factor = a.factors[n];
        return [=, &a](auto width, uint32_t i) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> scaled = fetch<W>(a.from, sample + i);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) scaled.v[v] *= factor;
            store_gradient(a.to, sample + i, scaled, a.accumulate);
        };
    });
}

}  // namespace

POLDER_KERNEL(draw_factors_f32, draw_factors<float>, DrawFactorsArgs<float>)
POLDER_HOST_KERNEL(draw_factors_f64, draw_factors<double>, DrawFactorsArgs<double>)
POLDER_KERNEL(scale_samples_f32, scale_samples<float>, ScaleSamplesArgs<float>)
POLDER_KERNEL(scale_samples_f16, scale_samples<__half>, ScaleSamplesArgs<__half>)
POLDER_KERNEL(scale_samples_bf16, scale_samples<__nv_bfloat16>, ScaleSamplesArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(scale_samples_f64, scale_samples<double>, ScaleSamplesArgs<double>)
