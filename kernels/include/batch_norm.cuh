// Code that batch normalisation and its tangents share: the division of the work, the relu's mask, and sums over rows.
//
// All sums have two levels: at most kRun rows in the working precision, and everything beyond that in double. Their
// order depends only on the launch shape. Everything that would need a division, for each thread, is an argument.
//
// A block takes a contiguous range of rows. On the GPU its threads form columns of channel groups and lines of rows. On
// the CPU its one thread takes the range in runs of kRun rows, with as many channels at a time as fit in vector
// registers: where these are all channels, the range is read and written as one contiguous stream.
#pragma once
#include "elementwise.cuh"
#include "ticket.cuh"

namespace {

/// Rows that are summed in the working precision before the sum continues in double. So few keep the rounding error
/// near that of one addition.
constexpr uint32_t kRun = 64;

/// Rows of a run on the CPU where nothing is summed and the channels are several groups: so few that memory is accessed
/// nearly in its order, but enough for what is loaded once per group.
constexpr uint32_t kMappedRun = 4;

// ---- Channel groups, the unit of arithmetic: scalars in a GPU thread, vectors on the CPU ----------------------------

/// N neighbouring channels.
template <class T, int N>
struct Scalars : Pack<T, N> {
    typedef T Item;
    static constexpr int channels = N, items = N;

    /// In accesses of at most 16 bytes: more would need a wider alignment.
    template <class S>
    static __device__ __forceinline__ Scalars load(const S* p) {
        constexpr int at_once = N < kPack<S> ? N : kPack<S>;
        Scalars group;
        POLDER_UNROLL
        for (int i = 0; i < N; i += at_once) {
            const Pack<T, at_once> pack = fetch<at_once>(p, i);
            POLDER_UNROLL
            for (int k = 0; k < at_once; ++k) group.v[i + k] = pack.v[k];
        }
        return group;
    }
    template <class S>
    __device__ __forceinline__ void store(S* p) const {
        put(p, 0, static_cast<const Pack<T, N>&>(*this));
    }
    /// Stores to a row of a tensor, whose rows are written one after the other.
    template <class S>
    __device__ __forceinline__ void store_row(S* p) const {
        store(p);
    }
};

#if defined(POLDER_HOST)
// A vector, and vectors of neighbouring channels at a time: more would not leave enough registers for sums and for the
// values of each channel.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kMostVectors = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kMostVectors = 2;
#else
constexpr int kVectorBytes = 16, kMostVectors = 2;
#endif

/// Prefetches a line that is soon written, given one that is written now: a store needs the line's old content. A
/// quarter of each page, two pages ahead, is enough. The CPU's own prefetcher goes on from there.
__forceinline__ void fetch_written(uintptr_t line) {
    constexpr uintptr_t page = 4096;
    if (line % page < page / 4) __builtin_prefetch(reinterpret_cast<const void*>(line + 2 * page), 1, 3);
}

/// K vector registers of neighbouring channels.
template <class T, int K>
struct Vectors {
    typedef T Item __attribute__((vector_size(kVectorBytes)));
    static constexpr int width = kVectorBytes / sizeof(T), channels = K * width, items = K;
    Item v[K];

    // One vector at a time: gcc would copy the whole struct through the stack, in pieces for which a wider load has to
    // wait.
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
    template <class S>
    __forceinline__ void store_row(S* p) const {
        constexpr int line = 64;
        for (int at = 0; at < channels * int(sizeof(S)); at += line) fetch_written(reinterpret_cast<uintptr_t>(p) + at);
        store(p);
    }
};
#endif

/// Passes a group's type to a call.
template <class Group>
struct Of {
    typedef Group type;
};

/// The rows and channels of a launch, and how it divides them.
struct BatchNormRows {
    uint64_t rows;
    double inverse;  // 1 / rows
    uint32_t channels;
    uint32_t block_rows;  // of every block but the last, which may have fewer
    uint32_t pack;        // channels of a GPU's thread; 0 in the CPU's launch shape
};

/// The rows of this block.
struct RowRange {
    uint64_t begin, end;
};

__device__ __forceinline__ RowRange rows_of_block(const BatchNormRows& a) {
    const uint64_t begin = uint64_t(blockIdx.x) * a.block_rows, end = begin + a.block_rows;
    return {begin, end < a.rows ? end : a.rows};
}

/// How a launch divides the channels: in the CPU's launch shape, or on the GPU with so many for each thread.
enum LaunchShape { kCpu = 0, kSingle = 1, kFour = 4, kEight = 8 };

template <LaunchShape shape>
struct LaunchShapeIs {
    static constexpr LaunchShape value = shape;
};

/// Calls `f(LaunchShapeIs<...>{})` for the shape that Rust chose.
template <class S, class F>
__device__ __forceinline__ void with_launch_shape(const BatchNormRows& a, const F& f) {
#if defined(POLDER_HOST)
    if (a.pack == kCpu) return f(LaunchShapeIs<kCpu>{});
#endif
#if !defined(POLDER_HOST) || defined(POLDER_EMULATES_GPU)
    if constexpr (sizeof(S) == 2) {
        if (a.pack == kEight) return f(LaunchShapeIs<kEight>{});
    }
    if (a.pack == kFour) f(LaunchShapeIs<kFour>{});
    else f(LaunchShapeIs<kSingle>{});
#endif
}

/// Calls `f(Of<Group>{}, first channel, first row, step, count)` for runs of at most kRun rows that cover this thread's
/// share. On the CPU these are all channels of the block's rows, of which `run` are a run, on the GPU the channels of
/// one group in every blockDim.y-th row.
template <class S, LaunchShape shape, class F>
__device__ __forceinline__ void for_each_run(const BatchNormRows& a, const F& f, [[maybe_unused]] uint32_t run = kRun) {
    typedef Arithmetic<S> T;
    const RowRange mine = rows_of_block(a);
    const uint32_t channels = a.channels;
#if defined(POLDER_HOST)
    if constexpr (shape == kCpu) {
        typedef Vectors<T, kMostVectors> Most;
        typedef Vectors<T, kMostVectors / 2> Half;
        typedef Vectors<T, 1> One;
        for (uint64_t row = mine.begin; row < mine.end; row += run) {
            const uint32_t count = uint32_t(min(uint64_t(run), mine.end - row));
            uint32_t c = 0;
            for (; c + Most::channels <= channels; c += Most::channels) f(Of<Most>{}, c, row, 1u, count);
            if constexpr (kMostVectors > 2) {
                for (; c + Half::channels <= channels; c += Half::channels) f(Of<Half>{}, c, row, 1u, count);
            }
            for (; c + One::channels <= channels; c += One::channels) f(Of<One>{}, c, row, 1u, count);
            for (; c < channels; ++c) f(Of<Scalars<T, 1>>{}, c, row, 1u, count);
        }
        return;
    }
#endif
    typedef Scalars<T, shape == kCpu ? 1 : int(shape)> Group;  // the CPU's shape has returned
    const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * Group::channels;
    if (c >= channels) return;
    // Fewer than 2^32 rows, so that their division is one of 32 bits.
    const uint32_t step = blockDim.y, all = mine.begin < mine.end ? uint32_t(mine.end - mine.begin) : 0;
    uint32_t left = threadIdx.y < all ? (all - threadIdx.y - 1) / step + 1 : 0;
    for (uint64_t row = mine.begin + threadIdx.y; left > 0; row += uint64_t(step) * kRun) {
        const uint32_t count = min(kRun, left);
        f(Of<Group>{}, c, row, step, count);
        left -= count;
    }
}

/// The same where nothing is summed.
template <class S, LaunchShape shape, class F>
__device__ __forceinline__ void map_rows(const BatchNormRows& a, const F& f) {
    uint32_t run = kRun;
#if defined(POLDER_HOST)
    typedef Vectors<Arithmetic<S>, kMostVectors> Most;
    if (shape == kCpu && a.channels > uint32_t(Most::channels)) run = kMappedRun;
#endif
    for_each_run<S, shape>(a, f, run);
}

// ---- The relu's mask ------------------------------------------------------------------------------------------------

/// The normalised value before the residual and the relu. Forward and backward share it, so that the backward's mask
/// has the bits of the forward's. The GPU's compiler must not choose the contraction.
template <class Item>
__device__ __forceinline__ Item affine(Item x, Item mean, Item scale, Item beta) {
#if defined(POLDER_HOST)
    return (x - mean) * scale + beta;
#else
    return fmaf(x - mean, scale, beta);
#endif
}

/// The relu's gradient, by its input or its output.
template <class Item>
__device__ __forceinline__ Item relu_gradient(Item z, Item dy) {
    const Item zero = {};
    return z <= zero ? zero : dy;
}

/// The inputs of both backward passes.
template <class S, class T = Arithmetic<S>>
struct Upstream {
    const S* x;
    const S* y;  // null unless the mask is kMaskOutput
    const S* dy;
    const T* gamma;
    const T* beta;  // null unless the mask is kMaskRecompute
    const T* mean;
    const T* inv_std;
};

/// The mask, with the per-channel values that it needs, which are loaded once: dz = dy where the relu passed.
template <class Group, Mask mask>
struct Masked {
    Group mean, scale, beta;

    template <class S>
    __device__ __forceinline__ Masked(const Upstream<S>& u, uint32_t c) {
        mean = Group::load(u.mean + c);
        if (mask == kMaskRecompute) {
            const Group gamma = Group::load(u.gamma + c), inv_std = Group::load(u.inv_std + c);
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) scale.v[k] = gamma.v[k] * inv_std.v[k];
            beta = Group::load(u.beta + c);
        }
    }

    /// The value that decides where the relu passed: its output, or its input.
    template <class S>
    __device__ __forceinline__ Group edge(const Upstream<S>& u, uint64_t place, const Group& x) const {
        Group edge = {};
        if (mask == kMaskOutput) {
            edge = Group::load(u.y + place);
        } else if (mask == kMaskRecompute) {
            POLDER_UNROLL
            for (int k = 0; k < Group::items; ++k) edge.v[k] = affine(x.v[k], mean.v[k], scale.v[k], beta.v[k]);
        }
        return edge;
    }

    /// `value` where the relu passed, else 0.
    __device__ __forceinline__ Group passed(const Group& edge, Group value) const {
        if (mask != kMaskNone) {
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

// ---- Sums over rows, combined in double -----------------------------------------------------------------------------

/// Two sums that are always taken together.
struct TwoSums {
    double v[2];
};

__device__ __forceinline__ TwoSums add(const TwoSums& a, const TwoSums& b) {
    return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}};
}

/// Adds the sums up over the lines of a block (threadIdx.y), for the threads of line 0. The shared memory has room for
/// all sums of all threads.
template <int N>
__device__ __forceinline__ void add_lines(TwoSums (&sums)[N]) {
    POLDER_DYNAMIC_SHARED(TwoSums, shared);  // [N][threads]
    const uint32_t place = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    POLDER_UNROLL
    for (int k = 0; k < N; ++k) shared[k * threads + place] = sums[k];
    for (uint32_t lines = blockDim.y; lines > 1;) {
        const uint32_t half = (lines + 1) / 2;
        __syncthreads();
        if (threadIdx.y + half < lines) {
            POLDER_UNROLL
            for (int k = 0; k < N; ++k) {
                TwoSums* const own = shared + k * threads + place;
                *own = add(*own, own[half * blockDim.x]);
            }
        }
        lines = half;
    }
    __syncthreads();  // before the next use of `shared`
    POLDER_UNROLL
    for (int k = 0; k < N; ++k) sums[k] = shared[k * threads + place];
}

/// The tangents of the inputs of the backward passes; all null in the backward itself.
template <class S, class T = Arithmetic<S>>
struct UpstreamTangent {
    const S* x;
    const S* dy;
    const T* gamma;
    const T* mean;
    const T* inv_std;
};

template <class S>
struct BatchNormSumsArgs {
    Upstream<S> upstream;
    UpstreamTangent<S> tangent;
    S* residual;   // null if there is none
    double* dz;    // [blocks, channels]: sums of dz, or of their tangents
    double* dz_x;  // [blocks, channels]: sums of dz (x - mean), or of their tangents
    BatchNormRows rows;
    uint32_t mask;
    uint32_t residual_mode;
    Arithmetic<S>* dgamma;  // these three are null if another kernel combines the sums
    Arithmetic<S>* dbeta;
    uint32_t* tickets;
    uint32_t group;  // blocks whose sums the last of them combines
};

template <class S, LaunchShape shape, bool tangent, Mask mask, Residual residual>
__device__ __forceinline__ void sums_of_block(const BatchNormSumsArgs<S>& a) {
    typedef Arithmetic<S> T;
    const uint64_t channels = a.rows.channels;
    // Adds the sums of one run to `totals_dz[0..]` and `totals_dz_x[0..]`.
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
            if (residual == kResidualWrite) {
                dz.store_row(a.residual + place);
            } else if (residual == kResidualAccumulate) {
                Group total = Group::load(a.residual + place);
                POLDER_UNROLL
                for (int k = 0; k < Group::items; ++k) total.v[k] = total.v[k] + dz.v[k];
                total.store_row(a.residual + place);
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
        for_each_run<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
            add_run(of, c, row, step, count, block_dz + c, block_dz_x + c);
        });
    } else {
        constexpr int V = shape;
        double totals_dz[V] = {}, totals_dz_x[V] = {};
        for_each_run<S, shape>(a.rows, [&](auto of, uint32_t c, uint64_t row, uint32_t step, uint32_t count) {
            add_run(of, c, row, step, count, totals_dz, totals_dz_x);
        });
        TwoSums totals[V];
        POLDER_UNROLL
        for (int k = 0; k < V; ++k) totals[k] = {{totals_dz[k], totals_dz_x[k]}};
        add_lines(totals);
        const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * V;
        if (threadIdx.y != 0 || c >= channels) return;
        POLDER_UNROLL
        for (int k = 0; k < V; ++k) {
            block_dz[c + k] = totals[k].v[0];
            block_dz_x[c + k] = totals[k].v[1];
        }
    }
}

template <class S, LaunchShape shape, bool tangent, Mask mask>
__device__ __forceinline__ void sums_with_residual(const BatchNormSumsArgs<S>& a) {
    if (a.residual_mode == kResidualNone) sums_of_block<S, shape, tangent, mask, kResidualNone>(a);
    else if (a.residual_mode == kResidualWrite) sums_of_block<S, shape, tangent, mask, kResidualWrite>(a);
    else sums_of_block<S, shape, tangent, mask, kResidualAccumulate>(a);
}

template <class S, bool tangent>
__device__ __forceinline__ void sums(const BatchNormSumsArgs<S>& a) {
    with_launch_shape<S>(a.rows, [&](auto of) {
        constexpr LaunchShape shape = decltype(of)::value;
        if (a.mask == kMaskOutput) sums_with_residual<S, shape, tangent, kMaskOutput>(a);
        else if (a.mask == kMaskRecompute)
            sums_of_block<S, shape, tangent, kMaskRecompute, kResidualNone>(a);  // there was no residual
        else sums_with_residual<S, shape, tangent, kMaskNone>(a);
    });
}

// ---- Sums over blocks: by the last block, or by another kernel ------------------------------------------------------

/// The last of `blocks` blocks that calls this computes dbeta = sum dz and dgamma = sum dz xhat from the sums of all
/// blocks in `a.dz` and `a.dz_x`; the calling block is number `block`. The order of the sums does not depend on which
/// block is the last. One block would take too long for all the sums of a large layer, so the last block of each group
/// combines the sums of the group, and the last of those blocks combines the groups. `combine(first, count, step,
/// write)` calls `write(c, sums)` with the sums of `count` blocks, `step` apart, beginning with `first`, for all
/// channels that these blocks share.
template <class S, class Combine>
__device__ __forceinline__ void combine_by_last(const BatchNormSumsArgs<S>& a, uint32_t* tickets, uint32_t block,
                                                uint32_t blocks, const Combine& combine) {
    typedef Arithmetic<S> T;
    const auto finish = [&](uint64_t c, const TwoSums& all) {
        a.dbeta[c] = T(all.v[0]);
        a.dgamma[c] = T(all.v[1] * double(a.upstream.inv_std[c]));
    };
    const uint32_t groups = (blocks + a.group - 1) / a.group;
    const uint32_t group = block / a.group, first = group * a.group, members = min(a.group, blocks - first);
    if (!is_last_block(tickets + group, members)) return;
    if (groups == 1) return combine(0, members, 1, finish);
    combine(first, members, 1, [&](uint64_t c, const TwoSums& all) {
        a.dz[uint64_t(first) * a.rows.channels + c] = all.v[0];
        a.dz_x[uint64_t(first) * a.rows.channels + c] = all.v[1];
    });
    if (is_last_block(tickets + groups, groups)) combine(0, groups, a.group, finish);
}

/// The tickets of one column of blocks, of `blocks` in all columns.
__device__ __forceinline__ uint32_t tickets_of_column(uint32_t blocks, uint32_t group) {
    return (blocks + group - 1) / group + 1;
}

/// The same for a launch of `batch_norm_sums`.
template <class S, LaunchShape shape>
__device__ __forceinline__ void finish_parameters(const BatchNormSumsArgs<S>& a) {
    const uint64_t channels = a.rows.channels;
    const auto combine = [&](uint64_t first, uint32_t count, uint32_t step, auto write) {
        double* const dz = a.dz + first * channels;
        double* const dz_x = a.dz_x + first * channels;
        const uint64_t pitch = step * channels;
        if constexpr (shape == kCpu) {
            for (uint32_t i = 1; i < count; ++i) {
                for (uint64_t c = 0; c < channels; ++c) {
                    dz[c] += dz[i * pitch + c];
                    dz_x[c] += dz_x[i * pitch + c];
                }
            }
            for (uint64_t c = 0; c < channels; ++c) write(c, TwoSums{{dz[c], dz_x[c]}});
        } else {
            constexpr int V = shape;
            const uint64_t c = uint64_t(blockIdx.y * blockDim.x + threadIdx.x) * V;
            TwoSums all[V] = {};
            for (uint32_t i = threadIdx.y; c < channels && i < count; i += blockDim.y) {
                POLDER_UNROLL
                for (int k = 0; k < V; ++k) all[k] = add(all[k], {{dz[i * pitch + c + k], dz_x[i * pitch + c + k]}});
            }
            add_lines(all);
            if (threadIdx.y != 0 || c >= channels) return;
            POLDER_UNROLL
            for (int k = 0; k < V; ++k) write(c + k, all[k]);
        }
    };
    uint32_t* const tickets = a.tickets + blockIdx.y * tickets_of_column(gridDim.x, a.group);
    combine_by_last(a, tickets, blockIdx.x, gridDim.x, combine);
}

/// Calls `write(c, sums)` with the sum of `part(block, c)` over the blocks, for every channel. On the GPU there is a
/// block per channel.
template <class Part, class F>
__device__ __forceinline__ void add_blocks(uint32_t channels, uint32_t blocks, const Part& part, const F& write) {
#if defined(POLDER_HOST)
    if (blockDim.y == 1) {
        for_each_index(channels, [&](uint64_t c) {
            TwoSums all = {};
            for (uint32_t block = 0; block < blocks; ++block) all = add(all, part(block, uint32_t(c)));
            write(uint32_t(c), all);
        });
        return;
    }
#endif
    const uint32_t c = blockIdx.x;
    TwoSums all[1] = {};
    for (uint32_t block = threadIdx.y; block < blocks; block += blockDim.y) all[0] = add(all[0], part(block, c));
    add_lines(all);
    if (threadIdx.y == 0) write(c, all[0]);
}

}  // namespace
