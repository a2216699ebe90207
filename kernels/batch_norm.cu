// Batch normalisation of x [rows, channels] (NHWC: rows are the pixels of all images), with the residual addition and
// the relu that follow it in a ResNet, forward and backward. batch_norm_tangent.cu has the tangents of both.
//
// Forward: statistics (reads x, unless the convolution that computed x left them), their combination (tiny),
// normalisation (reads x, writes y). Backward: the two sums over the rows, which the last block combines, and the
// gradient of x.
#include "include/batch_norm.cuh"

namespace {

// ---- Statistics of x ------------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct MomentsArgs {
    const S* x;
    T* shift;         // [channels]: receives the first row of x
    double* sums;     // [blocks, channels]: of x - shift
    double* squares;  // [blocks, channels]: of the same
    BatchNormRows rows;
};

/// Adds the sums of one run to `sums[0..]` and `squares[0..]`. In the working precision they are relative to the run's
/// first row, so that a mean far from zero cancels before it is squared.
template <class Group, class S>
__device__ __forceinline__ void add_moments(const MomentsArgs<S>& a, uint32_t c, uint64_t row, uint32_t step,
                                            uint32_t count, double* sums, double* squares) {
    const uint64_t stride = uint64_t(step) * a.rows.channels;
    const S* const x = a.x + row * a.rows.channels + c;
    const Group first = Group::load(x);
    Group sum = {}, square = {};
#pragma unroll 4
    for (uint32_t i = 1; i < count; ++i) {
        const Group value = Group::load(x + i * stride);
        POLDER_UNROLL
        for (int k = 0; k < Group::items; ++k) {
            const typename Group::Item d = value.v[k] - first.v[k];
            sum.v[k] = sum.v[k] + d;
            square.v[k] = square.v[k] + d * d;
        }
    }
    typedef Arithmetic<S> T;
    alignas(Group) T shifts[Group::channels];
    alignas(Group) T firsts[Group::channels];
    alignas(Group) T summed[Group::channels];
    alignas(Group) T squared[Group::channels];
    Group::load(a.x + c).store(shifts);
    first.store(firsts);
    sum.store(summed);
    square.store(squared);
    const double n = double(count);
    POLDER_UNROLL
    for (int k = 0; k < Group::channels; ++k) {
        const double d = double(firsts[k]) - double(shifts[k]), s = double(summed[k]);
        sums[k] += s + n * d;
        squares[k] += double(squared[k]) + d * (2.0 * s + n * d);
    }
}

template <class S, LaunchShape shape>
__device__ __forceinline__ void moments_of_block(const MomentsArgs<S>& a) {
    const uint32_t channels = a.rows.channels;
    double* const block_sums = a.sums + uint64_t(blockIdx.x) * channels;
    double* const block_squares = a.squares + uint64_t(blockIdx.x) * channels;
    if constexpr (shape == kCpu) {
        for (uint32_t c = 0; c < channels; ++c) {
            block_sums[c] = block_squares[c] = 0.0;
            if (blockIdx.x == 0) a.shift[c] = widen(a.x[c]);
        }
        for_each_run<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
            add_moments<typename decltype(of)::type>(a, c, row, step, count, block_sums + c, block_squares + c);
        });
    } else {
        constexpr int V = shape;
        double sums[V] = {}, squares[V] = {};
        for_each_run<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
            add_moments<typename decltype(of)::type>(a, c, row, step, count, sums, squares);
        });
        TwoSums all[V];
        POLDER_UNROLL
        for (int k = 0; k < V; ++k) all[k] = {{sums[k], squares[k]}};
        add_lines(all);
        const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * V;
        if (threadIdx.y != 0 || c >= channels) return;
        POLDER_UNROLL
        for (int k = 0; k < V; ++k) {
            block_sums[c + k] = all[k].v[0];
            block_squares[c + k] = all[k].v[1];
            if (blockIdx.x == 0) a.shift[c + k] = widen(a.x[c + k]);
        }
    }
}

/// The sums of x - shift and of its square in each block, per channel. The shift, the first row of x, keeps a mean that
/// is much larger than the deviation from cancelling digits of the squares.
template <class S>
__device__ void batch_norm_moments(const MomentsArgs<S>& a) {
    with_launch_shape<S>(a.rows, [&](auto shape) { moments_of_block<S, decltype(shape)::value>(a); });
}

template <class T>
struct StatisticsArgs {
    const double* sums;  // [blocks, channels], from batch_norm_moments, whose shift is in `mean`
    const double* squares;
    const T* tiles;  // or [channels][blocks][mean, squared deviations], from the convolution that made x
    T* mean;
    T* inv_std;
    const T* running_mean;  // these four are null if the running statistics stay as they are
    const T* running_var;
    T* next_mean;
    T* next_var;
    double eps;
    double momentum;
    double inverse;           // 1 / rows
    double unbiased_inverse;  // 1 / (rows - 1)
    uint64_t rows;
    uint32_t channels;
    uint32_t blocks;
    uint32_t block_rows;  // of every block but the last, which may have fewer
};

/// Combines the blocks' moments: mean, 1 / sqrt(var + eps) with the biased variance, and the next running statistics
/// with the unbiased one. GPU: a block per channel.
template <class T>
__device__ void batch_norm_statistics(const StatisticsArgs<T>& a) {
    const auto tile = [&](uint32_t block, uint32_t c) { return a.tiles + (uint64_t(c) * a.blocks + block) * 2; };
    // A convolution's moments are shifted by the mean of the first tile.
    const auto shift = [&](uint32_t c) { return double(a.tiles != nullptr ? tile(0, c)[0] : a.mean[c]); };
    const auto part = [&](uint32_t block, uint32_t c) -> TwoSums {
        if (a.tiles == nullptr) {
            const uint64_t place = uint64_t(block) * a.channels + c;
            return {{a.sums[place], a.squares[place]}};
        }
        const uint64_t left = a.rows - uint64_t(block) * a.block_rows;
        const double count = double(uint32_t(min(uint64_t(a.block_rows), left))),
                     d = double(tile(block, c)[0]) - shift(c);
        return {{count * d, double(tile(block, c)[1]) + count * d * d}};
    };
    add_blocks(a.channels, a.blocks, part, [&](uint32_t c, const TwoSums& all) {
        const double offset = all.v[0] * a.inverse, mean = shift(c) + offset;
        const double rounded = all.v[1] - all.v[0] * offset;
        const double m2 = rounded < 0.0 ? 0.0 : rounded;  // negative by rounding; a NaN stays a NaN
        a.mean[c] = T(mean);
        a.inv_std[c] = T(1.0 / sqrt(m2 * a.inverse + a.eps));
        if (a.next_mean == nullptr) return;
        const double keep = 1.0 - a.momentum;
        a.next_mean[c] = T(keep * double(a.running_mean[c]) + a.momentum * mean);
        a.next_var[c] = T(keep * double(a.running_var[c]) + a.momentum * (m2 * a.unbiased_inverse));
    });
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
    BatchNormRows rows;
    uint32_t relu;
};

template <class S, LaunchShape shape, bool has_residual, bool has_relu>
__device__ __forceinline__ void normalize_block(const NormalizeArgs<S>& a) {
    const uint64_t channels = a.rows.channels;
    map_rows<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
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
    with_launch_shape<S>(a.rows, [&](auto of) {
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
    with_launch_shape<S>(a.rows, [&](auto of) { finish_parameters<S, decltype(of)::value>(a); });
}

template <class S, class T = Arithmetic<S>>
struct InputArgs {
    Upstream<S> upstream;
    const T* dgamma;
    const T* dbeta;
    S* dx;
    S* residual;  // receives dz; null if there is none, or the pass of the sums has written it
    BatchNormRows rows;
    uint32_t mask;
    uint32_t train;
    uint32_t accumulate;  // whether dz is added to the residual's gradient
};

template <class S, LaunchShape shape, Mask mask, bool train>
__device__ __forceinline__ void input_of_block(const InputArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.rows.channels;
    map_rows<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
        typedef typename decltype(of)::type Group;
        const Masked<Group, mask> masked(a.upstream, c);
        const Group gamma = Group::load(a.upstream.gamma + c), inv_std = Group::load(a.upstream.inv_std + c);
        Group scale, mean_dz, slope;
        if (train) {
            mean_dz = Group::load(a.dbeta + c);
            slope = Group::load(a.dgamma + c);
        }
        const T share = T(a.rows.inverse);
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
    with_launch_shape<S>(a.rows, [&](auto of) {
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
