// The small layers of a ResNet over NHWC activations: relu, addition, pooling, the parameter-free shortcut, and the
// linear classifier, forward and backward. The arithmetic is trivial: each kernel is bound by memory, except the linear
// layer's products, which a tiled kernel computes (on the CPU plain loops along the contiguous dimension).
//
// A backward kernel gathers: one thread computes each element of dx from all outputs that depend on it, so there is no
// order to depend on. Sizes are below 2^32 (Rust checks), because 64-bit divisions are slow on the GPU.
#include "include/pixels.cuh"

namespace {

// ---- Element-wise ---------------------------------------------------------------------------------------------------

template <class S>
struct ReluArgs {
    const S* x;
    S* y;
    uint64_t n;
};

/// y = max(x, 0); a NaN stays a NaN, so that a diverged activation reaches the loss.
template <class S>
__device__ void relu(const ReluArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const S* __restrict__ x = a.x;
    S* __restrict__ y = a.y;
    for_each_pack_if<V>(aligned16(x, y), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        Pack<T, W> pack = fetch<W>(x, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) pack.v[v] = pack.v[v] < T(0) ? T(0) : pack.v[v];
        put(y, i, pack);
    });
}

template <class S>
struct ReluBackwardArgs {
    const S* y;
    const S* dy;
    S* dx;
    uint64_t n;
    uint32_t accumulate;
};

template <class S, bool accumulate>
__device__ __forceinline__ void relu_backward_into(const ReluBackwardArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const S* __restrict__ y = a.y;
    const S* __restrict__ dy = a.dy;
    S* __restrict__ dx = a.dx;
    for_each_pack_if<V>(aligned16(y, dy, dx), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        const Pack<T, W> output = fetch<W>(y, i);
        Pack<T, W> gradient = fetch<W>(dy, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) gradient.v[v] = output.v[v] <= T(0) ? T(0) : gradient.v[v];
        store_gradient(dx, i, gradient, accumulate);
    });
}

/// dx = dy where y > 0, else 0
template <class S>
__device__ void relu_backward(const ReluBackwardArgs<S>& a) {
    if (a.accumulate) relu_backward_into<S, true>(a);
    else relu_backward_into<S, false>(a);
}

template <class S>
struct AddArgs {
    const S* a;
    const S* b;
    S* out;
    uint64_t n;
};

/// out = a + b
template <class S>
__device__ void add(const AddArgs<S>& args) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const S* __restrict__ a = args.a;
    const S* __restrict__ b = args.b;
    S* __restrict__ out = args.out;
    for_each_pack_if<V>(aligned16(a, b, out), args.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        Pack<T, W> sum = fetch<W>(a, i);
        const Pack<T, W> other = fetch<W>(b, i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) sum.v[v] += other.v[v];
        put(out, i, sum);
    });
}

template <class S>
struct AddToArgs {
    const S* x;
    S* sum;
    uint64_t n;
};

/// sum = sum + x
template <class S>
__device__ void add_to(const AddToArgs<S>& a) {
    constexpr int V = kPack<S>;
    const S* __restrict__ x = a.x;
    S* __restrict__ sum = a.sum;
    for_each_pack_if<V>(aligned16(x, sum), a.n, [=](auto width, uint64_t i) {
        constexpr int W = decltype(width)::value;
        store_gradient(sum, i, fetch<W>(x, i), true);
    });
}

// ---- Pixels ---------------------------------------------------------------------------------------------------------

/// Average pooling without padding: `from` is the input or the output's gradient, `to` the output or the input's
/// gradient.
template <class S>
struct PoolArgs {
    const S* from;
    S* to;
    uint32_t batch;
    uint32_t height;  // of the input
    uint32_t width;
    uint32_t channels;
    uint32_t out_height;
    uint32_t out_width;
    uint32_t kernel;
    uint32_t stride;
    uint32_t accumulate;
};

/// y[n, i, j, c] = the mean of x[n, i s + p, j s + q, c] over 0 <= p, q < kernel
template <class S>
__device__ void average_pool(const PoolArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.channels % V == 0 && aligned16(a.from, a.to);
    for_each_pixel<V>(a.batch * a.out_height * a.out_width, a.channels, packs, [&](uint32_t pixel) {
        const uint32_t j = pixel % a.out_width, i = pixel / a.out_width % a.out_height;
        const uint32_t n = pixel / (a.out_width * a.out_height);
        const uint64_t corner = ((uint64_t(n) * a.height + i * a.stride) * a.width + j * a.stride) * a.channels;
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> sum = {};
            for (uint32_t p = 0; p < a.kernel; ++p) {
                for (uint32_t q = 0; q < a.kernel; ++q) {
                    const Pack<T, W> x = fetch<W>(a.from, corner + (uint64_t(p) * a.width + q) * a.channels + c);
                    POLDER_UNROLL
                    for (int v = 0; v < W; ++v) sum.v[v] += x.v[v];
                }
            }
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) sum.v[v] /= T(a.kernel * a.kernel);
            put(a.to, uint64_t(pixel) * a.channels + c, sum);
        };
    });
}

/// dx = the sum of dy / kernel^2 over the windows that contain the pixel
template <class S>
__device__ void average_pool_backward(const PoolArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.channels % V == 0 && aligned16(a.from, a.to);
    for_each_pixel<V>(a.batch * a.height * a.width, a.channels, packs, [&](uint32_t pixel) {
        const uint32_t w = pixel % a.width, h = pixel / a.width % a.height, n = pixel / (a.width * a.height);
        const uint32_t i_begin = first_window(h, a.kernel, a.stride), i_end = min(h / a.stride + 1, a.out_height);
        const uint32_t j_begin = first_window(w, a.kernel, a.stride), j_end = min(w / a.stride + 1, a.out_width);
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> sum = {};
            for (uint32_t i = i_begin; i < i_end; ++i) {
#pragma unroll 1
                for (uint32_t j = j_begin; j < j_end; ++j) {
                    const uint64_t place = (uint64_t(n) * a.out_height + i) * a.out_width + j;
                    const Pack<T, W> dy = fetch<W>(a.from, place * a.channels + c);
                    POLDER_UNROLL
                    for (int v = 0; v < W; ++v) sum.v[v] += dy.v[v];
                }
            }
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) sum.v[v] /= T(a.kernel * a.kernel);
            store_gradient(a.to, uint64_t(pixel) * a.channels + c, sum, a.accumulate);
        };
    });
}

template <class S>
struct GlobalPoolArgs {
    const S* from;
    S* to;
    uint32_t batch;
    uint32_t pixels;
    uint32_t channels;
    uint32_t accumulate;
};

/// y[n, c] = the mean of x[n, p, c] over p
template <class S>
__device__ void global_average_pool(const GlobalPoolArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.channels % V == 0 && aligned16(a.from, a.to);
    for_each_pixel<V>(a.batch, a.channels, packs, [&](uint32_t n) {
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const S* const x = a.from + uint64_t(n) * a.pixels * a.channels + c;
            Pack<T, W> sum = {};
            for (uint32_t p = 0; p < a.pixels; ++p) {
                const Pack<T, W> value = fetch<W>(x, uint64_t(p) * a.channels);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) sum.v[v] += value.v[v];
            }
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) sum.v[v] /= T(a.pixels);
            put(a.to, uint64_t(n) * a.channels + c, sum);
        };
    });
}

/// dx[n, p, c] = dy[n, c] / pixels
template <class S>
__device__ void global_average_pool_backward(const GlobalPoolArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.channels % V == 0 && aligned16(a.from, a.to);
    for_each_pixel<V>(a.batch * a.pixels, a.channels, packs, [&](uint32_t pixel) {
        const uint32_t n = pixel / a.pixels;
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> gradient = fetch<W>(a.from, uint64_t(n) * a.channels + c);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) gradient.v[v] /= T(a.pixels);
            store_gradient(a.to, uint64_t(pixel) * a.channels + c, gradient, a.accumulate);
        };
    });
}

/// Every stride-th pixel, with new channels of zeros; `from` and `to` as in PoolArgs.
template <class S>
struct ShortcutArgs {
    const S* from;
    S* to;
    uint32_t batch;
    uint32_t height;  // of the input
    uint32_t width;
    uint32_t in_channels;
    uint32_t out_height;
    uint32_t out_width;
    uint32_t out_channels;
    uint32_t stride;
    uint32_t pad;  // zero channels before those of the input
    uint32_t accumulate;
};

/// y[n, i, j, c] = x[n, i s, j s, c - pad], or 0 if there is no such channel
template <class S>
__device__ void shortcut(const ShortcutArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = (a.in_channels | a.out_channels | a.pad) % V == 0 && aligned16(a.from, a.to);
    for_each_pixel<V>(a.batch * a.out_height * a.out_width, a.out_channels, packs, [&](uint32_t pixel) {
        const uint32_t j = pixel % a.out_width, i = pixel / a.out_width % a.out_height;
        const uint32_t n = pixel / (a.out_width * a.out_height);
        const uint64_t source = ((uint64_t(n) * a.height + i * a.stride) * a.width + j * a.stride) * a.in_channels;
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            // Unsigned: a channel before the input's wraps far beyond them.
            const uint32_t channel = c - a.pad;
            Pack<T, W> y = {};
            if (channel < a.in_channels) y = fetch<W>(a.from, source + channel);
            put(a.to, uint64_t(pixel) * a.out_channels + c, y);
        };
    });
}

/// dx[n, h, w, c] = dy[n, h / s, w / s, c + pad] where s divides h and w, else 0
template <class S>
__device__ void shortcut_backward(const ShortcutArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = (a.in_channels | a.out_channels | a.pad) % V == 0 && aligned16(a.from, a.to);
    for_each_pixel<V>(a.batch * a.height * a.width, a.in_channels, packs, [&](uint32_t pixel) {
        const uint32_t w = pixel % a.width, h = pixel / a.width % a.height, n = pixel / (a.width * a.height);
        const bool sampled = h % a.stride == 0 && w % a.stride == 0;
        const uint64_t place = (uint64_t(n) * a.out_height + h / a.stride) * a.out_width + w / a.stride;
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> gradient = {};
            if (sampled) gradient = fetch<W>(a.from, place * a.out_channels + a.pad + c);
            else if (a.accumulate) return;
            store_gradient(a.to, uint64_t(pixel) * a.in_channels + c, gradient, a.accumulate);
        };
    });
}

// ---- Linear ---------------------------------------------------------------------------------------------------------

/// Which index of a factor runs along memory.
enum class Order { kRows, kColumns };

/// A factor of a product, as rows x columns. Elements outside are zero.
template <class S, Order order>
struct Factor {
    static constexpr bool rows_contiguous = order == Order::kColumns;
    const S* p;
    uint32_t rows, columns;

    __device__ __forceinline__ Arithmetic<S> at(uint32_t r, uint32_t c) const {
        const uint64_t place = rows_contiguous ? uint64_t(c) * rows + r : uint64_t(r) * columns + c;
        return r < rows && c < columns ? widen(p[place]) : Arithmetic<S>(0);
    }
};

constexpr uint32_t kDepth = 16;  // terms per step

/// out = left right, stored by `write(row, column, value)`. A block of 16 x 16 threads computes one tile.
template <class T, class Left, class Right, class F>
__device__ __forceinline__ void product(const Left& left, const Right& right, const F& write) {
    __shared__ T a[kDepth][kLinearTile + 1];
    __shared__ T b[kDepth][kLinearTile + 1];
    const uint32_t thread = threadIdx.x, x = thread % 16, y = thread / 16;
    const uint32_t row = blockIdx.y * kLinearTile, column = blockIdx.x * kLinearTile;
    T sums[2][2] = {};
    for (uint32_t k = 0; k < left.columns; k += kDepth) {
        // Neighbouring threads read along memory.
        for (uint32_t e = thread; e < kLinearTile * kDepth; e += kBlockThreads) {
            const uint32_t m = left.rows_contiguous ? e % kLinearTile : e / kDepth,
                           d = left.rows_contiguous ? e / kLinearTile : e % kDepth;
            a[d][m] = left.at(row + m, k + d);
        }
        for (uint32_t e = thread; e < kLinearTile * kDepth; e += kBlockThreads) {
            const uint32_t n = right.rows_contiguous ? e / kDepth : e % kLinearTile,
                           d = right.rows_contiguous ? e % kDepth : e / kLinearTile;
            b[d][n] = right.at(k + d, column + n);
        }
        __syncthreads();
        POLDER_UNROLL
        for (uint32_t d = 0; d < kDepth; ++d) {
            const T a0 = a[d][y], a1 = a[d][y + 16], b0 = b[d][x], b1 = b[d][x + 16];
            sums[0][0] += a0 * b0;
            sums[0][1] += a0 * b1;
            sums[1][0] += a1 * b0;
            sums[1][1] += a1 * b1;
        }
        __syncthreads();
    }
    POLDER_UNROLL
    for (uint32_t e = 0; e < 4; ++e) {
        const uint32_t r = row + y + e / 2 * 16, c = column + x + e % 2 * 16;
        if (r < left.rows && c < right.columns) write(r, c, sums[e / 2][e % 2]);
    }
}

/// x is [batch, inputs], weight [inputs, outputs], y [batch, outputs]. Only x and its gradient are stored as S: the
/// classifier is small, and rounding its results, the logits, would affect the loss.
template <class S, class T = Arithmetic<S>>
struct LinearArgs {
    const S* x;
    const T* weight;
    const T* bias;  // or null
    T* y;
    uint32_t batch;
    uint32_t inputs;
    uint32_t outputs;
    uint32_t accumulate;
};

#if defined(POLDER_HOST)
/// This block's share of n rows.
struct Range {
    uint32_t begin, end;
};

__forceinline__ Range rows_of_block(uint32_t n) {
    return {uint32_t(uint64_t(n) * blockIdx.x / gridDim.x), uint32_t(uint64_t(n) * (blockIdx.x + 1) / gridDim.x)};
}

/// y += a x
template <class T>
__forceinline__ void axpy(T* __restrict__ y, T a, const T* __restrict__ x, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) y[i] += a * x[i];
}

/// The sum of a[i] b[i], in an order that vectorises on every instruction set.
template <class T>
__forceinline__ T dot(const T* __restrict__ a, const T* __restrict__ b, uint32_t n) {
    constexpr uint32_t kLanes = 16;
    T lanes[kLanes] = {};
    uint32_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
    }
    T sum = 0;
    for (; i < n; ++i) sum += a[i] * b[i];
    for (uint32_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    return sum;
}
#endif

/// y = x weight + bias, or added to the output
template <class S>
__device__ void linear(const LinearArgs<S>& a) {
    typedef Arithmetic<S> T;
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const Range mine = rows_of_block(a.batch);
        for (uint32_t n = mine.begin; n < mine.end; ++n) {
            T* const y = a.y + uint64_t(n) * a.outputs;
            if (!a.accumulate) memset(y, 0, a.outputs * sizeof(T));
            if (a.bias != nullptr) axpy(y, T(1), a.bias, a.outputs);
            for (uint32_t i = 0; i < a.inputs; ++i) {
                axpy(y, widen(a.x[uint64_t(n) * a.inputs + i]), a.weight + uint64_t(i) * a.outputs, a.outputs);
            }
        }
        return;
    }
#endif
    const Factor<S, Order::kRows> x = {a.x, a.batch, a.inputs};
    const Factor<T, Order::kRows> weight = {a.weight, a.inputs, a.outputs};
    product<T>(x, weight, [&](uint32_t n, uint32_t o, T sum) {
        T* const y = a.y + uint64_t(n) * a.outputs + o;
        if (a.bias != nullptr) sum += a.bias[o];
        *y = a.accumulate ? *y + sum : sum;
    });
}

template <class S, class T = Arithmetic<S>>
struct LinearInputArgs {
    const T* dy;
    const T* weight;
    S* dx;
    uint32_t batch;
    uint32_t inputs;
    uint32_t outputs;
    uint32_t accumulate;
};

/// dx = dy weight^T
template <class S>
__device__ void linear_input(const LinearInputArgs<S>& a) {
    typedef Arithmetic<S> T;
    const auto write = [&](uint32_t n, uint32_t i, T sum) {
        S* const dx = a.dx + uint64_t(n) * a.inputs + i;
        *dx = convert_to<S>(a.accumulate ? widen(*dx) + sum : sum);
    };
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const Range mine = rows_of_block(a.batch);
        for (uint32_t n = mine.begin; n < mine.end; ++n) {
            for (uint32_t i = 0; i < a.inputs; ++i) {
                write(n, i, dot(a.dy + uint64_t(n) * a.outputs, a.weight + uint64_t(i) * a.outputs, a.outputs));
            }
        }
        return;
    }
#endif
    const Factor<T, Order::kRows> dy = {a.dy, a.batch, a.outputs};
    const Factor<T, Order::kColumns> transposed = {a.weight, a.outputs, a.inputs};
    product<T>(dy, transposed, write);
}

template <class S, class T = Arithmetic<S>>
struct LinearWeightArgs {
    const S* x;
    const T* dy;
    T* dweight;
    T* dbias;  // or null
    uint32_t batch;
    uint32_t inputs;
    uint32_t outputs;
    uint32_t accumulate;
};

/// dweight = x^T dy, and dbias = the column sums of dy, as if x had a further column of ones; or added to the output
template <class S>
__device__ void linear_weight(const LinearWeightArgs<S>& a) {
    typedef Arithmetic<S> T;
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const Range mine = rows_of_block(a.inputs + (a.dbias != nullptr ? 1 : 0));
        for (uint32_t i = mine.begin; i < mine.end; ++i) {
            T* const row = i < a.inputs ? a.dweight + uint64_t(i) * a.outputs : a.dbias;
            if (!a.accumulate) memset(row, 0, a.outputs * sizeof(T));
            for (uint32_t n = 0; n < a.batch; ++n) {
                const T x = i < a.inputs ? widen(a.x[uint64_t(n) * a.inputs + i]) : T(1);
                axpy(row, x, a.dy + uint64_t(n) * a.outputs, a.outputs);
            }
        }
        return;
    }
#endif
    const Factor<S, Order::kColumns> transposed = {a.x, a.inputs, a.batch};
    const Factor<T, Order::kRows> dy = {a.dy, a.batch, a.outputs};
    product<T>(transposed, dy, [&](uint32_t i, uint32_t o, T sum) {
        T* const dweight = a.dweight + uint64_t(i) * a.outputs + o;
        *dweight = a.accumulate ? *dweight + sum : sum;
    });
    if (a.dbias != nullptr && blockIdx.y == 0 && threadIdx.x < kLinearTile) {
        const uint32_t o = blockIdx.x * kLinearTile + threadIdx.x;
        if (o >= a.outputs) return;
        T sum = 0;
        for (uint32_t n = 0; n < a.batch; ++n) sum += a.dy[uint64_t(n) * a.outputs + o];
        a.dbias[o] = a.accumulate ? a.dbias[o] + sum : sum;
    }
}

}  // namespace

POLDER_KERNEL(relu_f32, relu<float>, ReluArgs<float>)
POLDER_KERNEL(relu_f16, relu<__half>, ReluArgs<__half>)
POLDER_KERNEL(relu_bf16, relu<__nv_bfloat16>, ReluArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(relu_f64, relu<double>, ReluArgs<double>)
POLDER_KERNEL(relu_backward_f32, relu_backward<float>, ReluBackwardArgs<float>)
POLDER_KERNEL(relu_backward_f16, relu_backward<__half>, ReluBackwardArgs<__half>)
POLDER_KERNEL(relu_backward_bf16, relu_backward<__nv_bfloat16>, ReluBackwardArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(relu_backward_f64, relu_backward<double>, ReluBackwardArgs<double>)
POLDER_KERNEL(add_f32, add<float>, AddArgs<float>)
POLDER_KERNEL(add_f16, add<__half>, AddArgs<__half>)
POLDER_KERNEL(add_bf16, add<__nv_bfloat16>, AddArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(add_f64, add<double>, AddArgs<double>)
POLDER_KERNEL(add_to_f32, add_to<float>, AddToArgs<float>)
POLDER_KERNEL(add_to_f16, add_to<__half>, AddToArgs<__half>)
POLDER_KERNEL(add_to_bf16, add_to<__nv_bfloat16>, AddToArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(add_to_f64, add_to<double>, AddToArgs<double>)
POLDER_KERNEL(average_pool_f32, average_pool<float>, PoolArgs<float>)
POLDER_KERNEL(average_pool_f16, average_pool<__half>, PoolArgs<__half>)
POLDER_KERNEL(average_pool_bf16, average_pool<__nv_bfloat16>, PoolArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(average_pool_f64, average_pool<double>, PoolArgs<double>)
POLDER_KERNEL(average_pool_backward_f32, average_pool_backward<float>, PoolArgs<float>)
POLDER_KERNEL(average_pool_backward_f16, average_pool_backward<__half>, PoolArgs<__half>)
POLDER_KERNEL(average_pool_backward_bf16, average_pool_backward<__nv_bfloat16>, PoolArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(average_pool_backward_f64, average_pool_backward<double>, PoolArgs<double>)
POLDER_KERNEL(global_average_pool_f32, global_average_pool<float>, GlobalPoolArgs<float>)
POLDER_KERNEL(global_average_pool_f16, global_average_pool<__half>, GlobalPoolArgs<__half>)
POLDER_KERNEL(global_average_pool_bf16, global_average_pool<__nv_bfloat16>, GlobalPoolArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(global_average_pool_f64, global_average_pool<double>, GlobalPoolArgs<double>)
POLDER_KERNEL(global_average_pool_backward_f32, global_average_pool_backward<float>, GlobalPoolArgs<float>)
POLDER_KERNEL(global_average_pool_backward_f16, global_average_pool_backward<__half>, GlobalPoolArgs<__half>)
POLDER_KERNEL(global_average_pool_backward_bf16, global_average_pool_backward<__nv_bfloat16>,
              GlobalPoolArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(global_average_pool_backward_f64, global_average_pool_backward<double>, GlobalPoolArgs<double>)
POLDER_KERNEL(shortcut_f32, shortcut<float>, ShortcutArgs<float>)
POLDER_KERNEL(shortcut_f16, shortcut<__half>, ShortcutArgs<__half>)
POLDER_KERNEL(shortcut_bf16, shortcut<__nv_bfloat16>, ShortcutArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(shortcut_f64, shortcut<double>, ShortcutArgs<double>)
POLDER_KERNEL(shortcut_backward_f32, shortcut_backward<float>, ShortcutArgs<float>)
POLDER_KERNEL(shortcut_backward_f16, shortcut_backward<__half>, ShortcutArgs<__half>)
POLDER_KERNEL(shortcut_backward_bf16, shortcut_backward<__nv_bfloat16>, ShortcutArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(shortcut_backward_f64, shortcut_backward<double>, ShortcutArgs<double>)
POLDER_KERNEL(linear_f32, linear<float>, LinearArgs<float>)
POLDER_KERNEL(linear_f16, linear<__half>, LinearArgs<__half>)
POLDER_KERNEL(linear_bf16, linear<__nv_bfloat16>, LinearArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(linear_f64, linear<double>, LinearArgs<double>)
POLDER_KERNEL(linear_input_f32, linear_input<float>, LinearInputArgs<float>)
POLDER_KERNEL(linear_input_f16, linear_input<__half>, LinearInputArgs<__half>)
POLDER_KERNEL(linear_input_bf16, linear_input<__nv_bfloat16>, LinearInputArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(linear_input_f64, linear_input<double>, LinearInputArgs<double>)
POLDER_KERNEL(linear_weight_f32, linear_weight<float>, LinearWeightArgs<float>)
POLDER_KERNEL(linear_weight_f16, linear_weight<__half>, LinearWeightArgs<__half>)
POLDER_KERNEL(linear_weight_bf16, linear_weight<__nv_bfloat16>, LinearWeightArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(linear_weight_f64, linear_weight<double>, LinearWeightArgs<double>)
