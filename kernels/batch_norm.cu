// Batch normalisation of x [rows, channels] (NHWC: rows are the pixels of all images), with the residual addition and
// the relu that follow it in a ResNet, forward and backward. batch_norm_tangent.cu has the tangents of both.
//
// Forward: statistics (reads x, unless the convolution that computed x left them), their combination (tiny),
// normalisation (reads x, writes y). Backward: the two sums over the rows, which the last block combines, and the
// gradient of x.
#include "include/batch_norm.cuh"

namespace {

// ---- Statistics of x ------------------------------------------------------------------------------------------------

/// The mean of `count` values and the sum of their squared deviations from it.
struct Moments {
    double count, mean, m2;
};

/// The moments of two samples together (Chan, Golub and LeVeque 1979); either may be empty.
__device__ __forceinline__ Moments combine(const Moments& a, const Moments& b) {
    const double count = a.count + b.count;
    const double share = count > 0.0 ? b.count / count : 0.0;
    const double delta = b.mean - a.mean;
    return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

template <class S>
struct MomentsArgs {
    const S* x;
    double* means;  // [blocks, channels]
    double* m2s;    // [blocks, channels]
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
};

/// The moments of one run, per channel. They are relative to its first row, so that a mean far from zero cancels before
/// it is squared.
template <class Group, class S>
__device__ __forceinline__ void run_moments(const S* x, uint64_t stride, uint32_t count,
                                            double (&means)[Group::channels], double (&m2s)[Group::channels]) {
    const Group shift = Group::load(x);
    Group sum = {}, squares = {};
#pragma unroll 4
    for (uint32_t i = 1; i < count; ++i) {
        const Group value = Group::load(x + i * stride);
        POLDER_UNROLL
        for (int k = 0; k < Group::items; ++k) {
            const typename Group::Item d = value.v[k] - shift.v[k];
            sum.v[k] = sum.v[k] + d;
            squares.v[k] = squares.v[k] + d * d;
        }
    }
    typedef Arithmetic<S> T;
    alignas(Group) T shifts[Group::channels];
    alignas(Group) T sums[Group::channels];
    alignas(Group) T squared[Group::channels];
    shift.store(shifts);
    sum.store(sums);
    squares.store(squared);
    const double inverse = 1.0 / double(count);
    POLDER_UNROLL
    for (int k = 0; k < Group::channels; ++k) {
        const double offset = double(sums[k]) * inverse;
        means[k] = double(shifts[k]) + offset;
        m2s[k] = double(squared[k]) - double(sums[k]) * offset;
    }
}

template <class S, LaunchShape shape>
__device__ __forceinline__ void moments_of_block(const MomentsArgs<S>& a) {
    typedef Arithmetic<S> T;
    double* const means = a.means + uint64_t(blockIdx.x) * a.channels;
    double* const m2s = a.m2s + uint64_t(blockIdx.x) * a.channels;
    const auto moments_of = [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count, auto f) {
        typedef typename decltype(of)::type Group;
        double run_means[Group::channels], run_m2s[Group::channels];
        run_moments<Group>(a.x + row * a.channels + c, uint64_t(step) * a.channels, count, run_means, run_m2s);
        POLDER_UNROLL
        for (int k = 0; k < Group::channels; ++k) f(k, Moments{double(count), run_means[k], run_m2s[k]});
    };
    if constexpr (shape == kCpu) {
        for (uint32_t c = 0; c < a.channels; ++c) means[c] = m2s[c] = 0.0;
        const uint64_t begin = rows_of_block(a.rows, blockIdx.x, gridDim.x).begin;
        for_each_run<T, shape>(
            a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
                moments_of(of, c, row, step, count, [&](int k, const Moments& run) {
                    const Moments both = combine({double(row - begin), means[c + k], m2s[c + k]}, run);
                    means[c + k] = both.mean;
                    m2s[c + k] = both.m2;
                });
            });
    } else {
        constexpr int V = shape == kFour ? 4 : 1;
        POLDER_DYNAMIC_SHARED(Moments, shared);
        Moments totals[V];
        POLDER_UNROLL
        for (int k = 0; k < V; ++k) totals[k] = {0.0, 0.0, 0.0};
        for_each_run<T, shape>(a.rows, a.channels,
                               [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
                                   moments_of(of, c, row, step, count,
                                              [&](int k, const Moments& run) { totals[k] = combine(totals[k], run); });
                               });
        const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * V;
        POLDER_UNROLL
        for (int k = 0; k < V; ++k) {
            const Moments all = combine_lines(totals[k], shared, combine);
            if (threadIdx.y == 0 && c < a.channels) {
                means[c + k] = all.mean;
                m2s[c + k] = all.m2;
            }
        }
    }
}

/// The mean and the sum of squared deviations of each block, per channel.
template <class S>
__device__ void batch_norm_moments(const MomentsArgs<S>& a) {
    with_launch_shape(a.pack, [&](auto shape) { moments_of_block<S, decltype(shape)::value>(a); });
}

template <class T>
struct StatisticsArgs {
    const double* means;  // [blocks, channels], from batch_norm_moments
    const double* m2s;
    const T* tiles;  // or [channels][blocks][mean, m2], of `tile_rows` rows each, from the convolution that made x
    T* mean;
    T* inv_std;
    const T* running_mean;  // these four are null if the running statistics stay as they are
    const T* running_var;
    T* next_mean;
    T* next_var;
    double eps;
    double momentum;
    uint64_t rows;
    uint32_t channels;
    uint32_t blocks;
    uint32_t tile_rows;
};

template <class T>
__device__ __forceinline__ void write_statistics(const StatisticsArgs<T>& a, uint32_t c, const Moments& all) {
    const double rows = double(a.rows);
    const double m2 = all.m2 < 0.0 ? 0.0 : all.m2;  // negative by rounding; a NaN stays a NaN
    a.mean[c] = T(all.mean);
    a.inv_std[c] = T(1.0 / sqrt(m2 / rows + a.eps));
    if (a.next_mean == nullptr) return;
    a.next_mean[c] = T((1.0 - a.momentum) * double(a.running_mean[c]) + a.momentum * all.mean);
    a.next_var[c] = T((1.0 - a.momentum) * double(a.running_var[c]) + a.momentum * (m2 / (rows - 1.0)));
}

/// Combines the blocks' moments: mean, 1 / sqrt(var + eps) with the biased variance, and the next running statistics
/// with the unbiased one. GPU: a block per channel.
template <class T>
__device__ void batch_norm_statistics(const StatisticsArgs<T>& a) {
    const auto moments_of = [&](uint32_t block, uint32_t c) -> Moments {
        if (a.tiles != nullptr) {
            const uint64_t left = a.rows - uint64_t(block) * a.tile_rows;
            const T* const pair = a.tiles + (uint64_t(c) * a.blocks + block) * 2;
            return {double(min(uint64_t(a.tile_rows), left)), double(pair[0]), double(pair[1])};
        }
        const RowRange rows = rows_of_block(a.rows, block, a.blocks);
        const uint64_t place = uint64_t(block) * a.channels + c;
        return {double(rows.end - rows.begin), a.means[place], a.m2s[place]};
    };
#if defined(POLDER_HOST)
    if (blockDim.y == 1) {
        for_each_index(a.channels, [&](uint64_t c) {
            Moments all = {0.0, 0.0, 0.0};
            for (uint32_t block = 0; block < a.blocks; ++block) all = combine(all, moments_of(block, uint32_t(c)));
            write_statistics(a, uint32_t(c), all);
        });
        return;
    }
#endif
    POLDER_DYNAMIC_SHARED(Moments, shared);
    const uint32_t c = blockIdx.x;
    Moments all = {0.0, 0.0, 0.0};
    for (uint32_t block = threadIdx.y; block < a.blocks; block += blockDim.y) all = combine(all, moments_of(block, c));
    all = combine_lines(all, shared, combine);
    if (threadIdx.y == 0) write_statistics(a, c, all);
}

template <class T>
struct RunningArgs {
    const T* running_mean;
    const T* running_var;
    T* mean;
    T* inv_std;
    double eps;
    uint64_t channels;
};

/// The statistics for evaluation: the running mean, and 1 / sqrt(running_var + eps).
template <class T>
__device__ void batch_norm_running(const RunningArgs<T>& a) {
    for_each_index(a.channels, [&](uint64_t c) {
        a.mean[c] = a.running_mean[c];
        a.inv_std[c] = T(1.0 / sqrt(double(a.running_var[c]) + a.eps));
    });
}

// ---- Normalisation --------------------------------------------------------------------------------------------------

/// A NaN stays a NaN, so that a diverged activation reaches the loss.
template <class Item>
__device__ __forceinline__ Item relu(Item z) {
    const Item zero = {};
    return z < zero ? zero : z;
}

template <class S, class T = Arithmetic<S>>
struct NormalizeArgs {
    const S* x;
    const T* gamma;
    const T* beta;
    const T* mean;
    const T* inv_std;
    const S* residual;  // or null
    S* y;
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
    uint32_t relu;
};

template <class S, LaunchShape shape, bool has_residual, bool has_relu>
__device__ __forceinline__ void normalize_block(const NormalizeArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.channels;
    map_rows<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
        typedef typename decltype(of)::type Group;
        const Group mean = Group::load(a.mean + c), beta = Group::load(a.beta + c), gamma = Group::load(a.gamma + c);
        Group scale = Group::load(a.inv_std + c);
        POLDER_UNROLL
        for (int k = 0; k < Group::items; ++k) scale.v[k] = gamma.v[k] * scale.v[k];
        uint64_t place = row * channels + c;
#pragma unroll 4
        for (uint32_t i = 0; i < count; ++i, place += step * channels) {
            const Group x = Group::load(a.x + place);
            Group residual;
            if (has_residual) residual = Group::load(a.residual + place);
            Group y;
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) {
                typename Group::Item z = affine(x.v[k], mean.v[k], scale.v[k], beta.v[k]);
                if (has_residual) z = z + residual.v[k];
                y.v[k] = has_relu ? relu(z) : z;
            }
            y.store_row(a.y + place);
        }
    });
}

/// y = act(gamma (x - mean) inv_std + beta + residual)
template <class S>
__device__ void batch_norm_normalize(const NormalizeArgs<S>& a) {
    with_launch_shape(a.pack, [&](auto of) {
        constexpr LaunchShape shape = decltype(of)::value;
        if (a.residual != nullptr) {
            if (a.relu) normalize_block<S, shape, true, true>(a);
            else normalize_block<S, shape, true, false>(a);
        } else {
            if (a.relu) normalize_block<S, shape, false, true>(a);
            else normalize_block<S, shape, false, false>(a);
        }
    });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

/// The sums of dz and dz (x - mean) of each block, per channel, and the residual's gradient; with tickets also dgamma
/// and dbeta.
template <class S>
__device__ void batch_norm_sums(const BatchNormSumsArgs<S>& a) {
    sums<S, false>(a);
    if (a.tickets == nullptr) return;
    with_launch_shape(a.pack, [&](auto of) { finish_parameters<S, decltype(of)::value>(a); });
}

template <class S, class T = Arithmetic<S>>
struct InputArgs {
    Upstream<S> upstream;
    const T* dgamma;
    const T* dbeta;
    S* dx;
    S* residual;  // receives dz; null if there is none, or the pass of the sums has written it
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
    uint32_t mask;
    uint32_t train;
    uint32_t accumulate;  // whether dz is added to the residual's gradient
};

template <class S, LaunchShape shape, Mask mask, bool train>
__device__ __forceinline__ void input_of_block(const InputArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.channels;
    map_rows<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
        typedef typename decltype(of)::type Group;
        const Masked<Group, mask> masked(a.upstream, c);
        const Group gamma = Group::load(a.upstream.gamma + c), inv_std = Group::load(a.upstream.inv_std + c);
        Group scale, mean_dz, slope;
        if (train) {
            mean_dz = Group::load(a.dbeta + c);
            slope = Group::load(a.dgamma + c);
        }
        const T share = T(1.0 / double(a.rows));
        POLDER_UNROLL
        for (int k = 0; k < Group::items; ++k) {
            scale.v[k] = gamma.v[k] * inv_std.v[k];
            if (train) {
                mean_dz.v[k] = mean_dz.v[k] * share;
                slope.v[k] = slope.v[k] * share * inv_std.v[k];
            }
        }
        uint64_t place = row * channels + c;
#pragma unroll 4
        for (uint32_t i = 0; i < count; ++i, place += step * channels) {
            Group x = {};
            if (train || mask == kMaskRecompute) x = Group::load(a.upstream.x + place);
            Group dx = masked.dz(a.upstream, place, x);
            // Only after a convolution that leaves sums, which does not exist in the CPU's shape.
            if (shape != kCpu && mask == kMaskNone && a.residual != nullptr) {
                Group total = dx;
                if (a.accumulate) {
                    const Group before = Group::load(a.residual + place);
                    POLDER_UNROLL
                    for (int k = 0; k < Group::items; ++k) total.v[k] = before.v[k] + total.v[k];
                }
                total.store_row(a.residual + place);
            }
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) {
                if (train) dx.v[k] = dx.v[k] - mean_dz.v[k] - (x.v[k] - masked.mean.v[k]) * slope.v[k];
                dx.v[k] = dx.v[k] * scale.v[k];
            }
            dx.store_row(a.dx + place);
        }
    });
}

template <class S, LaunchShape shape, Mask mask>
__device__ __forceinline__ void input_in_mode(const InputArgs<S>& a) {
    if (a.train) input_of_block<S, shape, mask, true>(a);
    else input_of_block<S, shape, mask, false>(a);
}

/// dx = gamma inv_std (dz - mean(dz) - xhat mean(dz xhat)) in training, gamma inv_std dz in evaluation.
template <class S>
__device__ void batch_norm_input(const InputArgs<S>& a) {
    with_launch_shape(a.pack, [&](auto of) {
        constexpr LaunchShape shape = decltype(of)::value;
        if (a.mask == kMaskOutput) input_in_mode<S, shape, kMaskOutput>(a);
        else if (a.mask == kMaskRecompute) input_in_mode<S, shape, kMaskRecompute>(a);
        else input_in_mode<S, shape, kMaskNone>(a);
    });
}

}  // namespace

POLDER_KERNEL(batch_norm_moments_f32, batch_norm_moments<float>, MomentsArgs<float>)
POLDER_KERNEL(batch_norm_moments_f16, batch_norm_moments<__half>, MomentsArgs<__half>)
POLDER_KERNEL(batch_norm_moments_bf16, batch_norm_moments<__nv_bfloat16>, MomentsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_moments_f64, batch_norm_moments<double>, MomentsArgs<double>)
POLDER_KERNEL(batch_norm_statistics_f32, batch_norm_statistics<float>, StatisticsArgs<float>)
POLDER_HOST_KERNEL(batch_norm_statistics_f64, batch_norm_statistics<double>, StatisticsArgs<double>)
POLDER_KERNEL(batch_norm_running_f32, batch_norm_running<float>, RunningArgs<float>)
POLDER_HOST_KERNEL(batch_norm_running_f64, batch_norm_running<double>, RunningArgs<double>)
POLDER_KERNEL(batch_norm_normalize_f32, batch_norm_normalize<float>, NormalizeArgs<float>)
POLDER_KERNEL(batch_norm_normalize_f16, batch_norm_normalize<__half>, NormalizeArgs<__half>)
POLDER_KERNEL(batch_norm_normalize_bf16, batch_norm_normalize<__nv_bfloat16>, NormalizeArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_normalize_f64, batch_norm_normalize<double>, NormalizeArgs<double>)
POLDER_KERNEL(batch_norm_sums_f32, batch_norm_sums<float>, BatchNormSumsArgs<float>)
POLDER_KERNEL(batch_norm_sums_f16, batch_norm_sums<__half>, BatchNormSumsArgs<__half>)
POLDER_KERNEL(batch_norm_sums_bf16, batch_norm_sums<__nv_bfloat16>, BatchNormSumsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_sums_f64, batch_norm_sums<double>, BatchNormSumsArgs<double>)
POLDER_KERNEL(batch_norm_input_f32, batch_norm_input<float>, InputArgs<float>)
POLDER_KERNEL(batch_norm_input_f16, batch_norm_input<__half>, InputArgs<__half>)
POLDER_KERNEL(batch_norm_input_bf16, batch_norm_input<__nv_bfloat16>, InputArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_input_f64, batch_norm_input<double>, InputArgs<double>)
