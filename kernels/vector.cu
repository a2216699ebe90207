// Operations of the optimizers on one long vector: norms, perturbations, curvature along a direction, and updates.
//
// Every pass is bound by memory, so one pass does all that can be done with the elements that it loads. Numbers that
// one pass computes for another (a norm, coefficients, a flag to skip the step) stay in device memory, so nothing waits
// for the CPU.
#include "include/polder.cuh"

#include "include/combination.cuh"
#include "include/finish.cuh"
#include "include/reduce.cuh"
#include "include/update.cuh"

namespace {

// ---- Plain element-wise passes -------------------------------------------------------------------------------------

template <class T>
struct FillArgs {
    T* out;
    uint64_t n;
    double value;
};

/// out[i] = value
template <class T>
__device__ void fill(const FillArgs<T>& a) {
    const T value = T(a.value);
    for_each_output<kPack<T>>(aligned16(a.out), a.n, Outputs<T, 1>{{a.out}},
                              [=](auto width, uint64_t, uint64_t o, const Outputs<T, 1>& outputs) {
                                  constexpr int W = decltype(width)::value;
                                  Pack<T, W> out;
                                  POLDER_UNROLL
                                  for (int v = 0; v < W; ++v) out.v[v] = value;
                                  store<W>(outputs.p[0], o, out);
                              });
}

struct ConvertArgs {
    const void* x;
    void* out;
    uint64_t n;
};

/// out[i] = x[i], rounded to the nearest value of the new type
template <class S, class D>
__device__ void convert(const ConvertArgs& a) {
    const S* x = static_cast<const S*>(a.x);
    D* out = static_cast<D*>(a.out);
    constexpr int V = 16 / int(sizeof(S) > sizeof(D) ? sizeof(S) : sizeof(D));
    for_each_output<V>(aligned16(x, out), a.n, Outputs<D, 1>{{out}},
                       [=](auto width, uint64_t i, uint64_t o, const Outputs<D, 1>& outputs) {
                           constexpr int W = decltype(width)::value;
                           const Pack<S, W> from = load<W>(x, i);
                           Pack<D, W> to;
                           POLDER_UNROLL
                           for (int v = 0; v < W; ++v) to.v[v] = convert_to<D>(from.v[v]);
                           store<W>(outputs.p[0], o, to);
                       });
}

template <class T>
struct AxpyArgs {
    const T* x;
    T* y;
    uint64_t n;
    double alpha;
};

/// y[i] += alpha x[i]
template <class T>
__device__ void axpy(const AxpyArgs<T>& a) {
    const T* __restrict__ x = a.x;
    T* __restrict__ y = a.y;
    const T alpha = T(a.alpha);
    for_each_pack_if<kPack<T>>(aligned16(x, y), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> from = load<W>(x, i);
        Pack<T, W> to = load<W>(y, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) to.v[v] += alpha * from.v[v];
        store<W>(y, i, to);
    });
}

template <class T>
struct AverageArgs {
    const T* x;
    T* average;
    const uint64_t* clock;  // batches and steps done
    uint64_t n;
    double decay;
};

/// average += (1 − d)(x − average) with d = min(decay, (1 + t)/(10 + t)) after t steps
template <class T>
__device__ void moving_average(const AverageArgs<T>& a) {
    const T rest = once_per_block([&] {
        const double t = double(a.clock[1]);
        return T(1.0 - fmin(a.decay, (1.0 + t) / (10.0 + t)));
    });
    const T* __restrict__ x = a.x;
    T* __restrict__ average = a.average;
    for_each_pack_if<kPack<T>>(aligned16(x, average), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> now = load<W>(x, i);
        Pack<T, W> mean = load<W>(average, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) mean.v[v] += rest * (now.v[v] - mean.v[v]);
        store<W>(average, i, mean);
    });
}

template <class T>
struct CommitArgs {
    const T* pending;
    T* state;
    const uint32_t* skip;
    uint64_t n;
};

/// state[i] = pending[i], unless the step is skipped
template <class T>
__device__ void commit(const CommitArgs<T>& a) {
    if (*a.skip != 0) return;
    const T* __restrict__ pending = a.pending;
    T* __restrict__ state = a.state;
    for_each_pack_if<kPack<T>>(aligned16(pending, state), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        store<W>(state, i, load<W>(pending, i));
    });
}

// ---- Finiteness ----------------------------------------------------------------------------------------------------

template <class T>
struct CheckFiniteArgs {
    const T* x;
    uint32_t* flag;
    uint64_t n;
};

/// flag[0] = 1 if any x[i] is infinite or NaN. All threads that write write the same value.
template <class T>
__device__ void check_finite(const CheckFiniteArgs<T>& a) {
    const T* __restrict__ x = a.x;
    uint32_t seen = 0;
    for_each_pack_if<kPack<T>>(aligned16(x), a.n, [=, &seen](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> from = load<W>(x, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) seen |= exponent_overflow(from.v[v]);
    });
    if (seen >> 31) atomicOr(a.flag, 1u);
}

// ---- Reductions: partial sums, then a kernel of one block ----------------------------------------------------------

template <class T>
struct PartialsArgs {
    const T* x;
    const T* y;
    double* partials;
    uint64_t n;
};

/// Σ x²
template <class T>
__device__ void squares(const PartialsArgs<T>& a) {
    store_partials(a.partials, block_sums_of<1>(
                                   a.n, [](double x) { return Sums<1>{{x * x}}; }, a.x));
}

/// Σ x y
template <class T>
__device__ void products(const PartialsArgs<T>& a) {
    store_partials(a.partials, block_sums_of<1>(
                                   a.n, [](double x, double y) { return Sums<1>{{x * y}}; }, a.x, a.y));
}

template <class T>
struct GradientArgs {
    T* x;
    const double* state;  // the loss scale, if there is one
    uint32_t* flag;
    double* partials;
    uint64_t n;
};

/// In one pass over a gradient: x = x / scale, which is exact unless the result is subnormal; flag[0] = 1 if any x[i]
/// was infinite or NaN; and the partial sums of squares.
template <class T, bool SCALED>
__device__ void finish_gradient(const GradientArgs<T>& a) {
    T* const x = a.x;
    const FinishArgs finish{SCALED ? a.state : nullptr, a.flag, nullptr};
    Finished<T> finished(finish);
    const auto square = [&finished](T& value) -> Sums<1> {
        value = finished.value(value);
        return {{double(value) * double(value)}};
    };
    Sums<1> sums = {};
#if defined(POLDER_HOST)
    if (block_threads() == 1) {
        sums = serial_sums<1>(a.n * blockIdx.x / gridDim.x, a.n * (blockIdx.x + 1) / gridDim.x, [&](uint64_t i) {
            T value = x[i];
            const Sums<1> term = square(value);
            if (SCALED) x[i] = value;
            return term;
        });
        store_partials(a.partials, sums);
        finished.raise(finish);
        return;
    }
#endif
    for_each_pack_if<kPack<T>>(aligned16(x), a.n, [&](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        Pack<T, W> pack = load<W>(x, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) sums.add(square(pack.v[v]));
        if (SCALED) store(x, i, pack);
    });
    store_partials(a.partials, block_sum(sums));
    finished.raise(finish);
}

struct SumArgs {
    const double* partials;
    double* out;
    uint64_t count;
};

/// out[0] = Σ partials
__device__ void finish_sum_body(const SumArgs& a) {
    const Sums<1> sums = sum_partials<1>(a.partials, a.count);
    if (thread_in_block() == 0) a.out[0] = sums.v[0];
}

/// out[0] = sqrt(Σ partials)
__device__ void finish_norm_body(const SumArgs& a) {
    const Sums<1> sums = sum_partials<1>(a.partials, a.count);
    if (thread_in_block() == 0) a.out[0] = sqrt(sums.v[0]);
}

/// The losses at w, w + ρv and w − ρv as A = L+ + L− − 2 L0 and B = L+ − L−.
struct LossDifferences {
    double a, b;
};
__device__ __forceinline__ LossDifferences loss_differences(const double* losses) {
    const double rise = losses[1] - losses[0], fall = losses[2] - losses[0];
    return {rise + fall, losses[1] - losses[2]};
}

struct CurvatureArgs {
    const double* losses;
    double* out;
    double rho;
    double loss_error;
};

/// out = A, B, A/ρ², and the error of the last, where that of A is `loss_error` times the loss
__device__ void curvature_from_losses_body(const CurvatureArgs& a) {
    if (thread_in_block() != 0) return;
    const LossDifferences d = loss_differences(a.losses);
    a.out[0] = d.a;
    a.out[1] = d.b;
    a.out[2] = d.a / (a.rho * a.rho);
    a.out[3] = a.loss_error * fabs(a.losses[0]) / (a.rho * a.rho);
}

// ---- Perturbed weights ---------------------------------------------------------------------------------------------

template <class T>
struct PerturbArgs {
    const T* w;
    const T* g;
    const double* norm;
    void* plus;
    void* minus;  // null: one side only
    uint64_t n;
    uint64_t whole;  // elements of the vectors, if these are parts of them
    double rho;
};

template <class T, class P, int SIDES, class F>
__device__ __forceinline__ void perturb_by(const PerturbArgs<T>& a, F displacement) {
    const T* w = a.w;
    const T* g = a.g;
    Outputs<P, SIDES> sides;
    sides.p[0] = static_cast<P*>(a.plus);
    if constexpr (SIDES == 2) sides.p[1] = static_cast<P*>(a.minus);
    const bool packs = aligned16(w, g, a.plus, a.minus);
    const auto displace = [=](auto width, uint64_t i, uint64_t o, const Outputs<P, SIDES>& outputs) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> weights = load<W>(w, i), gradient = load<W>(g, i);
        Pack<P, W> plus, minus;
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) {
            const T step = displacement(gradient.v[v]);
            plus.v[v] = convert_to<P>(weights.v[v] + step);
            if constexpr (SIDES == 2) minus.v[v] = convert_to<P>(weights.v[v] - step);
        }
        store<W>(outputs.p[0], o, plus);
        if constexpr (SIDES == 2) store<W>(outputs.p[1], o, minus);
    };
    for_each_output<kPack<T>>(packs, a.n, sides, displace, a.whole);
}

/// plus = w + ρ g/(norm + 1e-12), and minus with the other sign
template <class T, class P>
__device__ void perturb(const PerturbArgs<T>& a) {
    const T scale = normalized_step<T>(a.rho, a.norm);
    // One side has the same bits with and without the other.
    const auto displacement = [=](T g) { return rounded_product(scale, g); };
    if (a.minus == nullptr) {
        perturb_by<T, P, 1>(a, displacement);
    } else {
        perturb_by<T, P, 2>(a, displacement);
    }
}

/// plus = w + ρ sign(g), and minus with the other sign; sign(0) = 0, and a NaN stays a NaN
template <class T, class P>
__device__ void perturb_linf(const PerturbArgs<T>& a) {
    const T rho = T(a.rho);
    const auto displacement = [=](T g) { return g > T(0) ? rho : g < T(0) ? -rho : g; };
    if (a.minus == nullptr) {
        perturb_by<T, P, 1>(a, displacement);
    } else {
        perturb_by<T, P, 2>(a, displacement);
    }
}

// ---- CR-SAM's coefficients -----------------------------------------------------------------------------------------

struct CrSamArgs {
    const double* losses;
    double* coefficients;
    const uint32_t* skip;
    uint32_t* dropped;
    double alpha, beta, a_min, b_min;
    double loss_error;  // relative to L0
    uint32_t log_form;
};

/// g = c0 g0 + c+ g+ + c− g−
__device__ void cr_sam_coefficients_body(const CrSamArgs& a) {
    double alpha = a.alpha, beta = a.beta;
    if (a.log_form != 0) {
        const LossDifferences d = loss_differences(a.losses);
        // A difference of losses that is as small as their error has no meaning.
        const double error = a.loss_error * fabs(a.losses[0]);
        const bool use_alpha = isfinite(d.a) && d.a > fmax(a.a_min, error);
        const bool use_beta = isfinite(d.b) && d.b > fmax(a.b_min, error);
        // A skipped step counts no dropped term.
        const bool taken = a.skip[0] == 0;
        a.dropped[0] += taken && alpha != 0 && !use_alpha;
        a.dropped[1] += taken && beta != 0 && !use_beta;
        alpha = use_alpha ? alpha / d.a : 0.0;
        beta = use_beta ? beta / d.b : 0.0;
    }
    a.coefficients[0] = -2.0 * alpha;
    a.coefficients[1] = 1.0 + alpha + beta;
    a.coefficients[2] = alpha - beta;
}

// ---- Updates -------------------------------------------------------------------------------------------------------

/// Calls f(width, i, decayed): of the elements from i on, the first `decayed` are subject to weight decay. On the CPU
/// the two parts are separate loops, without a test in either.
template <int V, class F>
__device__ __forceinline__ void for_each_decayed(bool packs, uint64_t n, uint64_t decay_len, F f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const uint64_t begin = n * blockIdx.x / gridDim.x, end = n * (blockIdx.x + 1) / gridDim.x;
        const uint64_t split = decay_len < begin ? begin : decay_len < end ? decay_len : end;
#pragma GCC ivdep
        for (uint64_t i = begin; i < split; ++i) f(Width<1>{}, i, 1);
#pragma GCC ivdep
        for (uint64_t i = split; i < end; ++i) f(Width<1>{}, i, 0);
        return;
    }
#endif
    for_each_pack_if<V>(packs, n, [=](auto width, uint64_t i) {
        const uint64_t left = decay_len > i ? decay_len - i : 0;
        f(width, i, left < uint64_t(V) ? int(left) : V);
    });
}

template <class T>
struct SgdArgs {
    T* w;
    T* m;
    CombinationArgs<T> combination;
    const uint32_t* skip;
    const double* lr_on_device;  // or null: `lr` is the rate; otherwise what this one is multiplied by
    uint64_t n, decay_len;
    double lr, momentum, weight_decay;
    uint32_t nesterov;
};

template <class T, int N, bool NESTEROV>
__device__ __forceinline__ void sgd_by(const SgdArgs<T>& a) {
    const Combined<T, N> gradient(a.combination);
    T* w = a.w;
    T* m = a.m;
    const T lr = T(learning_rate(a)), momentum = T(a.momentum), weight_decay = T(a.weight_decay);
    const bool packs = aligned16(w, m) && gradient.aligned();
    for_each_decayed<kPack<T>>(packs, a.n, a.decay_len, [=](auto width, uint64_t i, int decayed) {
        constexpr int W = decltype(width)::value;
        Pack<T, W> g = gradient.template at<W>(i), weights = load<W>(w, i), velocity = load<W>(m, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) {
            if (v < decayed) g.v[v] += weight_decay * weights.v[v];
            velocity.v[v] = momentum * velocity.v[v] + g.v[v];
            weights.v[v] -= lr * (NESTEROV ? g.v[v] + momentum * velocity.v[v] : velocity.v[v]);
        }
        store<W>(m, i, velocity);
        store<W>(w, i, weights);
    });
}

/// g = Σ c_k g_k (+ λ w); m = μ m + g; w −= η m, or η (g + μ m) with Nesterov's momentum
template <class T, int N>
__device__ void sgd(const SgdArgs<T>& a) {
    if (*a.skip != 0) return;
    if (a.nesterov != 0) {
        sgd_by<T, N, true>(a);
    } else {
        sgd_by<T, N, false>(a);
    }
}

template <class T>
struct AdamWArgs {
    T* w;
    T* m;
    T* v;
    CombinationArgs<T> combination;
    const uint32_t* step;
    const uint32_t* skip;
    const double* lr_on_device;  // as in SgdArgs
    uint64_t n, decay_len;
    double lr, beta1, beta2, eps, weight_decay;
};

/// m = β1 m + (1 − β1) g; v = β2 v + (1 − β2) g²; w = (1 − ηλ) w − η/(1 − β1^t) m / (sqrt(v)/sqrt(1 − β2^t) + eps)
template <class T, int N>
__device__ void adamw(const AdamWArgs<T>& a) {
    if (*a.skip != 0) return;
    const Pack<T, 2> corrections = once_per_block([&]() -> Pack<T, 2> {
        const uint32_t t = *a.step;
        return {{T(learning_rate(a) / (1.0 - power(a.beta1, t))), T(1.0 / sqrt(1.0 - power(a.beta2, t)))}};
    });
    const T step_size = corrections.v[0], root_scale = corrections.v[1];
    const Combined<T, N> gradient(a.combination);
    T* w = a.w;
    T* m = a.m;
    T* s = a.v;
    const T beta1 = T(a.beta1), rest1 = T(1.0 - a.beta1), beta2 = T(a.beta2), rest2 = T(1.0 - a.beta2), eps = T(a.eps);
    const T decay = T(1.0 - learning_rate(a) * a.weight_decay);
    const bool packs = aligned16(w, m, s) && gradient.aligned();
    for_each_decayed<kPack<T>>(packs, a.n, a.decay_len, [=](auto width, uint64_t i, int decayed) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> g = gradient.template at<W>(i);
        Pack<T, W> weights = load<W>(w, i), first = load<W>(m, i), second = load<W>(s, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) {
            if (v < decayed) weights.v[v] *= decay;
            first.v[v] = beta1 * first.v[v] + rest1 * g.v[v];
            second.v[v] = beta2 * second.v[v] + rest2 * (g.v[v] * g.v[v]);
            weights.v[v] -= step_size * first.v[v] / (square_root(second.v[v]) * root_scale + eps);
        }
        store<W>(m, i, first);
        store<W>(s, i, second);
        store<W>(w, i, weights);
    });
}

struct AdvanceArgs {
    const uint32_t* skip;
    uint32_t* step;
    uint32_t* skipped;
};

/// Counts a step as done or as skipped.
__device__ void advance_body(const AdvanceArgs& a) {
    const uint32_t skip = *a.skip != 0;
    *a.step += 1 - skip;
    *a.skipped += skip;
}

}  // namespace

POLDER_KERNEL(fill_f32, fill<float>, FillArgs<float>)
POLDER_HOST_KERNEL(fill_f64, fill<double>, FillArgs<double>)
POLDER_KERNEL(axpy_f32, axpy<float>, AxpyArgs<float>)
POLDER_HOST_KERNEL(axpy_f64, axpy<double>, AxpyArgs<double>)
POLDER_KERNEL(moving_average_f32, moving_average<float>, AverageArgs<float>)
POLDER_HOST_KERNEL(moving_average_f64, moving_average<double>, AverageArgs<double>)
POLDER_KERNEL(commit_f32, commit<float>, CommitArgs<float>)
POLDER_HOST_KERNEL(commit_f64, commit<double>, CommitArgs<double>)
POLDER_KERNEL(check_finite_f32, check_finite<float>, CheckFiniteArgs<float>)
POLDER_HOST_KERNEL(check_finite_f64, check_finite<double>, CheckFiniteArgs<double>)

POLDER_KERNEL(convert_f32_f32, (convert<float, float>), ConvertArgs)
POLDER_KERNEL(convert_f32_f16, (convert<float, __half>), ConvertArgs)
POLDER_KERNEL(convert_f32_bf16, (convert<float, __nv_bfloat16>), ConvertArgs)
POLDER_KERNEL(convert_f16_f32, (convert<__half, float>), ConvertArgs)
POLDER_KERNEL(convert_f16_f16, (convert<__half, __half>), ConvertArgs)
POLDER_KERNEL(convert_f16_bf16, (convert<__half, __nv_bfloat16>), ConvertArgs)
POLDER_KERNEL(convert_bf16_f32, (convert<__nv_bfloat16, float>), ConvertArgs)
POLDER_KERNEL(convert_bf16_f16, (convert<__nv_bfloat16, __half>), ConvertArgs)
POLDER_KERNEL(convert_bf16_bf16, (convert<__nv_bfloat16, __nv_bfloat16>), ConvertArgs)
POLDER_HOST_KERNEL(convert_f32_f64, (convert<float, double>), ConvertArgs)
POLDER_HOST_KERNEL(convert_f16_f64, (convert<__half, double>), ConvertArgs)
POLDER_HOST_KERNEL(convert_bf16_f64, (convert<__nv_bfloat16, double>), ConvertArgs)
POLDER_HOST_KERNEL(convert_f64_f64, (convert<double, double>), ConvertArgs)
POLDER_HOST_KERNEL(convert_f64_f32, (convert<double, float>), ConvertArgs)
POLDER_HOST_KERNEL(convert_f64_f16, (convert<double, __half>), ConvertArgs)
POLDER_HOST_KERNEL(convert_f64_bf16, (convert<double, __nv_bfloat16>), ConvertArgs)

POLDER_KERNEL(squares_f32, squares<float>, PartialsArgs<float>)
POLDER_HOST_KERNEL(squares_f64, squares<double>, PartialsArgs<double>)
POLDER_KERNEL(finish_gradient_f32, (finish_gradient<float, false>), GradientArgs<float>)
POLDER_HOST_KERNEL(finish_gradient_f64, (finish_gradient<double, false>), GradientArgs<double>)
POLDER_KERNEL(finish_scaled_gradient, (finish_gradient<float, true>), GradientArgs<float>)
POLDER_KERNEL(products_f32, products<float>, PartialsArgs<float>)
POLDER_HOST_KERNEL(products_f64, products<double>, PartialsArgs<double>)
POLDER_KERNEL(finish_sum, finish_sum_body, SumArgs)
POLDER_KERNEL(finish_norm, finish_norm_body, SumArgs)
POLDER_KERNEL(curvature_from_losses, curvature_from_losses_body, CurvatureArgs)

POLDER_KERNEL(perturb_f32_f32, (perturb<float, float>), PerturbArgs<float>)
POLDER_KERNEL(perturb_f32_f16, (perturb<float, __half>), PerturbArgs<float>)
POLDER_KERNEL(perturb_f32_bf16, (perturb<float, __nv_bfloat16>), PerturbArgs<float>)
POLDER_HOST_KERNEL(perturb_f32_f64, (perturb<float, double>), PerturbArgs<float>)
POLDER_HOST_KERNEL(perturb_f64_f32, (perturb<double, float>), PerturbArgs<double>)
POLDER_HOST_KERNEL(perturb_f64_f16, (perturb<double, __half>), PerturbArgs<double>)
POLDER_HOST_KERNEL(perturb_f64_bf16, (perturb<double, __nv_bfloat16>), PerturbArgs<double>)
POLDER_HOST_KERNEL(perturb_f64_f64, (perturb<double, double>), PerturbArgs<double>)
POLDER_KERNEL(perturb_linf_f32_f32, (perturb_linf<float, float>), PerturbArgs<float>)
POLDER_KERNEL(perturb_linf_f32_f16, (perturb_linf<float, __half>), PerturbArgs<float>)
POLDER_KERNEL(perturb_linf_f32_bf16, (perturb_linf<float, __nv_bfloat16>), PerturbArgs<float>)
POLDER_HOST_KERNEL(perturb_linf_f32_f64, (perturb_linf<float, double>), PerturbArgs<float>)
POLDER_HOST_KERNEL(perturb_linf_f64_f32, (perturb_linf<double, float>), PerturbArgs<double>)
POLDER_HOST_KERNEL(perturb_linf_f64_f16, (perturb_linf<double, __half>), PerturbArgs<double>)
POLDER_HOST_KERNEL(perturb_linf_f64_bf16, (perturb_linf<double, __nv_bfloat16>), PerturbArgs<double>)
POLDER_HOST_KERNEL(perturb_linf_f64_f64, (perturb_linf<double, double>), PerturbArgs<double>)

POLDER_KERNEL(cr_sam_coefficients, cr_sam_coefficients_body, CrSamArgs)
POLDER_KERNEL(sgd1_f32, (sgd<float, 1>), SgdArgs<float>)
POLDER_KERNEL(sgd2_f32, (sgd<float, 2>), SgdArgs<float>)
POLDER_KERNEL(sgd3_f32, (sgd<float, 3>), SgdArgs<float>)
POLDER_KERNEL(sgd4_f32, (sgd<float, 4>), SgdArgs<float>)
POLDER_HOST_KERNEL(sgd1_f64, (sgd<double, 1>), SgdArgs<double>)
POLDER_HOST_KERNEL(sgd2_f64, (sgd<double, 2>), SgdArgs<double>)
POLDER_HOST_KERNEL(sgd3_f64, (sgd<double, 3>), SgdArgs<double>)
POLDER_HOST_KERNEL(sgd4_f64, (sgd<double, 4>), SgdArgs<double>)
POLDER_KERNEL(adamw1_f32, (adamw<float, 1>), AdamWArgs<float>)
POLDER_KERNEL(adamw2_f32, (adamw<float, 2>), AdamWArgs<float>)
POLDER_KERNEL(adamw3_f32, (adamw<float, 3>), AdamWArgs<float>)
POLDER_KERNEL(adamw4_f32, (adamw<float, 4>), AdamWArgs<float>)
POLDER_HOST_KERNEL(adamw1_f64, (adamw<double, 1>), AdamWArgs<double>)
POLDER_HOST_KERNEL(adamw2_f64, (adamw<double, 2>), AdamWArgs<double>)
POLDER_HOST_KERNEL(adamw3_f64, (adamw<double, 3>), AdamWArgs<double>)
POLDER_HOST_KERNEL(adamw4_f64, (adamw<double, 4>), AdamWArgs<double>)
POLDER_KERNEL(advance, advance_body, AdvanceArgs)
