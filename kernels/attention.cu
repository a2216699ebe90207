// Multi-head self-attention over short sequences of tokens (Vaswani et al. 2017), fused: forward, backward and the
// tangents of both. The matrix of scores never reaches memory.
//
// For a sample and a head, with rows q_i, k_j, v_j of `depth` numbers and a = 1/sqrt(depth):
//
//     s_ij = a q_i k_j,   p_ij = exp(s_ij - L_i),   o_i = sum_j p_ij v_j,   L_i = log sum_j exp(s_ij)
//     D_i = do_i o_i,     ds_ij = p_ij (do_i v_j - D_i)
//     dq_i = a sum_j ds_ij k_j,   dk_j = a sum_i ds_ij q_i,   dv_j = sum_i p_ij do_i
//
// The forward works tile by tile with a running maximum (online softmax: Milakov and Gimelshein 2018; Dao et al. 2022)
// and keeps L. The backward recomputes p from L. Blocks with a tile of queries compute dq, and blocks with a tile of
// keys compute dk and dv, so there are no atomics. The tangents (primes) follow by the product rule:
//
//     c_i = sum_j p_ij s'_ij,   p'_ij = p_ij (s'_ij - c_i),   o'_i = sum_j (p_ij s'_ij v_j + p_ij v'_j) - c_i o_i
//     ds'_ij = p'_ij (do_i v_j - D_i) + p_ij ((do_i v_j)' - D'_i)
//
// One program serves both devices: a team of threads (on the CPU one) computes products of tiles in shared memory. A
// thread of a GPU computes 4 x 4 results of a product at a time, the CPU's thread 6 x 16.
#include "include/exponential.cuh"
#include "include/reduce.cuh"

// Fused multiply-adds, if the instruction set has them, as in the convolution.
#if defined(POLDER_HOST)
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif
#endif

// The steps of the program are long. On the CPU they are functions of their own, which compile sooner.
#if defined(POLDER_HOST)
#define POLDER_STEP __attribute__((noinline))
#else
#define POLDER_STEP __forceinline__
#endif

namespace {

constexpr uint32_t kMaxDepth = kAttentionDepth;
/// Four more than the depth, so that the rows of neighbouring threads lie in other banks.
constexpr uint32_t kRow = kAttentionRow;
static_assert(kRow == kMaxDepth + 4, "see above");

/// The queries, keys and values of one tensor [batch, tokens, 3, heads, depth], with a bias [3, heads, depth].
template <class S, class T = Arithmetic<S>>
struct Projected {
    const S* p;
    const T* bias;
};

struct AttentionShape {
    uint32_t batch;
    uint32_t tokens;
    uint32_t heads;
    uint32_t depth;
};

/// Which of the three.
enum Part : uint32_t { kQuery = 0, kKey = 1, kValue = 2 };

/// A number of rows of one tile, and its first row.
struct Rows {
    uint32_t first, count;
};

/// The threads that work together, tiles of kTile rows and columns, and where in the grid's work they are.
template <class T, uint32_t kTile>
struct Team {
    static constexpr uint32_t tile = kTile;
    /// Elements of a row of scores.
    static constexpr uint32_t scores_row = kTile == kAttentionTile ? kTile + 1 : kTile;

    uint32_t thread, threads;
    const AttentionShape& shape;
    T* free;  // shared memory that is not taken yet

    __device__ __forceinline__ Team(const AttentionShape& of, T* shared)
        : thread(threadIdx.x), threads(blockDim.x), shape(of), free(shared) {}

    __device__ __forceinline__ T* take(uint32_t elements) {
        T* const taken = free;
        free += elements;
        return taken;
    }
    /// A tile of rows of `depth` numbers.
    __device__ __forceinline__ T* take_rows() { return take(kTile * kRow); }
    /// A tile of scores.
    __device__ __forceinline__ T* take_scores() { return take(kTile * scores_row); }

    __device__ __forceinline__ uint32_t tiles() const { return (shape.tokens + kTile - 1) / kTile; }
    __device__ __forceinline__ Rows rows_of(uint32_t tile_number) const {
        const uint32_t first = tile_number * kTile;
        return {first, min(kTile, shape.tokens - first)};
    }
    __device__ __forceinline__ uint32_t channels() const { return shape.heads * shape.depth; }
    __device__ __forceinline__ static uint32_t round_up(uint32_t n, uint32_t multiple) {
        return (n + multiple - 1) / multiple * multiple;
    }
    __device__ __forceinline__ void sync() const {
        if (threads > 1) __syncthreads();
    }

    /// Sets the rows to zero.
    __device__ __forceinline__ void clear(T* to, uint32_t count) const {
        const uint32_t n = round_up(count, 16) * kRow;
        for (uint32_t i = thread; i < n; i += threads) to[i] = T(0);
    }

    /// Rows [first, first + count) of a matrix, plus `bias` unless it is null, times `scale`. What lies behind the last
    /// row and column, up to multiples of 16, becomes zero.
    template <class S>
    __device__ POLDER_STEP void stage(T* to, const S* from, uint64_t stride, Rows rows, const T* bias, T scale) const {
        const uint32_t depth = shape.depth, width = round_up(depth, 16), n = round_up(rows.count, 16);
        if (threads == 1) {
            for (uint32_t r = 0; r < n; ++r) {
                T* __restrict__ row = to + r * kRow;
                const S* __restrict__ x = from + (rows.first + r) * stride;
                uint32_t c = 0;
                if (r < rows.count) {
                    if (bias != nullptr) {
                        for (; c < depth; ++c) row[c] = (widen(x[c]) + bias[c]) * scale;
                    } else {
                        for (; c < depth; ++c) row[c] = widen(x[c]) * scale;
                    }
                }
                for (; c < width; ++c) row[c] = T(0);
            }
            return;
        }
        for (uint32_t i = thread; i < n * width; i += threads) {
            const uint32_t r = i / width, c = i - r * width;
            T value = T(0);
            if (r < rows.count && c < depth) {
                value = widen(from[(rows.first + r) * stride + c]);
                if (bias != nullptr) value += bias[c];
            }
            to[r * kRow + c] = value * scale;
        }
    }

    /// One part of the queries, keys and values of a sample and a head.
    template <class S>
    __device__ __forceinline__ void stage(T* to, const Projected<S>& of, Part part, uint32_t sample, uint32_t head,
                                          Rows rows, T scale) const {
        const uint32_t place = (part * shape.heads + head) * shape.depth;
        const uint64_t stride = 3 * channels();
        stage(to, of.p + uint64_t(sample) * shape.tokens * stride + place, stride, rows,
              of.bias != nullptr ? of.bias + place : nullptr, scale);
    }

    /// Rows of an output [batch, tokens, heads, depth] of a sample and a head.
    template <class S>
    __device__ __forceinline__ void stage_output(T* to, const S* of, uint32_t sample, uint32_t head, Rows rows) const {
        const uint64_t stride = channels();
        stage(to, of + uint64_t(sample) * shape.tokens * stride + head * shape.depth, stride, rows,
              static_cast<const T*>(nullptr), T(1));
    }

    /// scores[r][c] = the dot product of row r of `left` and row c of `right`; or added to the scores. `flipped` is
    /// scratch for the CPU, which transposes `right` so that its columns can be multiplied by vectors.
    template <bool accumulate>
    __device__ POLDER_STEP void multiply_transposed(T* scores, const T* left, const T* right, uint32_t rows,
                                                    uint32_t columns, [[maybe_unused]] T* flipped) const {
        const uint32_t depth = shape.depth;
#if defined(POLDER_HOST)
        if (threads == 1) {
            flip(flipped, right, round_up(columns, 16), depth);
            multiply_panels<accumulate>(scores, scores_row, left, kRow, flipped, kTile, rows, depth, columns);
            return;
        }
#endif
        // Thread (y, x) has rows 4 y to 4 y + 3 and columns x, x + 8, x + 16 and x + 24.
        const uint32_t y = thread / 8, x = thread % 8;
        if (4 * y >= rows) return;
        T sums[4][4] = {};
#pragma unroll 2
        for (uint32_t d = 0; d < depth; d += 4) {
            Pack<T, 4> a[4];
            POLDER_UNROLL
            for (int i = 0; i < 4; ++i) a[i] = load<4>(left, (4 * y + i) * kRow + d);
            POLDER_UNROLL
            for (int j = 0; j < 4; ++j) {
                const Pack<T, 4> b = load<4>(right, (x + 8 * j) * kRow + d);
                POLDER_UNROLL
                for (int i = 0; i < 4; ++i) {
                    POLDER_UNROLL
                    for (int v = 0; v < 4; ++v) sums[i][j] += a[i].v[v] * b.v[v];
                }
            }
        }
        POLDER_UNROLL
        for (int i = 0; i < 4; ++i) {
            POLDER_UNROLL
            for (int j = 0; j < 4; ++j) {
                T& score = scores[(4 * y + i) * scores_row + x + 8 * j];
                score = accumulate ? score + sums[i][j] : sums[i][j];
            }
        }
    }

    /// out += scores right, with rows of `depth` numbers on the right and in the result.
    __device__ POLDER_STEP void multiply_add(T* out, const T* scores, const T* right, uint32_t rows,
                                             uint32_t columns) const {
#if defined(POLDER_HOST)
        if (threads == 1) {
            multiply_panels<true>(out, kRow, scores, scores_row, right, kRow, rows, columns, shape.depth);
            return;
        }
#endif
        // Thread (y, x) has rows 4 y to 4 y + 3 and four neighbouring columns of every 32.
        const uint32_t y = thread / 8, x = thread % 8;
        if (4 * y >= rows) return;
        POLDER_UNROLL
        for (uint32_t half = 0; half < kMaxDepth; half += 32) {
            if (half >= shape.depth) return;
            T sums[4][4] = {};
#pragma unroll 2
            for (uint32_t c = 0; c < columns; ++c) {
                const Pack<T, 4> b = load<4>(right, c * kRow + half + 4 * x);
                POLDER_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const T a = scores[(4 * y + i) * scores_row + c];
                    POLDER_UNROLL
                    for (int v = 0; v < 4; ++v) sums[i][v] += a * b.v[v];
                }
            }
            POLDER_UNROLL
            for (int i = 0; i < 4; ++i) {
                POLDER_UNROLL
                for (int v = 0; v < 4; ++v) out[(4 * y + i) * kRow + half + 4 * x + v] += sums[i][v];
            }
        }
    }

#if defined(POLDER_HOST)
    /// out (rows x columns) = or += left (rows x inner) right (inner x columns), six rows by 16 columns at a time: with
    /// vectors of 32 bytes, 12 sums of floats. What lies behind the last row and column, up to these multiples, is
    /// computed too.
    template <bool accumulate>
    POLDER_STEP static void multiply_panels(T* out, uint32_t out_row, const T* left, uint32_t left_row, const T* right,
                                            uint32_t right_row, uint32_t rows, uint32_t inner, uint32_t columns) {
        typedef T Vector __attribute__((vector_size(32)));
        constexpr uint32_t kRows = 6, kLanes = 32 / sizeof(T), kVectors = 16 / kLanes;
        for (uint32_t c = 0; c < columns; c += 16) {
            for (uint32_t r = 0; r < rows; r += kRows) {
                Vector sums[kRows][kVectors] = {};
                const T* a = left + r * left_row;
                const T* b = right + c;
                for (uint32_t k = 0; k < inner; ++k, ++a, b += right_row) {
                    Vector line[kVectors];
                    for (uint32_t v = 0; v < kVectors; ++v) memcpy(&line[v], b + v * kLanes, sizeof(Vector));
                    for (uint32_t i = 0; i < kRows; ++i) {
                        for (uint32_t v = 0; v < kVectors; ++v) sums[i][v] += a[i * left_row] * line[v];
                    }
                }
                for (uint32_t i = 0; i < kRows; ++i) {
                    T* const to = out + (r + i) * out_row + c;
                    for (uint32_t v = 0; v < kVectors; ++v) {
                        Vector sum = sums[i][v], old;
                        memcpy(&old, to + v * kLanes, sizeof old);
                        if (accumulate) sum += old;
                        memcpy(to + v * kLanes, &sum, sizeof sum);
                    }
                }
            }
        }
    }

    /// The columns of `right` as rows of kTile numbers, four by four.
    POLDER_STEP static void flip(T* __restrict__ to, const T* __restrict__ right, uint32_t width, uint32_t depth) {
        for (uint32_t d = 0; d < depth; d += 4) {
            for (uint32_t c = 0; c < width; c += 4) {
                T square[4][4];
                for (uint32_t i = 0; i < 4; ++i) memcpy(square[i], right + (c + i) * kRow + d, sizeof square[i]);
                for (uint32_t j = 0; j < 4; ++j) {
                    T line[4] = {square[0][j], square[1][j], square[2][j], square[3][j]};
                    memcpy(to + (d + j) * kTile + c, line, sizeof line);
                }
            }
        }
    }
#endif

    /// Calls `f(r, c)` for the scores of a tile.
    template <class F>
    __device__ __forceinline__ void for_each_score(uint32_t rows, uint32_t columns, const F& f) const {
        if (threads == 1) {
            for (uint32_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
                for (uint32_t c = 0; c < columns; ++c) f(r, c);
            }
            return;
        }
        for (uint32_t i = thread; i < kTile * kTile; i += threads) {
            const uint32_t r = i / kTile, c = i % kTile;
            if (r < rows && c < columns) f(r, c);
        }
    }

    /// Writes scale * rows to a matrix, or adds it.
    template <class S>
    __device__ POLDER_STEP void write(S* to, uint64_t stride, const T* from, Rows rows, T scale,
                                      bool accumulate) const {
        const uint32_t depth = shape.depth;
        if (threads == 1) {
            for (uint32_t r = 0; r < rows.count; ++r) {
                S* __restrict__ row = to + (rows.first + r) * stride;
                const T* __restrict__ x = from + r * kRow;
                for (uint32_t c = 0; c < depth; ++c) {
                    row[c] = convert_to<S>(accumulate ? widen(row[c]) + x[c] * scale : x[c] * scale);
                }
            }
            return;
        }
        for (uint32_t i = thread; i < rows.count * depth; i += threads) {
            const uint32_t r = i / depth, c = i - r * depth;
            S& place = to[(rows.first + r) * stride + c];
            const T value = from[r * kRow + c] * scale;
            place = convert_to<S>(accumulate ? widen(place) + value : value);
        }
    }

    /// The same to one part of a gradient [batch, tokens, 3, heads, depth].
    template <class S>
    __device__ __forceinline__ void write(S* to, Part part, uint32_t sample, uint32_t head, const T* from, Rows rows,
                                          T scale, bool accumulate) const {
        const uint32_t place = (part * shape.heads + head) * shape.depth;
        const uint64_t stride = 3 * channels();
        write(to + uint64_t(sample) * shape.tokens * stride + place, stride, from, rows, scale, accumulate);
    }

    /// The sums over c < columns of f(r, c) for the rows r of this thread, in an order that vectorises.
    template <class Op, class F>
    __device__ __forceinline__ static T reduce(T start, uint32_t columns, const F& f) {
        constexpr uint32_t kLanes = 16;
        T lanes[kLanes];
        POLDER_UNROLL
        for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = start;
        uint32_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) {
            POLDER_UNROLL
            for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = Op::of(lanes[lane], f(c + lane));
        }
        T result = start;
        for (; c < columns; ++c) result = Op::of(result, f(c));
        POLDER_UNROLL
        for (uint32_t lane = 0; lane < kLanes; ++lane) result = Op::of(result, lanes[lane]);
        return result;
    }
};

/// The larger one; a NaN wins.
struct Larger {
    template <class T>
    static __device__ __forceinline__ T of(T a, T b) {
        return b > a || b != b ? b : a;
    }
};

/// Runs `f(team)` with the tiles of this launch: those of a GPU, or those of the CPU.
template <class T, class F>
__device__ __forceinline__ void with_team(const AttentionShape& shape, const F& f) {
    POLDER_DYNAMIC_SHARED(T, shared);
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        f(Team<T, kAttentionHostTile>(shape, shared));
        return;
    }
#endif
    f(Team<T, kAttentionTile>(shape, shared));
}

/// Calls `f(sample, head, number)` for this block's share of all heads of all samples and `each` numbers.
template <class F>
__device__ __forceinline__ void for_each_head(const AttentionShape& shape, uint32_t each, const F& f) {
    const uint32_t items = shape.batch * shape.heads * each;
    const auto call = [&](uint32_t item) {
        const uint32_t number = item % each, head = item / each % shape.heads;
        f(item / each / shape.heads, head, number);
    };
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const uint32_t end = uint32_t(uint64_t(items) * (blockIdx.x + 1) / gridDim.x);
        for (uint32_t item = uint32_t(uint64_t(items) * blockIdx.x / gridDim.x); item < end; ++item) call(item);
        return;
    }
#endif
    for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) call(item);
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct AttentionArgs {
    Projected<S> x;
    S* y;           // [batch, tokens, heads, depth]
    T* normaliser;  // [batch, heads, tokens]: L
    AttentionShape shape;
    double scale;
};

template <class S>
__device__ void attention(const AttentionArgs<S>& a) {
    typedef Arithmetic<S> T;
    with_team<T>(a.shape, [&](auto team) {
        T* const query = team.take_rows();
        T* const other = team.take_rows();  // keys, then values
        T* const sum = team.take_rows();
        T* const scores = team.take_scores();
        T* const largest = team.take(team.tile);
        T* const total = team.take(team.tile);
        T* const flipped = team.free;
        for_each_head(a.shape, team.tiles(), [&](uint32_t sample, uint32_t head, uint32_t tile) {
            const Rows rows = team.rows_of(tile);
            team.stage(query, a.x, kQuery, sample, head, rows, T(a.scale));
            team.clear(sum, rows.count);
            for (uint32_t r = team.thread; r < rows.count; r += team.threads) {
                largest[r] = -T(INFINITY);
                total[r] = T(0);
            }
            for (uint32_t k = 0; k < team.tiles(); ++k) {
                const Rows keys = team.rows_of(k);
                team.stage(other, a.x, kKey, sample, head, keys, T(1));
                team.sync();
                team.template multiply_transposed<false>(scores, query, other, rows.count, keys.count, flipped);
                team.sync();
                team.stage(other, a.x, kValue, sample, head, keys, T(1));
                for (uint32_t r = team.thread; r < rows.count; r += team.threads) {
                    T* const s = scores + r * team.scores_row;
                    const T before = largest[r];
                    const T now = team.template reduce<Larger>(before, keys.count, [=](uint32_t c) { return s[c]; });
                    for (uint32_t c = 0; c < keys.count; ++c) s[c] = exp_of_negative(s[c] - now);
                    const T all = team.template reduce<Add>(T(0), keys.count, [=](uint32_t c) { return s[c]; });
                    largest[r] = now;
                    if (k == 0) {
                        total[r] = all;
                        continue;
                    }
                    const T keep = exp_of_negative(before - now);
                    total[r] = total[r] * keep + all;
                    for (uint32_t c = 0; c < a.shape.depth; ++c) sum[r * kRow + c] *= keep;
                }
                team.sync();
                team.multiply_add(sum, scores, other, rows.count, keys.count);
                team.sync();
            }
            for (uint32_t r = team.thread; r < rows.count; r += team.threads) {
                const uint64_t place = (uint64_t(sample) * a.shape.heads + head) * a.shape.tokens + rows.first + r;
                a.normaliser[place] = largest[r] + natural_logarithm(total[r]);
                const T inverse = T(1) / total[r];
                for (uint32_t c = 0; c < a.shape.depth; ++c) sum[r * kRow + c] *= inverse;
            }
            team.sync();
            const uint64_t stride = team.channels();
            S* const y = a.y + uint64_t(sample) * a.shape.tokens * stride + head * a.shape.depth;
            team.write(y, stride, sum, rows, T(1), false);
            team.sync();
        });
    });
}

template <class S, class T = Arithmetic<S>>
struct AttentionTangentArgs {
    Projected<S> x;
    Projected<S> x_tangent;
    const S* y;
    const T* normaliser;
    S* y_tangent;
    T* moved;  // [batch, heads, tokens]: c
    AttentionShape shape;
    double scale;
};

template <class S>
__device__ void attention_tangent(const AttentionTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    with_team<T>(a.shape, [&](auto team) {
        T* const query = team.take_rows();
        T* const query_tangent = team.take_rows();
        T* const other = team.take_rows();  // keys, then values
        T* const other_tangent = team.take_rows();
        T* const sum = team.take_rows();
        T* const scores = team.take_scores();
        T* const scores_tangent = team.take_scores();
        T* const moved = team.take(team.tile);
        T* const flipped = team.free;
        for_each_head(a.shape, team.tiles(), [&](uint32_t sample, uint32_t head, uint32_t tile) {
            const Rows rows = team.rows_of(tile);
            const uint64_t first = (uint64_t(sample) * a.shape.heads + head) * a.shape.tokens + rows.first;
            team.stage(query, a.x, kQuery, sample, head, rows, T(a.scale));
            team.stage(query_tangent, a.x_tangent, kQuery, sample, head, rows, T(a.scale));
            team.clear(sum, rows.count);
            for (uint32_t r = team.thread; r < rows.count; r += team.threads) moved[r] = T(0);
            for (uint32_t k = 0; k < team.tiles(); ++k) {
                const Rows keys = team.rows_of(k);
                team.stage(other, a.x, kKey, sample, head, keys, T(1));
                team.stage(other_tangent, a.x_tangent, kKey, sample, head, keys, T(1));
                team.sync();
                const uint32_t m = rows.count, n = keys.count;
                team.template multiply_transposed<false>(scores, query, other, m, n, flipped);
                team.template multiply_transposed<false>(scores_tangent, query_tangent, other, m, n, flipped);
                team.template multiply_transposed<true>(scores_tangent, query, other_tangent, m, n, flipped);
                team.sync();
                team.stage(other, a.x, kValue, sample, head, keys, T(1));
                team.stage(other_tangent, a.x_tangent, kValue, sample, head, keys, T(1));
                for (uint32_t r = team.thread; r < m; r += team.threads) {
                    T* __restrict__ const s = scores + r * team.scores_row;
                    T* __restrict__ const moving = scores_tangent + r * team.scores_row;
                    const T normaliser = a.normaliser[first + r];
                    for (uint32_t c = 0; c < n; ++c) {
                        s[c] = exp_of_negative(s[c] - normaliser);
                        moving[c] *= s[c];
                    }
                    moved[r] += team.template reduce<Add>(T(0), n, [=](uint32_t c) { return moving[c]; });
                }
                team.sync();
                team.multiply_add(sum, scores_tangent, other, m, n);
                team.multiply_add(sum, scores, other_tangent, m, n);
                team.sync();
            }
            const uint64_t stride = team.channels();
            const uint64_t corner = uint64_t(sample) * a.shape.tokens * stride + head * a.shape.depth;
            for (uint32_t r = team.thread; r < rows.count; r += team.threads) {
                const S* const y = a.y + corner + (rows.first + r) * stride;
                for (uint32_t c = 0; c < a.shape.depth; ++c) sum[r * kRow + c] -= moved[r] * widen(y[c]);
                a.moved[first + r] = moved[r];
            }
            team.sync();
            team.write(a.y_tangent + corner, stride, sum, rows, T(1), false);
            team.sync();
        });
    });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

template <class S, class T = Arithmetic<S>>
struct AttentionDotsArgs {
    const S* y;
    const S* dy;
    const S* y_tangent;   // or null
    const S* dy_tangent;  // or null
    T* dots;              // [batch, heads, tokens]: D
    T* dots_tangent;      // D', or null
    AttentionShape shape;
};

/// D = dy y and D' = dy' y + dy y', for each row and head.
template <class S>
__device__ void attention_dots(const AttentionDotsArgs<S>& a) {
    typedef Arithmetic<S> T;
    const AttentionShape& shape = a.shape;
    const uint32_t depth = shape.depth;
    for_each_index(uint64_t(shape.batch) * shape.heads * shape.tokens, [&](uint64_t i) {
        const uint32_t row = uint32_t(i), t = row % shape.tokens, head = row / shape.tokens % shape.heads;
        const uint32_t sample = row / shape.tokens / shape.heads;
        const uint64_t place = ((uint64_t(sample) * shape.tokens + t) * shape.heads + head) * depth;
        T dot = 0, moved = 0;
        for (uint32_t c = 0; c < depth; ++c) {
            const T y = widen(a.y[place + c]), dy = widen(a.dy[place + c]);
            dot += dy * y;
            if (a.dots_tangent != nullptr) {
                moved += widen(a.dy_tangent[place + c]) * y + dy * widen(a.y_tangent[place + c]);
            }
        }
        a.dots[i] = dot;
        if (a.dots_tangent != nullptr) a.dots_tangent[i] = moved;
    });
}

template <class S, class T = Arithmetic<S>>
struct AttentionBackwardArgs {
    Projected<S> x;
    const T* normaliser;
    const S* dy;
    const T* dots;
    S* dx;  // [batch, tokens, 3, heads, depth]
    AttentionShape shape;
    uint32_t accumulate;
    double scale;
};

/// What one tile of the backward works on: its rows are queries, and the columns keys, or the other way round.
template <class T>
struct BackwardTiles {
    T *first, *second;  // of the rows: queries and dy, or keys and values
    T* other;           // of the columns
    T *first_sum, *second_sum;
    T *scores, *gradient;  // p and ds
};

template <class S>
__device__ void attention_backward(const AttentionBackwardArgs<S>& a) {
    typedef Arithmetic<S> T;
    with_team<T>(a.shape, [&](auto team) {
        BackwardTiles<T> at = {};
        at.first = team.take_rows();
        at.second = team.take_rows();
        at.other = team.take_rows();
        at.scores = team.take_scores();
        at.gradient = team.take_scores();
        at.first_sum = team.take_rows();
        at.second_sum = team.take_rows();
        T* const flipped = team.free;
        const uint32_t tiles = team.tiles();
        const T scale = T(a.scale);
        for_each_head(a.shape, 2 * tiles, [&](uint32_t sample, uint32_t head, uint32_t number) {
            const bool queries = number < tiles;
            const Rows rows = team.rows_of(queries ? number : number - tiles);
            const uint64_t statistics = (uint64_t(sample) * a.shape.heads + head) * a.shape.tokens;
            // Queries are scaled wherever they are staged, so that dk has the factor.
            const auto stage_first = [&](T* to, bool query, Rows which) {
                team.stage(to, a.x, query ? kQuery : kKey, sample, head, which, query ? scale : T(1));
            };
            const auto stage_second = [&](T* to, bool query, Rows which) {
                if (query) team.stage_output(to, a.dy, sample, head, which);
                else team.stage(to, a.x, kValue, sample, head, which, T(1));
            };
            stage_first(at.first, queries, rows);
            stage_second(at.second, queries, rows);
            team.clear(at.first_sum, rows.count);
            team.clear(at.second_sum, rows.count);
            for (uint32_t k = 0; k < tiles; ++k) {
                const Rows columns = team.rows_of(k);
                const uint32_t m = rows.count, n = columns.count;
                stage_first(at.other, !queries, columns);
                team.sync();
                team.template multiply_transposed<false>(at.scores, at.first, at.other, m, n, flipped);
                team.sync();
                stage_second(at.other, !queries, columns);
                team.sync();
                team.template multiply_transposed<false>(at.gradient, at.second, at.other, m, n, flipped);
                team.sync();
                const uint64_t by_row = statistics + rows.first, by_column = statistics + columns.first;
                team.for_each_score(m, n, [&, queries](uint32_t r, uint32_t c) {
                    const uint64_t query = queries ? by_row + r : by_column + c;
                    T& score = at.scores[r * team.scores_row + c];
                    T& gradient = at.gradient[r * team.scores_row + c];
                    score = exp_of_negative(score - a.normaliser[query]);
                    gradient = score * (gradient - a.dots[query]);
                });
                team.sync();
                if (!queries) team.multiply_add(at.second_sum, at.scores, at.other, m, n);
                team.sync();
                stage_first(at.other, !queries, columns);
                team.sync();
                team.multiply_add(at.first_sum, at.gradient, at.other, m, n);
                team.sync();
            }
            const bool accumulate = a.accumulate;
            team.write(a.dx, queries ? kQuery : kKey, sample, head, at.first_sum, rows, queries ? scale : T(1),
                       accumulate);
            if (!queries) team.write(a.dx, kValue, sample, head, at.second_sum, rows, T(1), accumulate);
            team.sync();
        });
    });
}

template <class S, class T = Arithmetic<S>>
struct AttentionBackwardTangentArgs {
    Projected<S> x;
    Projected<S> x_tangent;
    const T* normaliser;
    const T* moved;
    const S* dy;
    const S* dy_tangent;
    const T* dots;
    const T* dots_tangent;
    S* dx_tangent;
    AttentionShape shape;
    uint32_t accumulate;
    double scale;
};

template <class S>
__device__ void attention_backward_tangent(const AttentionBackwardTangentArgs<S>& a) {
    typedef Arithmetic<S> T;
    with_team<T>(a.shape, [&](auto team) {
        BackwardTiles<T> at = {}, along = {};
        const auto take = [&](BackwardTiles<T>& tiles) {
            tiles.first = team.take_rows();
            tiles.second = team.take_rows();
            tiles.other = team.take_rows();
            tiles.scores = team.take_scores();
            tiles.gradient = team.take_scores();
        };
        take(at);
        take(along);
        at.first_sum = team.take_rows();
        at.second_sum = team.take_rows();
        T* const flipped = team.free;
        const uint32_t tiles = team.tiles();
        const T scale = T(a.scale);
        for_each_head(a.shape, 2 * tiles, [&](uint32_t sample, uint32_t head, uint32_t number) {
            const bool queries = number < tiles;
            const Rows rows = team.rows_of(queries ? number : number - tiles);
            const uint64_t statistics = (uint64_t(sample) * a.shape.heads + head) * a.shape.tokens;
            const auto stage_first = [&](T* to, T* to_tangent, bool query, Rows which) {
                const Part part = query ? kQuery : kKey;
                team.stage(to, a.x, part, sample, head, which, query ? scale : T(1));
                team.stage(to_tangent, a.x_tangent, part, sample, head, which, query ? scale : T(1));
            };
            const auto stage_second = [&](T* to, T* to_tangent, bool query, Rows which) {
                if (query) {
                    team.stage_output(to, a.dy, sample, head, which);
                    team.stage_output(to_tangent, a.dy_tangent, sample, head, which);
                } else {
                    team.stage(to, a.x, kValue, sample, head, which, T(1));
                    team.stage(to_tangent, a.x_tangent, kValue, sample, head, which, T(1));
                }
            };
            stage_first(at.first, along.first, queries, rows);
            stage_second(at.second, along.second, queries, rows);
            team.clear(at.first_sum, rows.count);
            team.clear(at.second_sum, rows.count);
            for (uint32_t k = 0; k < tiles; ++k) {
                const Rows columns = team.rows_of(k);
                const uint32_t m = rows.count, n = columns.count;
                stage_first(at.other, along.other, !queries, columns);
                team.sync();
                team.template multiply_transposed<false>(at.scores, at.first, at.other, m, n, flipped);
                team.template multiply_transposed<false>(along.scores, along.first, at.other, m, n, flipped);
                team.template multiply_transposed<true>(along.scores, at.first, along.other, m, n, flipped);
                team.sync();
                stage_second(at.other, along.other, !queries, columns);
                team.sync();
                team.template multiply_transposed<false>(at.gradient, at.second, at.other, m, n, flipped);
                team.template multiply_transposed<false>(along.gradient, along.second, at.other, m, n, flipped);
                team.template multiply_transposed<true>(along.gradient, at.second, along.other, m, n, flipped);
                team.sync();
                const uint64_t by_row = statistics + rows.first, by_column = statistics + columns.first;
                team.for_each_score(m, n, [&, queries](uint32_t r, uint32_t c) {
                    const uint64_t query = queries ? by_row + r : by_column + c;
                    const uint32_t place = r * team.scores_row + c;
                    const T p = exp_of_negative(at.scores[place] - a.normaliser[query]);
                    const T p_tangent = p * (along.scores[place] - a.moved[query]);
                    const T centred = at.gradient[place] - a.dots[query];
                    at.scores[place] = p;
                    along.scores[place] = p_tangent;
                    at.gradient[place] = p * centred;
                    along.gradient[place] = p_tangent * centred + p * (along.gradient[place] - a.dots_tangent[query]);
                });
                team.sync();
                if (!queries) {
                    team.multiply_add(at.second_sum, along.scores, at.other, m, n);
                    team.multiply_add(at.second_sum, at.scores, along.other, m, n);
                }
                team.sync();
                stage_first(at.other, along.other, !queries, columns);
                team.sync();
                team.multiply_add(at.first_sum, along.gradient, at.other, m, n);
                team.multiply_add(at.first_sum, at.gradient, along.other, m, n);
                team.sync();
            }
            const bool accumulate = a.accumulate;
            const T factor = queries ? scale : T(1);
            team.write(a.dx_tangent, queries ? kQuery : kKey, sample, head, at.first_sum, rows, factor, accumulate);
            if (!queries) team.write(a.dx_tangent, kValue, sample, head, at.second_sum, rows, T(1), accumulate);
            team.sync();
        });
    });
}

}  // namespace

POLDER_KERNEL(attention_f32, attention<float>, AttentionArgs<float>)
POLDER_KERNEL(attention_f16, attention<__half>, AttentionArgs<__half>)
POLDER_KERNEL(attention_bf16, attention<__nv_bfloat16>, AttentionArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(attention_f64, attention<double>, AttentionArgs<double>)
POLDER_KERNEL(attention_tangent_f32, attention_tangent<float>, AttentionTangentArgs<float>)
POLDER_KERNEL(attention_tangent_f16, attention_tangent<__half>, AttentionTangentArgs<__half>)
POLDER_KERNEL(attention_tangent_bf16, attention_tangent<__nv_bfloat16>, AttentionTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(attention_tangent_f64, attention_tangent<double>, AttentionTangentArgs<double>)
POLDER_KERNEL(attention_dots_f32, attention_dots<float>, AttentionDotsArgs<float>)
POLDER_KERNEL(attention_dots_f16, attention_dots<__half>, AttentionDotsArgs<__half>)
POLDER_KERNEL(attention_dots_bf16, attention_dots<__nv_bfloat16>, AttentionDotsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(attention_dots_f64, attention_dots<double>, AttentionDotsArgs<double>)
POLDER_KERNEL(attention_backward_f32, attention_backward<float>, AttentionBackwardArgs<float>)
POLDER_KERNEL(attention_backward_f16, attention_backward<__half>, AttentionBackwardArgs<__half>)
POLDER_KERNEL(attention_backward_bf16, attention_backward<__nv_bfloat16>, AttentionBackwardArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(attention_backward_f64, attention_backward<double>, AttentionBackwardArgs<double>)
POLDER_KERNEL(attention_backward_tangent_f32, attention_backward_tangent<float>, AttentionBackwardTangentArgs<float>)
POLDER_KERNEL(attention_backward_tangent_f16, attention_backward_tangent<__half>, AttentionBackwardTangentArgs<__half>)
POLDER_KERNEL(attention_backward_tangent_bf16, attention_backward_tangent<__nv_bfloat16>,
              AttentionBackwardTangentArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(attention_backward_tangent_f64, attention_backward_tangent<double>,
                   AttentionBackwardTangentArgs<double>)
