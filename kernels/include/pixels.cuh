// Code that layers over images share: loops over pixels and channels, windows, and gradients that are written or added.
#pragma once
#include "elementwise.cuh"

namespace {

/// Writes a gradient, or adds it.
template <class S, class T, int W>
__device__ __forceinline__ void store_gradient(S* dx, uint64_t i, Pack<T, W> gradient, bool accumulate) {
    if (accumulate) {
        const Pack<T, W> old = fetch<W>(const_cast<const S*>(dx), i);
        POLDER_UNROLL
        for (int v = 0; v < W; ++v) gradient.v[v] += old.v[v];
    }
    put(dx, i, gradient);
}

/// Calls `f(pixel)(Width<V>{}, c)` for V neighbouring channels c, c + 1, ... of each pixel. What depends only on the
/// pixel is computed in the first call. `packs`: whether the channels and addresses allow packs of V.
template <int V, class F>
__device__ __forceinline__ void for_each_pixel(uint32_t pixels, uint32_t channels, bool packs, const F& f) {
#if defined(POLDER_HOST)
    if (blockDim.x == 1) {
        const uint32_t end = uint32_t(uint64_t(pixels) * (blockIdx.x + 1) / gridDim.x);
        for (uint32_t pixel = uint32_t(uint64_t(pixels) * blockIdx.x / gridDim.x); pixel < end; ++pixel) {
            const auto g = f(pixel);
            if (packs) {
                for (uint32_t c = 0; c < channels; c += V) g(Width<V>{}, c);
                continue;
            }
#pragma GCC ivdep
            for (uint32_t c = 0; c < channels; ++c) g(Width<1>{}, c);
        }
        return;
    }
#endif
    if (packs) {
        const uint32_t groups = channels / V;
        for_each_index(uint64_t(pixels) * groups, [&](uint64_t i) {
            const uint32_t pixel = uint32_t(i) / groups;
            f(pixel)(Width<V>{}, (uint32_t(i) - pixel * groups) * V);
        });
    } else {
        for_each_index(uint64_t(pixels) * channels, [&](uint64_t i) {
            const uint32_t pixel = uint32_t(i) / channels;
            f(pixel)(Width<1>{}, uint32_t(i) - pixel * channels);
        });
    }
}

/// The first output whose window [i s, i s + kernel) holds the input at `position`.
__device__ __forceinline__ uint32_t first_window(uint32_t position, uint32_t kernel, uint32_t stride) {
    return position < kernel ? 0 : (position - kernel) / stride + 1;
}

}  // namespace
