// The bias of a linear layer that is applied to every token or pixel, fused with what follows it in a transformer: the
// GELU or the addition of a residual. Also sums over the rows of a matrix: the gradients of biases.
//
// All are bound by memory, except the GELU on the CPU, whose exponential and division cost about as much.
#include "include/columns.cuh"
#include "include/exponential.cuh"
#include "include/pixels.cuh"

namespace {

template <class S, class T = Arithmetic<S>>
struct BiasArgs {
    const S* x;         // [rows, channels]
    const T* bias;      // [channels]
    const S* residual;  // [rows, channels], or null
    S* y;               // [rows, channels]
    uint32_t rows;
    uint32_t channels;
    uint32_t gelu;
};

/// Calls `f(row)(Width<W>{}, c)` as `for_each_pixel` does. On the CPU the packs have width 1, because a loop over
/// single numbers is what the compiler vectorises.
template <int V, class F>
__device__ __forceinline__ void for_each_channel(uint32_t rows, uint32_t channels, bool packs, const F& f) {
#if defined(POLDER_HOST)
    packs = packs && blockDim.x > 1;
#endif
    for_each_pixel<V>(rows, channels, packs, f);
}

/// The values of W neighbouring channels with their bias.
template <int W, class S, class T>
__device__ __forceinline__ Pack<T, W> biased(const S* x, const T* bias, uint64_t place, uint32_t c) {
    Pack<T, W> sum = fetch<W>(x, place);
    const Pack<T, W> b = load<W>(bias, c);
    POLDER_UNROLL
    for (int v = 0; v < W; ++v) sum.v[v] += b.v[v];
    return sum;
}

/// y = x + bias, or gelu(x + bias) with gelu(z) = z Φ(z); and the residual, if there is one.
template <class S, bool gelu, bool has_residual>
__device__ __forceinline__ void bias_into(const BiasArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const S* __restrict__ x = a.x, * __restrict__ residual = a.residual;
    const T* __restrict__ bias = a.bias;
    S* __restrict__ to = a.y;
    const bool packs = a.channels % V == 0 && aligned16(x, bias, residual, to);
    for_each_channel<V>(a.rows, a.channels, packs, [=, &a](uint32_t row) {
        const uint64_t first = uint64_t(row) * a.channels;
        return [=](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const uint64_t place = first + c;
            Pack<T, W> y = biased<W>(x, bias, place, c);
            if (gelu) {
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) y.v[v] *= gaussian(y.v[v]).below;
            }
            if (has_residual) {
                const Pack<T, W> other = fetch<W>(residual, place);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) y.v[v] += other.v[v];
            }
            put(to, place, y);
        };
    });
}

template <class S>
__device__ void bias(const BiasArgs<S>& a) {
    if (a.gelu) bias_into<S, true, false>(a);
    else if (a.residual != nullptr) bias_into<S, false, true>(a);
    else bias_into<S, false, false>(a);
}

/// The tangent of the forward: `from` is x', `bias_tangent` that of the bias, `to` is y'. The backward: `from` is dy,
/// `to` is dx. Only the GELU needs x and the bias.
template <class S, class T = Arithmetic<S>>
struct BiasSlopeArgs {
    const S* x;
    const T* bias;
    const S* from;
    const T* bias_tangent;  // or null
    const S* residual;      // the tangent of it, or null
    S* to;
    uint32_t rows;
    uint32_t channels;
    uint32_t gelu;
    uint32_t accumulate;
};

template <class S, bool gelu, bool has_bias_tangent, bool has_residual, bool accumulate>
__device__ __forceinline__ void bias_slope_into(const BiasSlopeArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const S* __restrict__ x = a.x, * __restrict__ from = a.from, * __restrict__ residual = a.residual;
    const T* __restrict__ bias = a.bias, * __restrict__ bias_tangent = a.bias_tangent;
    S* __restrict__ to = a.to;
    const bool packs = a.channels % V == 0 && aligned16(x, bias, from, bias_tangent, residual, to);
    for_each_channel<V>(a.rows, a.channels, packs, [=, &a](uint32_t row) {
        const uint64_t first = uint64_t(row) * a.channels;
        return [=](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const uint64_t place = first + c;
            Pack<T, W> moved = fetch<W>(from, place);
            if (has_bias_tangent) {
                const Pack<T, W> b = load<W>(bias_tangent, c);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) moved.v[v] += b.v[v];
            }
            if (gelu) {
                const Pack<T, W> z = biased<W>(x, bias, place, c);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) {
                    const Gaussian<T> normal = gaussian(z.v[v]);
                    moved.v[v] *= normal.below + z.v[v] * normal.density;
                }
            }
            if (has_residual) {
                const Pack<T, W> other = fetch<W>(residual, place);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) moved.v[v] += other.v[v];
            }
            store_gradient(to, place, moved, accumulate);
        };
    });
}

/// to = gelu'(x + bias) (from + bias') + residual', or without gelu' where there is no GELU. Only the gradient is
/// without bias', and only it is added.
template <class S>
__device__ void bias_slope(const BiasSlopeArgs<S>& a) {
    if (a.bias_tangent == nullptr) {
        if (a.accumulate) bias_slope_into<S, true, false, false, true>(a);
        else bias_slope_into<S, true, false, false, false>(a);
    } else if (a.gelu) {
        bias_slope_into<S, true, true, false, false>(a);
    } else if (a.residual != nullptr) {
        bias_slope_into<S, false, true, true, false>(a);
    } else {
        bias_slope_into<S, false, true, false, false>(a);
    }
}

template <class S, class T = Arithmetic<S>>
struct BiasCurveArgs {
    const S* x;
    const T* bias;
    const S* x_tangent;
    const T* bias_tangent;
    const S* dy;
    const S* dy_tangent;
    S* dx_tangent;
    uint32_t rows;
    uint32_t channels;
    uint32_t accumulate;
};

template <class S, bool accumulate>
__device__ __forceinline__ void bias_curve_into(const BiasCurveArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const S* __restrict__ x = a.x, * __restrict__ x_tangent = a.x_tangent;
    const S* __restrict__ dy = a.dy, * __restrict__ dy_tangent = a.dy_tangent;
    const T* __restrict__ bias = a.bias, * __restrict__ bias_tangent = a.bias_tangent;
    S* __restrict__ to = a.dx_tangent;
    const bool packs = a.channels % V == 0 && aligned16(x, bias, x_tangent, bias_tangent, dy, dy_tangent, to);
    for_each_channel<V>(a.rows, a.channels, packs, [=, &a](uint32_t row) {
        const uint64_t first = uint64_t(row) * a.channels;
        return [=](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const uint64_t place = first + c;
            const Pack<T, W> z = biased<W>(x, bias, place, c);
            const Pack<T, W> z_tangent = biased<W>(x_tangent, bias_tangent, place, c);
            const Pack<T, W> gradient = fetch<W>(dy, place);
            Pack<T, W> dx = fetch<W>(dy_tangent, place);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) {
                const Gaussian<T> normal = gaussian(z.v[v]);
                const T second = (T(2) - z.v[v] * z.v[v]) * normal.density;
                dx.v[v] *= normal.below + z.v[v] * normal.density;
                dx.v[v] += gradient.v[v] * (second * z_tangent.v[v]);
            }
            store_gradient(to, place, dx, accumulate);
        };
    });
}

/// The tangent of the GELU's backward: dx' = dy' gelu'(z) + dy gelu''(z) z', with z = x + bias and
/// gelu''(z) = (2 - z²) φ(z)
template <class S>
__device__ void bias_curve(const BiasCurveArgs<S>& a) {
    if (a.accumulate) bias_curve_into<S, true>(a);
    else bias_curve_into<S, false>(a);
}

template <class S, class T = Arithmetic<S>>
struct ColumnSumsArgs {
    const S* x;   // [rows, columns]
    T* partials;  // [pieces, columns]
    uint32_t rows;
    uint32_t columns;
};

/// The sums over the rows of each piece.
template <class S>
__device__ void column_sums(const ColumnSumsArgs<S>& a) {
    typedef Arithmetic<S> T;
    sum_columns<1, T>(a.partials, a.rows, a.columns, [&](uint32_t row, uint32_t c, T(&sums)[1]) {
        sums[0] += widen(a.x[uint64_t(row) * a.columns + c]);
    });
}

template <class T>
struct SumPiecesArgs {
    const T* partials;  // [pieces, outputs, columns]
    T* first;           // [columns], or null
    T* second;          // [columns], or null
    uint32_t pieces;
    uint32_t outputs;
    uint32_t columns;
};

/// The sums of all pieces, of those of one or two outputs that are asked for.
template <class T>
__device__ void sum_pieces(const SumPiecesArgs<T>& a) {
    for_each_index(uint64_t(a.outputs) * a.columns, [&](uint64_t i) {
        T* const out = i < a.columns ? a.first : a.second;
        if (out == nullptr) return;
        double sum = 0;
        for (uint32_t piece = 0; piece < a.pieces; ++piece) {
            sum += double(a.partials[uint64_t(piece) * a.outputs * a.columns + i]);
        }
        out[i < a.columns ? i : i - a.columns] = T(sum);
    });
}

}  // namespace

POLDER_KERNEL(bias_f32, bias<float>, BiasArgs<float>)
POLDER_KERNEL(bias_f16, bias<__half>, BiasArgs<__half>)
POLDER_KERNEL(bias_bf16, bias<__nv_bfloat16>, BiasArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(bias_f64, bias<double>, BiasArgs<double>)
POLDER_KERNEL(bias_slope_f32, bias_slope<float>, BiasSlopeArgs<float>)
POLDER_KERNEL(bias_slope_f16, bias_slope<__half>, BiasSlopeArgs<__half>)
POLDER_KERNEL(bias_slope_bf16, bias_slope<__nv_bfloat16>, BiasSlopeArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(bias_slope_f64, bias_slope<double>, BiasSlopeArgs<double>)
POLDER_KERNEL(bias_curve_f32, bias_curve<float>, BiasCurveArgs<float>)
POLDER_KERNEL(bias_curve_f16, bias_curve<__half>, BiasCurveArgs<__half>)
POLDER_KERNEL(bias_curve_bf16, bias_curve<__nv_bfloat16>, BiasCurveArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(bias_curve_f64, bias_curve<double>, BiasCurveArgs<double>)
POLDER_KERNEL(column_sums_f32, column_sums<float>, ColumnSumsArgs<float>)
POLDER_KERNEL(column_sums_f16, column_sums<__half>, ColumnSumsArgs<__half>)
POLDER_KERNEL(column_sums_bf16, column_sums<__nv_bfloat16>, ColumnSumsArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(column_sums_f64, column_sums<double>, ColumnSumsArgs<double>)
POLDER_KERNEL(sum_pieces_f32, sum_pieces<float>, SumPiecesArgs<float>)
POLDER_HOST_KERNEL(sum_pieces_f64, sum_pieces<double>, SumPiecesArgs<double>)
