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
template <class S, bool gelu>
__device__ __forceinline__ void bias_into(const BiasArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.channels % V == 0 && aligned16(a.x, a.bias, a.residual, a.y);
    for_each_pixel<V>(a.rows, a.channels, packs, [&](uint32_t row) {
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const uint64_t place = uint64_t(row) * a.channels + c;
            Pack<T, W> y = biased<W>(a.x, a.bias, place, c);
            if (gelu) {
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) y.v[v] *= gaussian(y.v[v]).below;
            }
            if (a.residual != nullptr) {
                const Pack<T, W> other = fetch<W>(a.residual, place);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) y.v[v] += other.v[v];
            }
            put(a.y, place, y);
        };
    });
}

template <class S>
__device__ void bias(const BiasArgs<S>& a) {
    if (a.gelu) bias_into<S, true>(a);
    else bias_into<S, false>(a);
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

template <class S, bool gelu>
__device__ __forceinline__ void bias_slope_into(const BiasSlopeArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs =
        a.channels % V == 0 && aligned16(a.x, a.bias, a.from, a.bias_tangent, a.residual, a.to);
    for_each_pixel<V>(a.rows, a.channels, packs, [&](uint32_t row) {
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const uint64_t place = uint64_t(row) * a.channels + c;
            Pack<T, W> moved = fetch<W>(a.from, place);
            if (a.bias_tangent != nullptr) {
                const Pack<T, W> b = load<W>(a.bias_tangent, c);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) moved.v[v] += b.v[v];
            }
            if (gelu) {
                const Pack<T, W> z = biased<W>(a.x, a.bias, place, c);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) {
                    const Gaussian<T> normal = gaussian(z.v[v]);
                    moved.v[v] *= normal.below + z.v[v] * normal.density;
                }
            }
            if (a.residual != nullptr) {
                const Pack<T, W> other = fetch<W>(a.residual, place);
                POLDER_UNROLL
                for (int v = 0; v < W; ++v) moved.v[v] += other.v[v];
            }
            store_gradient(a.to, place, moved, a.accumulate);
        };
    });
}

/// to = gelu'(x + bias) (from + bias') + residual', or without gelu' where there is no GELU
template <class S>
__device__ void bias_slope(const BiasSlopeArgs<S>& a) {
    if (a.gelu) bias_slope_into<S, true>(a);
    else bias_slope_into<S, false>(a);
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

/// The tangent of the GELU's backward: dx' = dy' gelu'(z) + dy gelu''(z) z', with z = x + bias and
/// gelu''(z) = (2 - z²) φ(z)
template <class S>
__device__ void bias_curve(const BiasCurveArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.channels % V == 0 &&
                       aligned16(a.x, a.bias, a.x_tangent, a.bias_tangent, a.dy, a.dy_tangent, a.dx_tangent);
    for_each_pixel<V>(a.rows, a.channels, packs, [&](uint32_t row) {
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const uint64_t place = uint64_t(row) * a.channels + c;
            const Pack<T, W> z = biased<W>(a.x, a.bias, place, c);
            const Pack<T, W> z_tangent = biased<W>(a.x_tangent, a.bias_tangent, place, c);
            const Pack<T, W> dy = fetch<W>(a.dy, place);
            Pack<T, W> dx = fetch<W>(a.dy_tangent, place);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) {
                const Gaussian<T> normal = gaussian(z.v[v]);
                const T second = (T(2) - z.v[v] * z.v[v]) * normal.density;
                dx.v[v] = dx.v[v] * (normal.below + z.v[v] * normal.density) + dy.v[v] * (second * z_tangent.v[v]);
            }
            store_gradient(a.dx_tangent, place, dx, a.accumulate);
        };
    });
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
struct AddPiecesArgs {
    const T* partials;  // [pieces, outputs, columns]
    T* first;           // [columns], or null
    T* second;          // [columns], or null
    uint32_t pieces;
    uint32_t outputs;
    uint32_t columns;
};

/// The sums of all pieces, of those of one or two outputs that are asked for.
template <class T>
__device__ void add_pieces(const AddPiecesArgs<T>& a) {
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
POLDER_KERNEL(add_pieces_f32, add_pieces<float>, AddPiecesArgs<float>)
POLDER_HOST_KERNEL(add_pieces_f64, add_pieces<double>, AddPiecesArgs<double>)
