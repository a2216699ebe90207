// Operations of the sharpness-aware methods beyond those of vector.cu: products of combined vectors, points displaced
// along them, and the formulas that compute coefficients from norms and products.
//
// The passes over vectors are bound by memory and read each vector once. The formulas are kernels of one thread. Their
// numbers never leave the device, so a step waits for nothing.
#include "include/polder.cuh"

#include "include/combination.cuh"
#include "include/reduce.cuh"

namespace {

// ---- Products of two combinations of the same vectors ---------------------------------------------------------------

template <class T>
struct CombinedProductsArgs {
    const T* vectors[kMaxTerms];
    const double* a;  // coefficients of A
    const double* b;  // coefficients of B
    double* partials;
    uint64_t n;
};

/// With A = Σ a_k x_k and B = Σ b_k x_k: Σ A², Σ A B, Σ B². A and B are computed in double before they are multiplied,
/// so that a small difference of large gradients keeps its digits.
template <class T, int N>
__device__ void combined_products(const CombinedProductsArgs<T>& args) {
    double a[N], b[N];
    POLDER_UNROLL
    for (int k = 0; k < N; ++k) {
        a[k] = args.a[k];
        b[k] = args.b[k];
    }
    const auto terms = [=](auto... vectors) {
        const double x[N] = {vectors...};
        double of_a = 0.0, of_b = 0.0;
        POLDER_UNROLL
        for (int k = 0; k < N; ++k) {
            of_a += a[k] * x[k];
            of_b += b[k] * x[k];
        }
        return Sums<3>{{of_a * of_a, of_a * of_b, of_b * of_b}};
    };
    const T* const* x = args.vectors;
    Sums<3> sums;
    if constexpr (N == 1) sums = block_sums_of<3>(args.n, terms, x[0]);
    else if constexpr (N == 2) sums = block_sums_of<3>(args.n, terms, x[0], x[1]);
    else if constexpr (N == 3) sums = block_sums_of<3>(args.n, terms, x[0], x[1], x[2]);
    else sums = block_sums_of<3>(args.n, terms, x[0], x[1], x[2], x[3]);
    store_partials(args.partials, sums);
}

struct FinishProductsArgs {
    const double* partials;
    double* out;
    uint64_t count;
};

/// out = A·A, A·B, B·B, |A|, |B|
__device__ void finish_products_body(const FinishProductsArgs& a) {
    const Sums<3> sums = sum_partials<3>(a.partials, a.count);
    if (thread_in_block() != 0) return;
    for (int k = 0; k < 3; ++k) a.out[k] = sums.v[k];
    a.out[3] = sqrt(sums.v[0]);
    a.out[4] = sqrt(sums.v[2]);
}

// ---- Combined vectors -----------------------------------------------------------------------------------------------

template <class T>
struct CombineArgs {
    CombinationArgs<T> combination;
    T* out;
    const uint32_t* skip;            // or null: never skipped
    const double* weight_on_device;  // or null: `weight` is the weight; otherwise what this one is multiplied by
    uint64_t n;
    double weight;
    uint32_t add;  // to what `out` holds
};

/// out = weight Σ c_k x_k, or added to it
template <class T, int N>
__device__ void combine(const CombineArgs<T>& a) {
    if (a.skip != nullptr && *a.skip != 0) return;
    const Combined<T, N> combined(a.combination);
    T* out = a.out;
    const T weight = T(a.weight_on_device != nullptr ? a.weight * *a.weight_on_device : a.weight);
    const bool packs = aligned16(out) && combined.aligned();
    if (a.add == 0) {
        for_each_pack_if<kPack<T>>(packs, a.n, [=](auto width, uint64_t i) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> sum = combined.template at<W>(i);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) sum.v[v] *= weight;
            store<W>(out, i, sum);
        });
        return;
    }
    for_each_pack_if<kPack<T>>(packs, a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> sum = combined.template at<W>(i);
        Pack<T, W> total = load<W>(out, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) total.v[v] += weight * sum.v[v];
        store<W>(out, i, total);
    });
}

template <class T>
struct PerturbAlongArgs {
    CombinationArgs<T> direction;
    const T* w;
    const double* norm;
    T* out;
    uint64_t n;
    double rho;
};

/// out = w + ρ d/(norm + 1e-12), d = Σ c_k x_k
template <class T, int N>
__device__ void perturb_along(const PerturbAlongArgs<T>& a) {
    const Combined<T, N> direction(a.direction);
    const T* w = a.w;
    T* out = a.out;
    const T scale = normalized_step<T>(a.rho, a.norm);
    for_each_pack_if<kPack<T>>(aligned16(w, out) && direction.aligned(), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> along = direction.template at<W>(i);
        Pack<T, W> point = load<W>(w, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) point.v[v] += scale * along.v[v];
        store<W>(out, i, point);
    });
}

template <class T>
struct AscendArgs {
    const T* w;
    const T* g;
    T* displacement;
    T* out;
    const double* coefficients;  // of the displacement so far and of g
    uint64_t n;
    uint32_t first, last;
};

template <class T, bool FIRST, bool LAST>
__device__ __forceinline__ void ascend_by(const AscendArgs<T>& a) {
    const T* w = a.w;
    const T* g = a.g;
    T* displacement = a.displacement;
    T* out = a.out;
    const T keep = T(a.coefficients[0]), step = T(a.coefficients[1]);
    for_each_pack_if<kPack<T>>(aligned16(w, g, displacement, out), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        Pack<T, W> point = load<W>(w, i), moved = load<W>(g, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) moved.v[v] *= step;
        if constexpr (!FIRST) {
            const Pack<T, W> before = load<W>(displacement, i);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) moved.v[v] += keep * before.v[v];
        }
        if constexpr (!LAST) store<W>(displacement, i, moved);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) point.v[v] += moved.v[v];
        store<W>(out, i, point);
    });
}

/// ε = c_0 ε + c_1 g, out = w + ε; the first step has no ε yet, and the last one does not store it
template <class T>
__device__ void ascend(const AscendArgs<T>& a) {
    if (a.first != 0) {
        if (a.last != 0) ascend_by<T, true, true>(a);
        else ascend_by<T, true, false>(a);
    } else {
        if (a.last != 0) ascend_by<T, false, true>(a);
        else ascend_by<T, false, false>(a);
    }
}

// ---- ASAM: a ball in coordinates scaled by T = |w| + η_T, and T = 1 beyond `scaled_len` -----------------------------

template <class T>
struct AdaptiveArgs {
    const T* w;
    const T* g;
    const double* norm;
    T* out;
    double* partials;
    uint64_t n, scaled_len;
    double rho, eta;
};

/// Σ (T g)²
template <class T>
__device__ void adaptive_squares(const AdaptiveArgs<T>& a) {
    const double eta = a.eta;
    const auto scaled = [=](double w, double g) {
        const double x = (fabs(w) + eta) * g;
        return Sums<1>{{x * x}};
    };
    Sums<1> sums = block_sums_of<1>(a.scaled_len, scaled, a.w, a.g);
    sums.add(block_sums_of<1>(
        a.n - a.scaled_len, [](double g) { return Sums<1>{{g * g}}; }, a.g + a.scaled_len));
    store_partials(a.partials, sums);
}

/// out = w + ρ T² g/(norm + 1e-12)
template <class T>
__device__ void perturb_adaptive(const AdaptiveArgs<T>& a) {
    const T* w = a.w;
    const T* g = a.g;
    const T scale = normalized_step<T>(a.rho, a.norm), eta = T(a.eta);
    const uint64_t scaled_len = a.scaled_len;
    for_each_output<kPack<T>>(aligned16(w, g, a.out), a.n, Outputs<T, 1>{{a.out}},
                              [=](auto width, uint64_t i, uint64_t o, const Outputs<T, 1>& outputs) {
                                  constexpr int W = decltype(width)::value;
                                  const Pack<T, W> weights = load<W>(w, i), gradient = load<W>(g, i);
                                  Pack<T, W> out;
                                  POLDER_UNROLL
                                  for (int v = 0; v < W; ++v) {
                                      const T size = weights.v[v] < T(0) ? -weights.v[v] : weights.v[v];
                                      const T t = i + v < scaled_len ? size + eta : T(1);
                                      out.v[v] = weights.v[v] + scale * (t * t * gradient.v[v]);
                                  }
                                  store<W>(outputs.p[0], o, out);
                              });
}

// ---- Formulas for a few numbers -------------------------------------------------------------------------------------

struct QuotientArgs {
    const double* numerator;  // or null: 1
    const double* denominator;
    double* coefficients;
    double factor;
};

/// c = 1, factor numerator/(denominator + 1e-12)
__device__ void quotient_body(const QuotientArgs& a) {
    const double numerator = a.numerator != nullptr ? *a.numerator : 1.0;
    a.coefficients[0] = 1.0;
    a.coefficients[1] = a.factor * numerator / (*a.denominator + kTiny);
}

struct RejectionArgs {
    const double* products;  // A·A, A·B, ...
    double* coefficients;
    double of_a, weight;
};

/// of_a A + weight (B − A (A·B)/(A·A)) as coefficients of A and B: the part of B that is orthogonal to A
__device__ void rejection_body(const RejectionArgs& a) {
    const double share = a.products[0] > 0.0 ? a.products[1] / a.products[0] : 0.0;
    a.coefficients[0] = a.of_a - a.weight * share;
    a.coefficients[1] = a.weight;
}

struct GamArgs {
    const double* products;  // of m = g0 + |β2| g2 and G = β1 g1 + β3 g3
    double* coefficients;
    double beta1, beta2, beta3, gamma;
};

/// G − γ (m − G (m·G)/(G·G)) as coefficients of g0 ... g3
__device__ void gam_coefficients_body(const GamArgs& a) {
    const double share = a.products[2] > 0.0 ? a.products[1] / a.products[2] : 0.0;
    const double of_g = 1.0 + a.gamma * share;
    a.coefficients[0] = -a.gamma;
    a.coefficients[1] = a.beta1 * of_g;
    a.coefficients[2] = -a.gamma * fabs(a.beta2);
    a.coefficients[3] = a.beta3 * of_g;
}

struct AscentArgs {
    const double* products;  // of the displacement and the gradient there; null before the first step
    const double* norm;      // of the gradient, for the first step
    double* coefficients;
    double rho, step;
};

/// The displacement after a step along the gradient, projected onto the ball of radius ρ if it is outside
__device__ void ascent_coefficients_body(const AscentArgs& a) {
    if (a.products == nullptr) {
        a.coefficients[0] = 0.0;
        a.coefficients[1] = fmin(a.step, a.rho) / (*a.norm + kTiny);
        return;
    }
    const double along = a.step / (sqrt(a.products[2]) + kTiny);
    const double squared = a.products[0] + along * (2.0 * a.products[1] + along * a.products[2]);
    const double shrink = squared > a.rho * a.rho ? a.rho / sqrt(squared) : 1.0;
    a.coefficients[0] = shrink;
    a.coefficients[1] = shrink * along;
}

struct ClipArgs {
    const double* norm;
    double* coefficients;
    double largest;
};

/// Scales down a combination whose norm is above `largest` (PyTorch's form)
__device__ void clip_coefficients_body(const ClipArgs& a) {
    const double scale = a.largest / (*a.norm + 1e-6);
    if (scale < 1.0) {
        for (int k = 0; k < kMaxTerms; ++k) a.coefficients[k] *= scale;
    }
}

struct AdgdRatesArgs {
    const double* products;  // of w − w_prev and of g(w) − g(w_prev)
    const double* norm;      // ‖g(w)‖
    const double* state;     // η and θ of the last step that was taken, and whether there was one
    double* rates;           // η, ρ = sqrt(η), θ, ‖g‖/ρ
    double delta;
    double damping;
};

/// η = min(damping ‖Δw‖/‖Δg‖, sqrt(1 + δ θ_prev) η_prev). If w or g did not change, η is the second, or stays as it is
/// where θ is still infinite.
__device__ void adgd_rates_body(const AdgdRatesArgs& a) {
    const bool begun = a.state[2] != 0.0;
    double eta = a.state[0], theta = a.state[1];
    if (begun) {
        const double grown = sqrt(1.0 + a.delta * theta) * eta;
        const double moved = a.products[3], changed = a.products[4];
        const double quotient = moved > 0.0 && changed > 0.0 ? a.damping * moved / changed : grown;
        const double next = quotient < grown ? quotient : grown;
        if (isfinite(next)) {
            theta = eta > 0.0 ? next / eta : 1.0;
            eta = next;
        }
    }
    const double rho = sqrt(eta);
    a.rates[0] = eta;
    a.rates[1] = rho;
    a.rates[2] = theta;
    a.rates[3] = rho > 0.0 ? *a.norm / rho : 1e300;  // no radius, no displacement
}

struct AdgdCommitArgs {
    const double* rates;
    const uint32_t* skip;
    double* state;
};

/// Stores η and θ, unless the step is skipped
__device__ void adgd_commit_body(const AdgdCommitArgs& a) {
    if (*a.skip != 0) return;
    a.state[0] = a.rates[0];
    a.state[1] = a.rates[2];
    a.state[2] = 1.0;
}

}  // namespace

POLDER_KERNEL(combined_products1_f32, (combined_products<float, 1>), CombinedProductsArgs<float>)
POLDER_KERNEL(combined_products2_f32, (combined_products<float, 2>), CombinedProductsArgs<float>)
POLDER_KERNEL(combined_products3_f32, (combined_products<float, 3>), CombinedProductsArgs<float>)
POLDER_KERNEL(combined_products4_f32, (combined_products<float, 4>), CombinedProductsArgs<float>)
POLDER_HOST_KERNEL(combined_products1_f64, (combined_products<double, 1>), CombinedProductsArgs<double>)
POLDER_HOST_KERNEL(combined_products2_f64, (combined_products<double, 2>), CombinedProductsArgs<double>)
POLDER_HOST_KERNEL(combined_products3_f64, (combined_products<double, 3>), CombinedProductsArgs<double>)
POLDER_HOST_KERNEL(combined_products4_f64, (combined_products<double, 4>), CombinedProductsArgs<double>)
POLDER_KERNEL(finish_products, finish_products_body, FinishProductsArgs)

POLDER_KERNEL(combine1_f32, (combine<float, 1>), CombineArgs<float>)
POLDER_KERNEL(combine2_f32, (combine<float, 2>), CombineArgs<float>)
POLDER_KERNEL(combine3_f32, (combine<float, 3>), CombineArgs<float>)
POLDER_KERNEL(combine4_f32, (combine<float, 4>), CombineArgs<float>)
POLDER_HOST_KERNEL(combine1_f64, (combine<double, 1>), CombineArgs<double>)
POLDER_HOST_KERNEL(combine2_f64, (combine<double, 2>), CombineArgs<double>)
POLDER_HOST_KERNEL(combine3_f64, (combine<double, 3>), CombineArgs<double>)
POLDER_HOST_KERNEL(combine4_f64, (combine<double, 4>), CombineArgs<double>)
POLDER_KERNEL(perturb_along2_f32, (perturb_along<float, 2>), PerturbAlongArgs<float>)
POLDER_HOST_KERNEL(perturb_along2_f64, (perturb_along<double, 2>), PerturbAlongArgs<double>)
POLDER_KERNEL(ascend_f32, ascend<float>, AscendArgs<float>)
POLDER_HOST_KERNEL(ascend_f64, ascend<double>, AscendArgs<double>)
POLDER_KERNEL(adaptive_squares_f32, adaptive_squares<float>, AdaptiveArgs<float>)
POLDER_HOST_KERNEL(adaptive_squares_f64, adaptive_squares<double>, AdaptiveArgs<double>)
POLDER_KERNEL(perturb_adaptive_f32, perturb_adaptive<float>, AdaptiveArgs<float>)
POLDER_HOST_KERNEL(perturb_adaptive_f64, perturb_adaptive<double>, AdaptiveArgs<double>)

POLDER_KERNEL(quotient, quotient_body, QuotientArgs)
POLDER_KERNEL(rejection, rejection_body, RejectionArgs)
POLDER_KERNEL(gam_coefficients, gam_coefficients_body, GamArgs)
POLDER_KERNEL(ascent_coefficients, ascent_coefficients_body, AscentArgs)
POLDER_KERNEL(clip_coefficients, clip_coefficients_body, ClipArgs)
POLDER_KERNEL(adgd_rates, adgd_rates_body, AdgdRatesArgs)
POLDER_KERNEL(adgd_commit, adgd_commit_body, AdgdCommitArgs)
