// Max pooling of square windows over NHWC activations, forward, backward and tangent. Each kernel is bound by memory.
//
// The forward stores which element of its window each output has chosen, in one byte. The backward and the tangents
// read that instead of x. The backward gathers: one thread computes each element of dx from all windows that contain
// it, so there are no atomics and no order to depend on. Sizes are below 2^32 (the wrappers check), because 64-bit
// divisions are slow on the GPU.
#include "include/pixels.cuh"

namespace {

/// `from` and `to` are x and y, their tangents, or dy and dx.
template <class S>
struct MaxPoolArgs {
    const S* from;
    S* to;
    uint8_t* chosen;  // [batch, out_height, out_width, channels], row * kernel + column within the window
    uint32_t batch;
    uint32_t height;  // of x
    uint32_t width;
    uint32_t channels;
    uint32_t out_height;
    uint32_t out_width;
    uint32_t kernel;
    uint32_t stride;
    uint32_t padding;
    uint32_t accumulate;
};

/// Whether neighbouring channels can be loaded and stored together.
template <class S>
__device__ __forceinline__ bool has_packs(const MaxPoolArgs<S>& a) {
    return a.channels % kPack<S> == 0 && aligned16(a.from, a.to, a.chosen);
}

/// y[n, i, j, c] = the largest x[n, i s - padding + p, j s - padding + q, c] over 0 <= p, q < kernel inside the image,
/// of equal ones the first; a NaN counts as the largest, and of several the last is chosen, as in PyTorch.
template <class S>
__device__ void max_pool(const MaxPoolArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    for_each_pixel<V>(a.batch * a.out_height * a.out_width, a.channels, has_packs(a), [&](uint32_t pixel) {
        const uint32_t j = pixel % a.out_width, i = pixel / a.out_width % a.out_height;
        const uint32_t n = pixel / (a.out_width * a.out_height);
        // The first row and column of the window, counted from the corner of the padding.
        const uint32_t top = i * a.stride, left = j * a.stride;
        const uint32_t p_begin = top < a.padding ? a.padding - top : 0;
        const uint32_t q_begin = left < a.padding ? a.padding - left : 0;
        const uint32_t p_end = min(a.kernel, a.height + a.padding - top);
        const uint32_t q_end = min(a.kernel, a.width + a.padding - left);
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> largest;
            Pack<uint8_t, W> chosen;
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) {
                largest.v[v] = -T(INFINITY);
                chosen.v[v] = uint8_t(p_begin * a.kernel + q_begin);
            }
            for (uint32_t p = p_begin; p < p_end; ++p) {
                const uint64_t row = (uint64_t(n) * a.height + (top + p - a.padding)) * a.width;
                for (uint32_t q = q_begin; q < q_end; ++q) {
                    const Pack<T, W> x = fetch<W>(a.from, (row + (left + q - a.padding)) * a.channels + c);
                    POLDER_UNROLL
                    for (int v = 0; v < W; ++v) {
                        const bool larger = x.v[v] > largest.v[v] || x.v[v] != x.v[v];
                        largest.v[v] = larger ? x.v[v] : largest.v[v];
                        chosen.v[v] = larger ? uint8_t(p * a.kernel + q) : chosen.v[v];
                    }
                }
            }
            put(a.to, uint64_t(pixel) * a.channels + c, largest);
            store(a.chosen, uint64_t(pixel) * a.channels + c, chosen);
        };
    });
}

/// y'[n, i, j, c] = the element of x' that the forward chose
template <class S>
__device__ void max_pool_tangent(const MaxPoolArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    for_each_pixel<V>(a.batch * a.out_height * a.out_width, a.channels, has_packs(a), [&](uint32_t pixel) {
        const uint32_t j = pixel % a.out_width, i = pixel / a.out_width % a.out_height;
        const uint32_t n = pixel / (a.out_width * a.out_height);
        const uint32_t top = i * a.stride, left = j * a.stride;
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const Pack<uint8_t, W> chosen = load<W>(a.chosen, uint64_t(pixel) * a.channels + c);
            Pack<T, W> y;
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) {
                const uint32_t p = chosen.v[v] / a.kernel, q = chosen.v[v] - p * a.kernel;
                const uint64_t row = (uint64_t(n) * a.height + (top + p - a.padding)) * a.width;
                y.v[v] = widen(a.from[(row + (left + q - a.padding)) * a.channels + c + v]);
            }
            put(a.to, uint64_t(pixel) * a.channels + c, y);
        };
    });
}

/// dx = the sum of dy over the windows that have chosen the element
template <class S>
__device__ void max_pool_backward(const MaxPoolArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    for_each_pixel<V>(a.batch * a.height * a.width, a.channels, has_packs(a), [&](uint32_t pixel) {
        const uint32_t w = pixel % a.width, h = pixel / a.width % a.height, n = pixel / (a.width * a.height);
        const uint32_t bottom = h + a.padding, right = w + a.padding;
        const uint32_t i_begin = first_window(bottom, a.kernel, a.stride);
        const uint32_t i_end = min(bottom / a.stride + 1, a.out_height);
        const uint32_t j_begin = first_window(right, a.kernel, a.stride);
        const uint32_t j_end = min(right / a.stride + 1, a.out_width);
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> sum = {};
            for (uint32_t i = i_begin; i < i_end; ++i) {
#pragma unroll 1
                for (uint32_t j = j_begin; j < j_end; ++j) {
                    const uint64_t place = ((uint64_t(n) * a.out_height + i) * a.out_width + j) * a.channels + c;
                    const uint32_t element = (bottom - i * a.stride) * a.kernel + (right - j * a.stride);
                    const Pack<T, W> dy = fetch<W>(a.from, place);
                    const Pack<uint8_t, W> chosen = load<W>(a.chosen, place);
                    POLDER_UNROLL
                    for (int v = 0; v < W; ++v) sum.v[v] += chosen.v[v] == element ? dy.v[v] : T(0);
                }
            }
            store_gradient(a.to, uint64_t(pixel) * a.channels + c, sum, a.accumulate);
        };
    });
}

}  // namespace

POLDER_KERNEL(max_pool_f32, max_pool<float>, MaxPoolArgs<float>)
POLDER_KERNEL(max_pool_f16, max_pool<__half>, MaxPoolArgs<__half>)
POLDER_KERNEL(max_pool_bf16, max_pool<__nv_bfloat16>, MaxPoolArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(max_pool_f64, max_pool<double>, MaxPoolArgs<double>)
POLDER_KERNEL(max_pool_tangent_f32, max_pool_tangent<float>, MaxPoolArgs<float>)
POLDER_KERNEL(max_pool_tangent_f16, max_pool_tangent<__half>, MaxPoolArgs<__half>)
POLDER_KERNEL(max_pool_tangent_bf16, max_pool_tangent<__nv_bfloat16>, MaxPoolArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(max_pool_tangent_f64, max_pool_tangent<double>, MaxPoolArgs<double>)
POLDER_KERNEL(max_pool_backward_f32, max_pool_backward<float>, MaxPoolArgs<float>)
POLDER_KERNEL(max_pool_backward_f16, max_pool_backward<__half>, MaxPoolArgs<__half>)
POLDER_KERNEL(max_pool_backward_bf16, max_pool_backward<__nv_bfloat16>, MaxPoolArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(max_pool_backward_f64, max_pool_backward<double>, MaxPoolArgs<double>)
