// Layer normalisation (Ba, Kiros and Hinton 2016) of the rows of a matrix: forward, backward and the tangents of both.
//
// With n = (x - mean) inv_std, y = gamma n + beta. The operator P(g) = inv_std (g - mean(g) - n mean(n g)), means over
// the row, is the derivative of n along g; it is symmetric, so it is also the backward. One warp takes one row (on the
// CPU one thread takes several). Sums over rows, for gamma and beta, are a pass of their own.
#include "include/columns.cuh"
#include "include/pixels.cuh"

namespace {

/// The sums of K terms over n elements of a row by a warp, or by one thread in an order that vectorises. Every lane
/// gets them. `f(i, terms)` adds the terms of element i.
template <int K, class T, class F>
__device__ __forceinline__ void row_sums(T (&sums)[K], uint32_t n, const F& f) {
    for (int k = 0; k < K; ++k) sums[k] = T(0);
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        constexpr uint32_t kLanes = 16;
        T lanes[K][kLanes] = {};
        uint32_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            for (uint32_t lane = 0; lane < kLanes; ++lane) {
                T terms[K] = {};
                f(i + lane, terms);
                for (int k = 0; k < K; ++k) lanes[k][lane] += terms[k];
            }
        }
        for (; i < n; ++i) f(i, sums);
        for (int k = 0; k < K; ++k) {
            for (uint32_t lane = 0; lane < kLanes; ++lane) sums[k] += lanes[k][lane];
        }
        return;
    }
#endif
    for (uint32_t i = threadIdx.x % 32; i < n; i += 32) f(i, sums);
    POLDER_UNROLL
    for (int k = 0; k < K; ++k) sums[k] = warp_sum(sums[k]);
}

/// Calls `f(row)` for this warp's rows, or for this block's in the CPU's shape.
template <class F>
__device__ __forceinline__ void for_each_row(uint32_t rows, const F& f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const uint32_t end = uint32_t(uint64_t(rows) * (blockIdx.x + 1) / gridDim.x);
        for (uint32_t row = uint32_t(uint64_t(rows) * blockIdx.x / gridDim.x); row < end; ++row) f(row);
        return;
    }
#endif
    const uint32_t warps = gridDim.x * (blockDim.x / 32);
    for (uint32_t row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < rows; row += warps) f(row);
}

/// Calls `f(i)` for the elements of a row.
template <class F>
__device__ __forceinline__ void for_each_element(uint32_t n, const F& f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
#pragma GCC ivdep
        for (uint32_t i = 0; i < n; ++i) f(i);
        return;
    }
#endif
    for (uint32_t i = threadIdx.x % 32; i < n; i += 32) f(i);
}

__device__ __forceinline__ bool first_lane() { return threadIdx.x % 32 == 0; }

template <class S, class T = Arithmetic<S>>
struct LayerNormArgs {
    const S* x;  // [rows, channels]
    const T* gamma;
    const T* beta;
    S* y;
    T* mean;  // [rows]
    T* inv_std;
    uint32_t rows;
    uint32_t channels;
    double eps;
};

/// y = gamma (x - mean) inv_std + beta with the mean and the biased variance of each row, in two passes over the row
template <class S>
__device__ void layer_norm(const LayerNormArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint32_t n = a.channels;
    for_each_row(a.rows, [&](uint32_t row) {
        const S* __restrict__ x = a.x + uint64_t(row) * n;
        S* __restrict__ y = a.y + uint64_t(row) * n;
        T sums[1];
        row_sums(sums, n, [=](uint32_t i, T(&terms)[1]) { terms[0] += widen(x[i]); });
        const T mean = sums[0] / T(n);
        row_sums(sums, n, [=](uint32_t i, T(&terms)[1]) {
            const T deviation = widen(x[i]) - mean;
            terms[0] += deviation * deviation;
        });
        const T inv_std = T(1) / sqrt(sums[0] / T(n) + T(a.eps));
        for_each_element(
            n, [=, &a](uint32_t i) { y[i] = convert_to<S>((widen(x[i]) - mean) * inv_std * a.gamma[i] + a.beta[i]); });
        if (first_lane()) {
            a.mean[row] = mean;
            a.inv_std[row] = inv_std;
        }
    });
}

template <class S, class T = Arithmetic<S>>
struct LayerNormBackwardArgs {
    const S* x;
    const T* gamma;
    const T* mean;
    const T* inv_std;
    const S* dy;
    S* dx;
    uint32_t rows;
    uint32_t channels;
    uint32_t accumulate;
};

/// dx = P(dy gamma)
template <class S>
__device__ void layer_norm_backward(const LayerNormBackwardArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint32_t n = a.channels;
    for_each_row(a.rows, [&](uint32_t row) {
        const S* __restrict__ x = a.x + uint64_t(row) * n;
        const S* __restrict__ dy = a.dy + uint64_t(row) * n;
        S* __restrict__ dx = a.dx + uint64_t(row) * n;
        const T* __restrict__ gamma = a.gamma;
        const T mean = a.mean[row], inv_std = a.inv_std[row];
        T sums[2];
        row_sums(sums, n, [=](uint32_t i, T(&terms)[2]) {
            const T g = widen(dy[i]) * gamma[i];
            terms[0] += g;
            terms[1] += g * ((widen(x[i]) - mean) * inv_std);
        });
        const T g_mean = sums[0] / T(n), g_n = sums[1] / T(n);
        const bool accumulate = a.accumulate;
        for_each_element(n, [=](uint32_t i) {
            const T normal = (widen(x[i]) - mean) * inv_std;
            const T gradient = inv_std * (widen(dy[i]) * gamma[i] - g_mean - normal * g_n);
            dx[i] = convert_to<S>(accumulate ? widen(dx[i]) + gradient : gradient);
        });
    });
}

template <class S, class T = Arithmetic<S>>
struct LayerNormParametersArgs {
    const S* x;
    const T* mean;
    const T* inv_std;
    const S* dy;
    T* partials;  // [pieces, 2, channels]
    uint32_t rows;
    uint32_t channels;
};

/// The sums of each piece of dy n and of dy.
template <class S>
__device__ void layer_norm_parameters(const LayerNormParametersArgs<S>& a) {
    typedef Arithmetic<S> T;
    sum_columns<2, T>(a.partials, a.rows, a.channels, [&](uint32_t row, uint32_t c, T(&sums)[2]) {
        const uint64_t place = uint64_t(row) * a.channels + c;
        const T dy = widen(a.dy[place]);
        sums[0] += dy * ((widen(a.x[place]) - a.mean[row]) * a.inv_std[row]);
        sums[1] += dy;
    });
}

// ---- Tangents -------------------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct LayerNormTangentArgs {
    const S* x;
    const T* gamma;
    const T* mean;
    const T* inv_std;
    const S* x_tangent;
    const T* gamma_tangent;
    const T* beta_tangent;
    S* y_tangent;
    T* moved_mean;   // [rows]: mean(x')
    T* moved_scale;  // [rows]: mean(n x')
    uint32_t rows;
    uint32_t channels;
};

/// y' = gamma P(x') + gamma' n + beta'
template <class S>
__device__ void layer_norm_tangent(const LayerNormTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint32_t n = a.channels;
    for_each_row(a.rows, [&](uint32_t row) {
        const S* __restrict__ x = a.x + uint64_t(row) * n;
        const S* __restrict__ x_tangent = a.x_tangent + uint64_t(row) * n;
        S* __restrict__ y = a.y_tangent + uint64_t(row) * n;
        const T mean = a.mean[row], inv_std = a.inv_std[row];
        T sums[2];
        row_sums(sums, n, [=](uint32_t i, T(&terms)[2]) {
            const T moved = widen(x_tangent[i]);
            terms[0] += moved;
            terms[1] += moved * ((widen(x[i]) - mean) * inv_std);
        });
        const T moved_mean = sums[0] / T(n), moved_scale = sums[1] / T(n);
        for_each_element(n, [=, &a](uint32_t i) {
            const T normal = (widen(x[i]) - mean) * inv_std;
            const T normal_tangent = inv_std * (widen(x_tangent[i]) - moved_mean - normal * moved_scale);
            y[i] = convert_to<S>(a.gamma[i] * normal_tangent + a.gamma_tangent[i] * normal + a.beta_tangent[i]);
        });
        if (first_lane()) {
            a.moved_mean[row] = moved_mean;
            a.moved_scale[row] = moved_scale;
        }
    });
}

template <class S, class T = Arithmetic<S>>
struct LayerNormBackwardTangentArgs {
    const S* x;
    const T* gamma;
    const T* mean;
    const T* inv_std;
    const S* dy;
    const S* x_tangent;
    const T* gamma_tangent;
    const T* moved_mean;
    const T* moved_scale;
    const S* dy_tangent;
    S* dx_tangent;
    uint32_t rows;
    uint32_t channels;
    uint32_t accumulate;
};

/// With g = dy gamma: dx' = P(g') - inv_std (mean(n x') P(g) + n' mean(n g) + n mean(n' g))
template <class S>
__device__ void layer_norm_backward_tangent(const LayerNormBackwardTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint32_t n = a.channels;
    for_each_row(a.rows, [&](uint32_t row) {
        const S* __restrict__ x = a.x + uint64_t(row) * n;
        const S* __restrict__ x_tangent = a.x_tangent + uint64_t(row) * n;
        const S* __restrict__ dy = a.dy + uint64_t(row) * n;
        const S* __restrict__ dy_tangent = a.dy_tangent + uint64_t(row) * n;
        S* __restrict__ dx = a.dx_tangent + uint64_t(row) * n;
        const T* __restrict__ gamma = a.gamma;
        const T* __restrict__ gamma_tangent = a.gamma_tangent;
        const T mean = a.mean[row], inv_std = a.inv_std[row];
        const T moved_mean = a.moved_mean[row], moved_scale = a.moved_scale[row];
        const auto normal_at = [=](uint32_t i) { return (widen(x[i]) - mean) * inv_std; };
        const auto normal_tangent_at = [=](uint32_t i, T normal) {
            return inv_std * (widen(x_tangent[i]) - moved_mean - normal * moved_scale);
        };
        T sums[5];
        row_sums(sums, n, [=](uint32_t i, T(&terms)[5]) {
            const T normal = normal_at(i), g = widen(dy[i]) * gamma[i];
            const T g_tangent = widen(dy_tangent[i]) * gamma[i] + widen(dy[i]) * gamma_tangent[i];
            terms[0] += g;
            terms[1] += g * normal;
            terms[2] += g_tangent;
            terms[3] += g_tangent * normal;
            terms[4] += g * normal_tangent_at(i, normal);
        });
        POLDER_UNROLL
        for (int k = 0; k < 5; ++k) sums[k] /= T(n);
        const T g_mean = sums[0], g_n = sums[1], moved_g_mean = sums[2], moved_g_n = sums[3] + sums[4];
        const bool accumulate = a.accumulate;
        for_each_element(n, [=](uint32_t i) {
            const T normal = normal_at(i), g = widen(dy[i]) * gamma[i];
            const T g_tangent = widen(dy_tangent[i]) * gamma[i] + widen(dy[i]) * gamma_tangent[i];
            const T projected = inv_std * (g - g_mean - normal * g_n);
            const T gradient = inv_std * (g_tangent - moved_g_mean - normal * moved_g_n - moved_scale * projected -
                                          normal_tangent_at(i, normal) * g_n);
            dx[i] = convert_to<S>(accumulate ? widen(dx[i]) + gradient : gradient);
        });
    });
}

template <class S, class T = Arithmetic<S>>
struct LayerNormParametersTangentArgs {
    const S* x;
    const T* mean;
    const T* inv_std;
    const S* dy;
    const S* x_tangent;
    const T* moved_mean;
    const T* moved_scale;
    const S* dy_tangent;
    T* partials;  // [pieces, 2, channels]
    uint32_t rows;
    uint32_t channels;
};

/// The sums of each piece of dy' n + dy n' and of dy'.
template <class S>
__device__ void layer_norm_parameters_tangent(const LayerNormParametersTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    sum_columns<2, T>(a.partials, a.rows, a.channels, [&](uint32_t row, uint32_t c, T(&sums)[2]) {
        const uint64_t place = uint64_t(row) * a.channels + c;
        const T inv_std = a.inv_std[row], normal = (widen(a.x[place]) - a.mean[row]) * inv_std;
        const T normal_tangent =
            inv_std * (widen(a.x_tangent[place]) - a.moved_mean[row] - normal * a.moved_scale[row]);
        const T dy_tangent = widen(a.dy_tangent[place]);
        sums[0] += dy_tangent * normal + widen(a.dy[place]) * normal_tangent;
        sums[1] += dy_tangent;
    });
}

}  // namespace

POLDER_KERNEL(layer_norm_f32, layer_norm<float>, LayerNormArgs<float>)
POLDER_KERNEL(layer_norm_f16, layer_norm<__half>, LayerNormArgs<__half>)
POLDER_KERNEL(layer_norm_bf16, layer_norm<__nv_bfloat16>, LayerNormArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(layer_norm_f64, layer_norm<double>, LayerNormArgs<double>)
POLDER_KERNEL(layer_norm_backward_f32, layer_norm_backward<float>, LayerNormBackwardArgs<float>)
POLDER_KERNEL(layer_norm_backward_f16, layer_norm_backward<__half>, LayerNormBackwardArgs<__half>)
POLDER_KERNEL(layer_norm_backward_bf16, layer_norm_backward<__nv_bfloat16>, LayerNormBackwardArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(layer_norm_backward_f64, layer_norm_backward<double>, LayerNormBackwardArgs<double>)
POLDER_KERNEL(layer_norm_parameters_f32, layer_norm_parameters<float>, LayerNormParametersArgs<float>)
POLDER_KERNEL(layer_norm_parameters_f16, layer_norm_parameters<__half>, LayerNormParametersArgs<__half>)
POLDER_KERNEL(layer_norm_parameters_bf16, layer_norm_parameters<__nv_bfloat16>, LayerNormParametersArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(layer_norm_parameters_f64, layer_norm_parameters<double>, LayerNormParametersArgs<double>)
POLDER_KERNEL(layer_norm_tangent_f32, layer_norm_tangent<float>, LayerNormTangentArgs<float>)
POLDER_KERNEL(layer_norm_tangent_f16, layer_norm_tangent<__half>, LayerNormTangentArgs<__half>)
POLDER_KERNEL(layer_norm_tangent_bf16, layer_norm_tangent<__nv_bfloat16>, LayerNormTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(layer_norm_tangent_f64, layer_norm_tangent<double>, LayerNormTangentArgs<double>)
POLDER_KERNEL(layer_norm_backward_tangent_f32, layer_norm_backward_tangent<float>, LayerNormBackwardTangentArgs<float>)
POLDER_KERNEL(layer_norm_backward_tangent_f16, layer_norm_backward_tangent<__half>,
              LayerNormBackwardTangentArgs<__half>)
POLDER_KERNEL(layer_norm_backward_tangent_bf16, layer_norm_backward_tangent<__nv_bfloat16>,
              LayerNormBackwardTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(layer_norm_backward_tangent_f64, layer_norm_backward_tangent<double>,
                   LayerNormBackwardTangentArgs<double>)
POLDER_KERNEL(layer_norm_parameters_tangent_f32, layer_norm_parameters_tangent<float>,
              LayerNormParametersTangentArgs<float>)
POLDER_KERNEL(layer_norm_parameters_tangent_f16, layer_norm_parameters_tangent<__half>,
              LayerNormParametersTangentArgs<__half>)
POLDER_KERNEL(layer_norm_parameters_tangent_bf16, layer_norm_parameters_tangent<__nv_bfloat16>,
              LayerNormParametersTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(layer_norm_parameters_tangent_f64, layer_norm_parameters_tangent<double>,
                   LayerNormParametersTangentArgs<double>)
