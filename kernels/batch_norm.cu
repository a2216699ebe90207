// Batch normalisation of x [rows, channels] (NHWC: rows are the pixels of all images), with the residual addition and the relu
// that follow it in a ResNet, forward and backward.
//
// Forward: statistics (reads x), their combination (tiny), normalisation (reads x, writes y). Backward: the two sums over the
// rows, their combination, the gradient of x. The tangents of both, for products with the Hessian, have the same passes: the
// sums, their combination, and what is written per element. All sums are two-level: at most kRun rows in the working precision,
// everything beyond that in double, in an order that depends on the launch shape alone.
//
// A block takes a contiguous range of rows. On the GPU its threads form columns of channel groups and lines of rows; on the
// CPU its one thread walks the range in runs of kRun rows, with as many channels at once as fit in vector registers.
#include "include/elementwise.cuh"

namespace {

/// Rows summed in the working precision before the sum moves to double: the rounding error stays near that of one addition.
constexpr uint32_t kRun = 64;

// ---- Channel groups: the unit of arithmetic, scalars in a GPU thread, vectors on the CPU -------------------------------------

/// N neighbouring channels.
template <class T, int N>
struct Scalars : Pack<T, N> {
    typedef T Item;
    static constexpr int channels = N, items = N;

    template <class S>
    static __device__ __forceinline__ Scalars load(const S* p) {
        return {fetch<N>(p, 0)};
    }
    template <class S>
    __device__ __forceinline__ void store(S* p) const {
        put(p, 0, static_cast<const Pack<T, N>&>(*this));
    }
};

#if defined(POLDER_HOST)
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

/// K vector registers of neighbouring channels.
template <class T, int K>
struct Vectors {
    typedef T Item __attribute__((vector_size(kVectorBytes)));
    static constexpr int width = kVectorBytes / sizeof(T), channels = K * width, items = K;
    Item v[K];

    // A vector at a time: gcc copies the whole struct through the stack, in pieces that a wider load then waits for.
    template <class S>
    static __forceinline__ Vectors load(const S* p) {
        Vectors group;
        for (int k = 0; k < K; ++k) {
            if constexpr (Same<S, T>::value) {
                memcpy(&group.v[k], p + k * width, sizeof(Item));
            } else {
                T wide[width];
                for (int i = 0; i < width; ++i) wide[i] = widen(p[k * width + i]);
                memcpy(&group.v[k], wide, sizeof(Item));
            }
        }
        return group;
    }
    template <class S>
    __forceinline__ void store(S* p) const {
        for (int k = 0; k < K; ++k) {
            if constexpr (Same<S, T>::value) {
                memcpy(p + k * width, &v[k], sizeof(Item));
            } else {
                T wide[width];
                memcpy(wide, &v[k], sizeof(Item));
                for (int i = 0; i < width; ++i) p[k * width + i] = convert_to<S>(wide[i]);
            }
        }
    }
};
#endif

/// Names a group's type in a call.
template <class Group>
struct Of {
    typedef Group type;
};

/// The rows of this block.
struct Rows {
    uint64_t begin, end;
};

__device__ __forceinline__ Rows rows_of_block(uint64_t rows, uint32_t block, uint32_t blocks) {
    return {rows * block / blocks, rows * (block + 1) / blocks};
}

/// How a launch divides the work: in the CPU's shape, or on the GPU in groups of one or four channels.
enum Shape { kCpu, kSingle, kFour };

template <Shape shape>
struct ShapeIs {
    static constexpr Shape value = shape;
};

/// Calls `f(ShapeIs<...>{})` for the shape that the wrapper chose: a group's channels on the GPU, 0 for the CPU's shape.
template <class F>
__device__ __forceinline__ void with_shape(uint32_t pack, const F& f) {
#if defined(POLDER_HOST)
    if (pack == 0) return f(ShapeIs<kCpu>{});
#endif
    if (pack == 4) f(ShapeIs<kFour>{});
    else f(ShapeIs<kSingle>{});
}

/// Calls `f(Of<Group>{}, first channel, first row, step, count)` for runs of at most kRun rows that cover this thread's share:
/// on the CPU all channels of the block's rows, on the GPU one group's channels in every blockDim.y-th row of them.
template <class T, Shape shape, class F>
__device__ __forceinline__ void for_each_run(uint64_t rows, uint32_t channels, const F& f) {
    const Rows mine = rows_of_block(rows, blockIdx.x, gridDim.x);
#if defined(POLDER_HOST)
    if constexpr (shape == kCpu) {
        for (uint64_t row = mine.begin; row < mine.end; row += kRun) {
            const uint32_t count = uint32_t(min(uint64_t(kRun), mine.end - row));
            uint32_t c = 0;
            typedef Vectors<T, 2> Two;
            typedef Vectors<T, 1> One;
            for (; c + Two::channels <= channels; c += Two::channels) f(Of<Two>{}, c, row, 1u, count);
            for (; c + One::channels <= channels; c += One::channels) f(Of<One>{}, c, row, 1u, count);
            for (; c < channels; ++c) f(Of<Scalars<T, 1>>{}, c, row, 1u, count);
        }
        return;
    }
#endif
    typedef Scalars<T, shape == kFour ? 4 : 1> Group;
    const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * Group::channels;
    if (c >= channels) return;
    const uint32_t step = blockDim.y;
    for (uint64_t row = mine.begin + threadIdx.y; row < mine.end; row += uint64_t(step) * kRun) {
        const uint32_t count = uint32_t(min(uint64_t(kRun), (mine.end - row + step - 1) / step));
        f(Of<Group>{}, c, row, step, count);
    }
}

// ---- Sums over rows, combined in double --------------------------------------------------------------------------------------

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

/// Combines `value` over the lines of a block (threadIdx.y), for the threads of line 0; `shared` holds one per thread.
template <class M, class Combine>
__device__ __forceinline__ M combine_lines(M value, M* shared, Combine combine) {
    const uint32_t place = threadIdx.y * blockDim.x + threadIdx.x;
    shared[place] = value;
    for (uint32_t lines = blockDim.y; lines > 1;) {
        const uint32_t half = (lines + 1) / 2;
        __syncthreads();
        if (threadIdx.y + half < lines) shared[place] = combine(shared[place], shared[place + half * blockDim.x]);
        lines = half;
    }
    __syncthreads();  // before the next use of `shared`
    return shared[place];
}

// ---- Statistics of x ---------------------------------------------------------------------------------------------------------

template <class S>
struct MomentsArgs {
    const S* x;
    double* means;  // [blocks, channels]
    double* m2s;    // [blocks, channels]
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
};

/// The moments of one run, per channel: shifted by its first row, so that a mean far from zero cancels before it is squared.
template <class Group, class S>
__device__ __forceinline__ void run_moments(const S* x, uint64_t stride, uint32_t count, double (&means)[Group::channels],
                                            double (&m2s)[Group::channels]) {
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

template <class S, Shape shape>
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
        for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
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
        for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
            moments_of(of, c, row, step, count, [&](int k, const Moments& run) { totals[k] = combine(totals[k], run); });
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

/// Every block's mean and sum of squared deviations per channel.
template <class S>
__device__ void batch_norm_moments(const MomentsArgs<S>& a) {
    with_shape(a.pack, [&](auto shape) { moments_of_block<S, decltype(shape)::value>(a); });
}

template <class T>
struct StatisticsArgs {
    const double* means;
    const double* m2s;
    T* mean;
    T* inv_std;
    const T* running_mean;  // these four null where the running statistics are kept
    const T* running_var;
    T* next_mean;
    T* next_var;
    double eps;
    double momentum;
    uint64_t rows;
    uint32_t channels;
    uint32_t blocks;
};

template <class T>
__device__ __forceinline__ void write_statistics(const StatisticsArgs<T>& a, uint32_t c, const Moments& all) {
    const double rows = double(a.rows);
    const double m2 = all.m2 < 0.0 ? 0.0 : all.m2;  // rounding; a NaN stays
    a.mean[c] = T(all.mean);
    a.inv_std[c] = T(1.0 / sqrt(m2 / rows + a.eps));
    if (a.next_mean == nullptr) return;
    a.next_mean[c] = T((1.0 - a.momentum) * double(a.running_mean[c]) + a.momentum * all.mean);
    a.next_var[c] = T((1.0 - a.momentum) * double(a.running_var[c]) + a.momentum * (m2 / (rows - 1.0)));
}

/// Combines the blocks' moments: mean, 1 / sqrt(var + eps) with the biased variance, and the next running statistics with the
/// unbiased one. GPU: a block per channel.
template <class T>
__device__ void batch_norm_statistics(const StatisticsArgs<T>& a) {
    const auto moments_of = [&](uint32_t block, uint32_t c) -> Moments {
        const Rows rows = rows_of_block(a.rows, block, a.blocks);
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

/// What evaluation normalises with: the running mean, and 1 / sqrt(running_var + eps).
template <class T>
__device__ void batch_norm_running(const RunningArgs<T>& a) {
    for_each_index(a.channels, [&](uint64_t c) {
        a.mean[c] = a.running_mean[c];
        a.inv_std[c] = T(1.0 / sqrt(double(a.running_var[c]) + a.eps));
    });
}

// ---- Normalisation -----------------------------------------------------------------------------------------------------------

/// The normalised value before the residual and the relu. Forward and backward share it, so that the backward's mask is the
/// forward's to the bit: the GPU's compiler must not choose the contraction.
template <class Item>
__device__ __forceinline__ Item affine(Item x, Item mean, Item scale, Item beta) {
#if defined(POLDER_HOST)
    return (x - mean) * scale + beta;
#else
    return fmaf(x - mean, scale, beta);
#endif
}

/// A NaN passes, so that a diverged activation reaches the loss.
template <class Item>
__device__ __forceinline__ Item relu(Item z) {
    const Item zero = {};
    return z < zero ? zero : z;
}

/// The relu's gradient, from its input or its output.
template <class Item>
__device__ __forceinline__ Item relu_gradient(Item z, Item dy) {
    const Item zero = {};
    return z <= zero ? zero : dy;
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

template <class S, Shape shape, bool has_residual, bool has_relu>
__device__ __forceinline__ void normalize_block(const NormalizeArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.channels;
    for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
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
            y.store(a.y + place);
        }
    });
}

/// y = act(gamma (x - mean) inv_std + beta + residual)
template <class S>
__device__ void batch_norm_normalize(const NormalizeArgs<S>& a) {
    with_shape(a.pack, [&](auto of) {
        constexpr Shape shape = decltype(of)::value;
        if (a.residual != nullptr) {
            if (a.relu) normalize_block<S, shape, true, true>(a);
            else normalize_block<S, shape, true, false>(a);
        } else {
            if (a.relu) normalize_block<S, shape, false, true>(a);
            else normalize_block<S, shape, false, false>(a);
        }
    });
}

// ---- Backward ----------------------------------------------------------------------------------------------------------------

/// Where the relu's mask comes from; the numbers are the wrapper's.
enum Mask : uint32_t {
    kNoMask = 0,     // there is no relu
    kOutput = 1,     // the forward's output
    kRecompute = 2,  // the forward's input, normalised again
};

/// What both backward passes read.
template <class S, class T = Arithmetic<S>>
struct Upstream {
    const S* x;
    const S* y;  // null unless the mask is kOutput
    const S* dy;
    const T* gamma;
    const T* beta;  // null unless the mask is kRecompute
    const T* mean;
    const T* inv_std;
};

/// The per-channel values that the mask needs, loaded once, and dz = dy where the relu passed.
template <class Group, Mask mask>
struct Masked {
    Group mean, scale, beta;

    template <class S>
    __device__ __forceinline__ Masked(const Upstream<S>& u, uint32_t c) {
        mean = Group::load(u.mean + c);
        if (mask == kRecompute) {
            const Group gamma = Group::load(u.gamma + c), inv_std = Group::load(u.inv_std + c);
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) scale.v[k] = gamma.v[k] * inv_std.v[k];
            beta = Group::load(u.beta + c);
        }
    }

    /// What decides where the relu passed: its output, or its input.
    template <class S>
    __device__ __forceinline__ Group edge(const Upstream<S>& u, uint64_t place, const Group& x) const {
        Group edge = {};
        if (mask == kOutput) {
            edge = Group::load(u.y + place);
        } else if (mask == kRecompute) {
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) edge.v[k] = affine(x.v[k], mean.v[k], scale.v[k], beta.v[k]);
        }
        return edge;
    }

    /// `value` where the relu passed, else 0.
    __device__ __forceinline__ Group passed(const Group& edge, Group value) const {
        if (mask != kNoMask) {
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) value.v[k] = relu_gradient(edge.v[k], value.v[k]);
        }
        return value;
    }

    template <class S>
    __device__ __forceinline__ Group dz(const Upstream<S>& u, uint64_t place, const Group& x) const {
        return passed(edge(u, place, x), Group::load(u.dy + place));
    }
};

/// What becomes of the gradient of the residual, which is dz; the numbers are the wrapper's.
enum Residual : uint32_t { kNone = 0, kWrite = 1, kAccumulate = 2 };

/// The tangents of what the backward passes read; all null in the backward itself.
template <class S, class T = Arithmetic<S>>
struct UpstreamTangent {
    const S* x;
    const S* dy;
    const T* gamma;
    const T* mean;
    const T* inv_std;
};

template <class S>
struct SumsArgs {
    Upstream<S> upstream;
    UpstreamTangent<S> tangent;
    S* residual;   // null where there is none
    double* dz;    // [blocks, channels]: sums of dz, or of their tangents
    double* dz_x;  // [blocks, channels]: sums of dz (x - mean), or of their tangents
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
    uint32_t mask;
    uint32_t residual_mode;
};

/// Two sums that are always taken together.
struct Sums {
    double dz, dz_x;
};

__device__ __forceinline__ Sums add(const Sums& a, const Sums& b) { return {a.dz + b.dz, a.dz_x + b.dz_x}; }

template <class S, Shape shape, bool tangent, Mask mask, Residual residual>
__device__ __forceinline__ void sums_of_block(const SumsArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.channels;
    // Adds one run's sums to `totals_dz[0..]` and `totals_dz_x[0..]`.
    const auto add_run = [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count, double* totals_dz,
                             double* totals_dz_x) {
        typedef typename decltype(of)::type Group;
        const Masked<Group, mask> masked(a.upstream, c);
        Group sum = {}, sum_x = {}, mean_tangent = {};
        if (tangent) mean_tangent = Group::load(a.tangent.mean + c);
        uint64_t place = row * channels + c;
#pragma unroll 2
        for (uint32_t i = 0; i < count; ++i, place += step * channels) {
            const Group x = Group::load(a.upstream.x + place);
            const Group edge = masked.edge(a.upstream, place, x);
            const Group dy = masked.passed(edge, Group::load(a.upstream.dy + place));
            Group dz = dy;
            if (tangent) dz = masked.passed(edge, Group::load(a.tangent.dy + place));
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) {
                sum.v[k] = sum.v[k] + dz.v[k];
                sum_x.v[k] = sum_x.v[k] + dz.v[k] * (x.v[k] - masked.mean.v[k]);
            }
            if (tangent) {
                const Group x_tangent = Group::load(a.tangent.x + place);
                POLDER_UNROLL
                for (int k = 0; k < Group::items; ++k) {
                    sum_x.v[k] = sum_x.v[k] + dy.v[k] * (x_tangent.v[k] - mean_tangent.v[k]);
                }
            }
            if (residual == kWrite) {
                dz.store(a.residual + place);
            } else if (residual == kAccumulate) {
                Group total = Group::load(a.residual + place);
                POLDER_UNROLL
                for (int k = 0; k < Group::items; ++k) total.v[k] = total.v[k] + dz.v[k];
                total.store(a.residual + place);
            }
        }
        alignas(Group) T sums[Group::channels];
        alignas(Group) T sums_x[Group::channels];
        sum.store(sums);
        sum_x.store(sums_x);
        POLDER_UNROLL
        for (int k = 0; k < Group::channels; ++k) {
            totals_dz[k] += double(sums[k]);
            totals_dz_x[k] += double(sums_x[k]);
        }
    };
    double* const block_dz = a.dz + uint64_t(blockIdx.x) * channels;
    double* const block_dz_x = a.dz_x + uint64_t(blockIdx.x) * channels;
    if constexpr (shape == kCpu) {
        for (uint64_t c = 0; c < channels; ++c) block_dz[c] = block_dz_x[c] = 0.0;
        for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
            add_run(of, c, row, step, count, block_dz + c, block_dz_x + c);
        });
    } else {
        constexpr int V = shape == kFour ? 4 : 1;
        POLDER_DYNAMIC_SHARED(Sums, shared);
        double totals_dz[V] = {}, totals_dz_x[V] = {};
        for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
            add_run(of, c, row, step, count, totals_dz, totals_dz_x);
        });
        const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * V;
        POLDER_UNROLL
        for (int k = 0; k < V; ++k) {
            const Sums all = combine_lines(Sums{totals_dz[k], totals_dz_x[k]}, shared, add);
            if (threadIdx.y == 0 && c < channels) {
                block_dz[c + k] = all.dz;
                block_dz_x[c + k] = all.dz_x;
            }
        }
    }
}

template <class S, Shape shape, bool tangent, Mask mask>
__device__ __forceinline__ void sums_with_residual(const SumsArgs<S>& a) {
    if (a.residual_mode == kNone) sums_of_block<S, shape, tangent, mask, kNone>(a);
    else if (a.residual_mode == kWrite) sums_of_block<S, shape, tangent, mask, kWrite>(a);
    else sums_of_block<S, shape, tangent, mask, kAccumulate>(a);
}

template <class S, bool tangent>
__device__ __forceinline__ void sums(const SumsArgs<S>& a) {
    with_shape(a.pack, [&](auto of) {
        constexpr Shape shape = decltype(of)::value;
        if (a.mask == kOutput) sums_with_residual<S, shape, tangent, kOutput>(a);
        else if (a.mask == kRecompute) sums_of_block<S, shape, tangent, kRecompute, kNone>(a);  // there was no residual
        else sums_with_residual<S, shape, tangent, kNoMask>(a);
    });
}

/// Every block's sums of dz and dz (x - mean) per channel, and the residual's gradient.
template <class S>
__device__ void batch_norm_sums(const SumsArgs<S>& a) {
    sums<S, false>(a);
}

/// The tangents of these: every block's sums of dz' and dz' (x - mean) + dz (x' - mean') per channel, and dz'. The relu has no
/// second derivative, so dz' = dy' where it passed.
template <class S>
__device__ void batch_norm_sums_tangent(const SumsArgs<S>& a) {
    sums<S, true>(a);
}

template <class T>
struct ParametersArgs {
    const double* dz;
    const double* dz_x;
    const T* inv_std;
    T* dgamma;
    T* dbeta;
    uint32_t channels;
    uint32_t blocks;
};

/// Calls `write(c, sums)` with the blocks' sums of every channel combined. GPU: a block per channel.
template <class F>
__device__ __forceinline__ void combine_blocks(const double* dz, const double* dz_x, uint32_t channels, uint32_t blocks,
                                               const F& write) {
    const auto sums_of = [&](uint32_t block, uint32_t c) -> Sums {
        const uint64_t place = uint64_t(block) * channels + c;
        return {dz[place], dz_x[place]};
    };
#if defined(POLDER_HOST)
    if (blockDim.y == 1) {
        for_each_index(channels, [&](uint64_t c) {
            Sums all = {0.0, 0.0};
            for (uint32_t block = 0; block < blocks; ++block) all = add(all, sums_of(block, uint32_t(c)));
            write(uint32_t(c), all);
        });
        return;
    }
#endif
    POLDER_DYNAMIC_SHARED(Sums, shared);
    const uint32_t c = blockIdx.x;
    Sums all = {0.0, 0.0};
    for (uint32_t block = threadIdx.y; block < blocks; block += blockDim.y) all = add(all, sums_of(block, c));
    all = combine_lines(all, shared, add);
    if (threadIdx.y == 0) write(c, all);
}

/// dbeta = sum dz, dgamma = sum dz xhat, from the blocks' sums.
template <class T>
__device__ void batch_norm_parameters(const ParametersArgs<T>& a) {
    combine_blocks(a.dz, a.dz_x, a.channels, a.blocks, [&](uint32_t c, const Sums& all) {
        a.dbeta[c] = T(all.dz);
        a.dgamma[c] = T(all.dz_x * double(a.inv_std[c]));
    });
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

/// dbeta' = sum dz'. dgamma' = inv_std (sum dz (x - mean))' + inv_std' sum dz (x - mean), the latter sum being dgamma / inv_std.
template <class T>
__device__ void batch_norm_parameters_tangent(const ParametersTangentArgs<T>& a) {
    combine_blocks(a.dz, a.dz_x, a.channels, a.blocks, [&](uint32_t c, const Sums& all) {
        const double inv_std = double(a.inv_std[c]), relative = double(a.inv_std_tangent[c]) / inv_std;
        a.dbeta_tangent[c] = T(all.dz);
        a.dgamma_tangent[c] = T(all.dz_x * inv_std + double(a.dgamma[c]) * relative);
    });
}

template <class S, class T = Arithmetic<S>>
struct InputArgs {
    Upstream<S> upstream;
    const T* dgamma;
    const T* dbeta;
    S* dx;
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
    uint32_t mask;
    uint32_t train;
};

template <class S, Shape shape, Mask mask, bool train>
__device__ __forceinline__ void input_of_block(const InputArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.channels;
    for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
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
            if (train || mask == kRecompute) x = Group::load(a.upstream.x + place);
            Group dx = masked.dz(a.upstream, place, x);
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) {
                if (train) dx.v[k] = dx.v[k] - mean_dz.v[k] - (x.v[k] - masked.mean.v[k]) * slope.v[k];
                dx.v[k] = dx.v[k] * scale.v[k];
            }
            dx.store(a.dx + place);
        }
    });
}

template <class S, Shape shape, Mask mask>
__device__ __forceinline__ void input_in_mode(const InputArgs<S>& a) {
    if (a.train) input_of_block<S, shape, mask, true>(a);
    else input_of_block<S, shape, mask, false>(a);
}

/// dx = gamma inv_std (dz - mean(dz) - xhat mean(dz xhat)) in training, gamma inv_std dz in evaluation.
template <class S>
__device__ void batch_norm_input(const InputArgs<S>& a) {
    with_shape(a.pack, [&](auto of) {
        constexpr Shape shape = decltype(of)::value;
        if (a.mask == kOutput) input_in_mode<S, shape, kOutput>(a);
        else if (a.mask == kRecompute) input_in_mode<S, shape, kRecompute>(a);
        else input_in_mode<S, shape, kNoMask>(a);
    });
}

template <class S, class T = Arithmetic<S>>
struct InputTangentArgs {
    Upstream<S> upstream;
    UpstreamTangent<S> tangent;
    const T* dgamma;  // these four are read in training alone
    const T* dbeta;
    const T* dgamma_tangent;
    const T* dbeta_tangent;
    S* dx_tangent;
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
    uint32_t mask;
    uint32_t train;
};

template <class S, Shape shape, Mask mask, bool train>
__device__ __forceinline__ void input_tangent_of_block(const InputTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.channels;
    for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
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
                const T share = T(1.0 / double(a.rows));
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
            if (train || mask == kRecompute) x = Group::load(a.upstream.x + place);
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
            dx.store(a.dx_tangent + place);
        }
    });
}

template <class S, Shape shape, Mask mask>
__device__ __forceinline__ void input_tangent_in_mode(const InputTangentArgs<S>& a) {
    if (a.train) input_tangent_of_block<S, shape, mask, true>(a);
    else input_tangent_of_block<S, shape, mask, false>(a);
}

/// dx', the tangent of batch_norm_input's result.
template <class S>
__device__ void batch_norm_input_tangent(const InputTangentArgs<S>& a) {
    with_shape(a.pack, [&](auto of) {
        constexpr Shape shape = decltype(of)::value;
        if (a.mask == kOutput) input_tangent_in_mode<S, shape, kOutput>(a);
        else if (a.mask == kRecompute) input_tangent_in_mode<S, shape, kRecompute>(a);
        else input_tangent_in_mode<S, shape, kNoMask>(a);
    });
}

// ---- Tangent of the forward --------------------------------------------------------------------------------------------------

template <class T>
struct StatisticsTangentArgs {
    const double* x;    // the blocks' sums of x'
    const double* x_x;  // the blocks' sums of x' (x - mean)
    const T* inv_std;
    T* mean_tangent;
    T* inv_std_tangent;
    uint64_t rows;
    uint32_t channels;
    uint32_t blocks;
};

/// mean' = mean(x'), inv_std' = -inv_std^3 mean(x' (x - mean)), from the sums that batch_norm_sums takes of dz = x'.
template <class T>
__device__ void batch_norm_statistics_tangent(const StatisticsTangentArgs<T>& a) {
    combine_blocks(a.x, a.x_x, a.channels, a.blocks, [&](uint32_t c, const Sums& all) {
        const double inv_std = double(a.inv_std[c]), rows = double(a.rows);
        a.mean_tangent[c] = T(all.dz / rows);
        a.inv_std_tangent[c] = T(-inv_std * inv_std * inv_std * (all.dz_x / rows));
    });
}

template <class S, class T = Arithmetic<S>>
struct NormalizeTangentArgs {
    Upstream<S> upstream;        // without dy
    UpstreamTangent<S> tangent;  // without dy
    const T* beta_tangent;
    const S* residual_tangent;  // or null
    S* y_tangent;
    uint64_t rows;
    uint32_t channels;
    uint32_t pack;
    uint32_t mask;
};

template <class S, Shape shape, Mask mask, bool has_residual>
__device__ __forceinline__ void normalize_tangent_block(const NormalizeTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.channels;
    for_each_run<T, shape>(a.rows, a.channels, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
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
            masked.passed(masked.edge(a.upstream, place, x), z).store(a.y_tangent + place);
        }
    });
}

template <class S, Shape shape, Mask mask>
__device__ __forceinline__ void normalize_tangent_with_residual(const NormalizeTangentArgs<S>& a) {
    if (a.residual_tangent != nullptr) normalize_tangent_block<S, shape, mask, true>(a);
    else normalize_tangent_block<S, shape, mask, false>(a);
}

/// y' = (gamma inv_std)' (x - mean) + gamma inv_std (x' - mean') + beta' + residual' where the relu passed, else 0
template <class S>
__device__ void batch_norm_normalize_tangent(const NormalizeTangentArgs<S>& a) {
    with_shape(a.pack, [&](auto of) {
        constexpr Shape shape = decltype(of)::value;
        if (a.mask == kOutput) normalize_tangent_with_residual<S, shape, kOutput>(a);
        else if (a.mask == kRecompute) normalize_tangent_block<S, shape, kRecompute, false>(a);  // there was no residual
        else normalize_tangent_with_residual<S, shape, kNoMask>(a);
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
POLDER_KERNEL(batch_norm_sums_f32, batch_norm_sums<float>, SumsArgs<float>)
POLDER_KERNEL(batch_norm_sums_f16, batch_norm_sums<__half>, SumsArgs<__half>)
POLDER_KERNEL(batch_norm_sums_bf16, batch_norm_sums<__nv_bfloat16>, SumsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_sums_f64, batch_norm_sums<double>, SumsArgs<double>)
POLDER_KERNEL(batch_norm_parameters_f32, batch_norm_parameters<float>, ParametersArgs<float>)
POLDER_HOST_KERNEL(batch_norm_parameters_f64, batch_norm_parameters<double>, ParametersArgs<double>)
POLDER_KERNEL(batch_norm_input_f32, batch_norm_input<float>, InputArgs<float>)
POLDER_KERNEL(batch_norm_input_f16, batch_norm_input<__half>, InputArgs<__half>)
POLDER_KERNEL(batch_norm_input_bf16, batch_norm_input<__nv_bfloat16>, InputArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_input_f64, batch_norm_input<double>, InputArgs<double>)
POLDER_KERNEL(batch_norm_sums_tangent_f32, batch_norm_sums_tangent<float>, SumsArgs<float>)
POLDER_KERNEL(batch_norm_sums_tangent_f16, batch_norm_sums_tangent<__half>, SumsArgs<__half>)
POLDER_KERNEL(batch_norm_sums_tangent_bf16, batch_norm_sums_tangent<__nv_bfloat16>, SumsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_sums_tangent_f64, batch_norm_sums_tangent<double>, SumsArgs<double>)
POLDER_KERNEL(batch_norm_parameters_tangent_f32, batch_norm_parameters_tangent<float>, ParametersTangentArgs<float>)
POLDER_HOST_KERNEL(batch_norm_parameters_tangent_f64, batch_norm_parameters_tangent<double>, ParametersTangentArgs<double>)
POLDER_KERNEL(batch_norm_input_tangent_f32, batch_norm_input_tangent<float>, InputTangentArgs<float>)
POLDER_KERNEL(batch_norm_input_tangent_f16, batch_norm_input_tangent<__half>, InputTangentArgs<__half>)
POLDER_KERNEL(batch_norm_input_tangent_bf16, batch_norm_input_tangent<__nv_bfloat16>, InputTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_input_tangent_f64, batch_norm_input_tangent<double>, InputTangentArgs<double>)
POLDER_KERNEL(batch_norm_statistics_tangent_f32, batch_norm_statistics_tangent<float>, StatisticsTangentArgs<float>)
POLDER_HOST_KERNEL(batch_norm_statistics_tangent_f64, batch_norm_statistics_tangent<double>, StatisticsTangentArgs<double>)
POLDER_KERNEL(batch_norm_normalize_tangent_f32, batch_norm_normalize_tangent<float>, NormalizeTangentArgs<float>)
POLDER_KERNEL(batch_norm_normalize_tangent_f16, batch_norm_normalize_tangent<__half>, NormalizeTangentArgs<__half>)
POLDER_KERNEL(batch_norm_normalize_tangent_bf16, batch_norm_normalize_tangent<__nv_bfloat16>, NormalizeTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(batch_norm_normalize_tangent_f64, batch_norm_normalize_tangent<double>, NormalizeTangentArgs<double>)
