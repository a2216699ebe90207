// The tangents of batch normalisation, forward and backward, for products with the Hessian: the derivatives of all
// results of batch_norm.cu when x, the parameters and the gradient of the output move.
//
// The passes are the same as in batch_norm.cu: the sums, their combination, and the results per element. A prime marks
// a tangent.
#include "include/batch_norm.cuh"

namespace {

// ---- Forward --------------------------------------------------------------------------------------------------------

/// The two sums of a block, as a pass over rows has left them.
__device__ __forceinline__ auto sums_of(const double* first, const double* second, uint32_t channels) {
    return [=](uint32_t block, uint32_t c) -> TwoSums {
        const uint64_t place = uint64_t(block) * channels + c;
        return {{first[place], second[place]}};
    };
}

template <class T>
struct StatisticsTangentArgs {
    const double* x;    // the blocks' sums of x'
    const double* x_x;  // the blocks' sums of x' (x - mean)
    const T* inv_std;
    T* mean_tangent;
    T* inv_std_tangent;
    double inverse;  // 1 / rows
    uint32_t channels;
    uint32_t blocks;
};

/// mean' = mean(x'), inv_std' = -inv_std^3 mean(x' (x - mean)), from the sums of batch_norm_sums with dz = x'.
template <class T>
__device__ void batch_norm_statistics_tangent(const StatisticsTangentArgs<T>& a) {
    add_blocks(a.channels, a.blocks, sums_of(a.x, a.x_x, a.channels), [&](uint32_t c, const TwoSums& all) {
        const double inv_std = double(a.inv_std[c]);
        a.mean_tangent[c] = T(all.v[0] * a.inverse);
        a.inv_std_tangent[c] = T(-inv_std * inv_std * inv_std * (all.v[1] * a.inverse));
    });
}

template <class S, class T = Arithmetic<S>>
struct NormalizeTangentArgs {
    Upstream<S> upstream;        // without dy
    UpstreamTangent<S> tangent;  // without dy
    const T* beta_tangent;
    const S* residual_tangent;  // or null
    S* y_tangent;
    BatchNormRows rows;
    uint32_t mask;
};

template <class S, LaunchShape shape, Mask mask, bool has_residual>
__device__ __forceinline__ void normalize_tangent_block(const NormalizeTangentArgs<S>& a) {
    const uint64_t channels = a.rows.channels;
    map_rows<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
        typedef typename decltype(of)::type Group;
        const Masked<Group, mask> masked(a.upstream, c);
        const Group gamma = Group::load(a.upstream.gamma + c), inv_std = Group::load(a.upstream.inv_std + c);
        const Group gamma_tangent = Group::load(a.tangent.gamma + c), beta_tangent = Group::load(a.beta_tangent + c);
        const Group mean_tangent = Group::load(a.tangent.mean + c);
        const Group inv_std_tangent = Group::load(a.tangent.inv_std + c);
        Group scale, scale_tangent;
        POLDER_UNROLL
        for (int k = 0; k < Group::items; ++k) {
            scale.v[k] = gamma.v[k] * inv_std.v[k];
            scale_tangent.v[k] = gamma_tangent.v[k] * inv_std.v[k] + gamma.v[k] * inv_std_tangent.v[k];
        }
        uint64_t place = row * channels + c;
#pragma unroll 2
        for (uint32_t i = 0; i < count; ++i, place += step * channels) {
            const Group x = Group::load(a.upstream.x + place), x_tangent = Group::load(a.tangent.x + place);
            Group residual;
            if (has_residual) residual = Group::load(a.residual_tangent + place);
            Group z;
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) {
                z.v[k] = (x.v[k] - masked.mean.v[k]) * scale_tangent.v[k] +
                         ((x_tangent.v[k] - mean_tangent.v[k]) * scale.v[k] + beta_tangent.v[k]);
                if (has_residual) z.v[k] = z.v[k] + residual.v[k];
            }
            masked.passed(masked.edge(a.upstream, place, x), z).store_row(a.y_tangent + place);
        }
    });
}

template <class S, LaunchShape shape, Mask mask>
__device__ __forceinline__ void normalize_tangent_with_residual(const NormalizeTangentArgs<S>& a) {
    if (a.residual_tangent != nullptr) normalize_tangent_block<S, shape, mask, true>(a);
    else normalize_tangent_block<S, shape, mask, false>(a);
}

/// y' = (gamma inv_std)' (x - mean) + gamma inv_std (x' - mean') + beta' + residual' where the relu passed, else 0
template <class S>
__device__ void batch_norm_normalize_tangent(const NormalizeTangentArgs<S>& a) {
    with_launch_shape<S>(a.rows, [&](auto of) {
        constexpr LaunchShape shape = decltype(of)::value;
        if (a.mask == kMaskOutput) normalize_tangent_with_residual<S, shape, kMaskOutput>(a);
        else if (a.mask == kMaskRecompute)
            normalize_tangent_block<S, shape, kMaskRecompute, false>(a);  // there was no residual
        else normalize_tangent_with_residual<S, shape, kMaskNone>(a);
    });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

/// The tangents of the sums of each block: dz' and dz' (x - mean) + dz (x' - mean') per channel, and dz'. The relu has
/// no second derivative, so dz' = dy' where it passed.
template <class S>
__device__ void batch_norm_sums_tangent(const BatchNormSumsArgs<S>& a) {
    sums<S, true>(a);
}

template <class T>
struct ParametersTangentArgs {
    const double* dz;
    const double* dz_x;
    const T* inv_std;
    const T* inv_std_tangent;
    const T* dgamma;
    T* dgamma_tangent;
    T* dbeta_tangent;
    uint32_t channels;
    uint32_t blocks;
};

/// dbeta' = sum dz'. dgamma' = inv_std (sum dz (x - mean))' + inv_std' sum dz (x - mean), the latter sum being dgamma /
/// inv_std.
template <class T>
__device__ void batch_norm_parameters_tangent(const ParametersTangentArgs<T>& a) {
    add_blocks(a.channels, a.blocks, sums_of(a.dz, a.dz_x, a.channels), [&](uint32_t c, const TwoSums& all) {
        const double inv_std = double(a.inv_std[c]), relative = double(a.inv_std_tangent[c]) / inv_std;
        a.dbeta_tangent[c] = T(all.v[0]);
        a.dgamma_tangent[c] = T(all.v[1] * inv_std + double(a.dgamma[c]) * relative);
    });
}

template <class S, class T = Arithmetic<S>>
struct InputTangentArgs {
    Upstream<S> upstream;
    UpstreamTangent<S> tangent;
    const T* dgamma;  // these four are read only in training
    const T* dbeta;
    const T* dgamma_tangent;
    const T* dbeta_tangent;
    S* dx_tangent;
    BatchNormRows rows;
    uint32_t mask;
    uint32_t train;
};

template <class S, LaunchShape shape, Mask mask, bool train>
__device__ __forceinline__ void input_tangent_of_block(const InputTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.rows.channels;
    map_rows<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
        typedef typename decltype(of)::type Group;
        const Masked<Group, mask> masked(a.upstream, c);
        const Group mean_tangent = Group::load(a.tangent.mean + c);
        // dx = scale (dz - mean(dz) - (x - mean) slope) with scale = gamma inv_std and slope = inv_std mean(dz xhat).
        Group scale, scale_tangent, x_factor = {}, x_tangent_factor = {}, constant = {};
        {
            const Group gamma = Group::load(a.upstream.gamma + c), inv_std = Group::load(a.upstream.inv_std + c);
            const Group gamma_tangent = Group::load(a.tangent.gamma + c);
            const Group inv_std_tangent = Group::load(a.tangent.inv_std + c);
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) {
                scale.v[k] = gamma.v[k] * inv_std.v[k];
                scale_tangent.v[k] = gamma_tangent.v[k] * inv_std.v[k] + gamma.v[k] * inv_std_tangent.v[k];
            }
            if (train) {
                const T share = T(a.rows.inverse);
                const Group dgamma = Group::load(a.dgamma + c), dgamma_tangent = Group::load(a.dgamma_tangent + c);
                const Group dbeta = Group::load(a.dbeta + c), dbeta_tangent = Group::load(a.dbeta_tangent + c);
                POLDER_UNROLL
                for (int k = 0; k < Group::items; ++k) {
                    const auto slope = dgamma.v[k] * share * inv_std.v[k];
                    const auto slope_tangent =
                        (dgamma_tangent.v[k] * inv_std.v[k] + dgamma.v[k] * inv_std_tangent.v[k]) * share;
                    x_factor.v[k] = scale_tangent.v[k] * slope + scale.v[k] * slope_tangent;
                    x_tangent_factor.v[k] = scale.v[k] * slope;
                    constant.v[k] = (scale_tangent.v[k] * dbeta.v[k] + scale.v[k] * dbeta_tangent.v[k]) * share;
                }
            }
        }
        uint64_t place = row * channels + c;
#pragma unroll 2
        for (uint32_t i = 0; i < count; ++i, place += step * channels) {
            Group x = {}, x_tangent = {};
            if (train || mask == kMaskRecompute) x = Group::load(a.upstream.x + place);
            if (train) x_tangent = Group::load(a.tangent.x + place);
            const Group edge = masked.edge(a.upstream, place, x);
            const Group dz = masked.passed(edge, Group::load(a.upstream.dy + place));
            Group dx = masked.passed(edge, Group::load(a.tangent.dy + place));
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) {
                dx.v[k] = scale_tangent.v[k] * dz.v[k] + scale.v[k] * dx.v[k];
                if (train) {
                    dx.v[k] = dx.v[k] - constant.v[k] - (x.v[k] - masked.mean.v[k]) * x_factor.v[k] -
                              (x_tangent.v[k] - mean_tangent.v[k]) * x_tangent_factor.v[k];
                }
            }
            dx.store_row(a.dx_tangent + place);
        }
    });
}

template <class S, LaunchShape shape, Mask mask>
__device__ __forceinline__ void input_tangent_in_mode(const InputTangentArgs<S>& a) {
    if (a.train) input_tangent_of_block<S, shape, mask, true>(a);
    else input_tangent_of_block<S, shape, mask, false>(a);
}

/// dx', the tangent of batch_norm_input's result.
template <class S>
__device__ void batch_norm_input_tangent(const InputTangentArgs<S>& a) {
    with_launch_shape<S>(a.rows, [&](auto of) {
        constexpr LaunchShape shape = decltype(of)::value;
        if (a.mask == kMaskOutput) input_tangent_in_mode<S, shape, kMaskOutput>(a);
        else if (a.mask == kMaskRecompute) input_tangent_in_mode<S, shape, kMaskRecompute>(a);
        else input_tangent_in_mode<S, shape, kMaskNone>(a);
    });
}

}  // namespace

POLDER_KERNEL(batch_norm_statistics_tangent_f32, batch_norm_statistics_tangent<float>, StatisticsTangentArgs<float>)
POLDER_HOST_KERNEL(batch_norm_statistics_tangent_f64, batch_norm_statistics_tangent<double>,
                   StatisticsTangentArgs<double>)
POLDER_KERNEL(batch_norm_normalize_tangent_f32, batch_norm_normalize_tangent<float>, NormalizeTangentArgs<float>)
POLDER_KERNEL(batch_norm_normalize_tangent_f16, batch_norm_normalize_tangent<__half>, NormalizeTangentArgs<__half>)
POLDER_KERNEL(batch_norm_normalize_tangent_bf16, batch_norm_normalize_tangent<__nv_bfloat16>,
              NormalizeTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_normalize_tangent_f64, batch_norm_normalize_tangent<double>, NormalizeTangentArgs<double>)
POLDER_KERNEL(batch_norm_sums_tangent_f32, batch_norm_sums_tangent<float>, BatchNormSumsArgs<float>)
POLDER_KERNEL(batch_norm_sums_tangent_f16, batch_norm_sums_tangent<__half>, BatchNormSumsArgs<__half>)
POLDER_KERNEL(batch_norm_sums_tangent_bf16, batch_norm_sums_tangent<__nv_bfloat16>, BatchNormSumsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_sums_tangent_f64, batch_norm_sums_tangent<double>, BatchNormSumsArgs<double>)
POLDER_KERNEL(batch_norm_parameters_tangent_f32, batch_norm_parameters_tangent<float>, ParametersTangentArgs<float>)
POLDER_HOST_KERNEL(batch_norm_parameters_tangent_f64, batch_norm_parameters_tangent<double>,
                   ParametersTangentArgs<double>)
POLDER_KERNEL(batch_norm_input_tangent_f32, batch_norm_input_tangent<float>, InputTangentArgs<float>)
POLDER_KERNEL(batch_norm_input_tangent_f16, batch_norm_input_tangent<__half>, InputTangentArgs<__half>)
POLDER_KERNEL(batch_norm_input_tangent_bf16, batch_norm_input_tangent<__nv_bfloat16>, InputTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_input_tangent_f64, batch_norm_input_tangent<double>, InputTangentArgs<double>)
