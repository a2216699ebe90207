// A class token before the patches of an image, and the position embedding of all tokens (Dosovitskiy et al. 2021).
// Bound by memory.
#include "include/pixels.cuh"

namespace {

/// Forward: patches, token and positions to tokens; or the tangents of all four.
template <class S, class T = Arithmetic<S>>
struct EmbedTokensArgs {
    const S* patches;    // [batch, tokens - 1, channels]
    const T* token;      // [channels]
    const T* positions;  // [tokens, channels]
    S* y;                // [batch, tokens, channels]
    uint32_t batch;
    uint32_t tokens;
    uint32_t channels;
};

/// y[n, t] = positions[t] + (t == 0 ? token : patches[n, t - 1])
template <class S>
__device__ void embed_tokens(const EmbedTokensArgs<S>& a) {
    constexpr int V = kPack<S>;
    typedef Arithmetic<S> T;
    const bool packs = a.channels % V == 0 && aligned16(a.patches, a.token, a.positions, a.y);
    for_each_pixel<V>(a.batch * a.tokens, a.channels, packs, [&](uint32_t row) {
        const uint32_t n = row / a.tokens, t = row - n * a.tokens;
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            const uint64_t patch = (uint64_t(n) * (a.tokens - 1) + t - 1) * a.channels + c;
            Pack<T, W> y = t == 0 ? load<W>(a.token, c) : fetch<W>(a.patches, patch);
            const Pack<T, W> position = load<W>(a.positions, uint64_t(t) * a.channels + c);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) y.v[v] += position.v[v];
            put(a.y, uint64_t(row) * a.channels + c, y);
        };
    });
}

template <class S>
struct EmbedTokensBackwardArgs {
    const S* dy;
    S* dpatches;
    uint32_t batch;
    uint32_t tokens;
    uint32_t channels;
    uint32_t accumulate;
};

/// dpatches[n, t] = dy[n, t + 1]
template <class S>
__device__ void embed_tokens_backward(const EmbedTokensBackwardArgs<S>& a) {
    constexpr int V = kPack<S>;
    const bool packs = a.channels % V == 0 && aligned16(a.dy, a.dpatches);
    const uint32_t patches = a.tokens - 1;
    for_each_pixel<V>(a.batch * patches, a.channels, packs, [&](uint32_t row) {
        const uint64_t from = uint64_t(row + row / patches + 1) * a.channels;
        return [=, &a](auto width, uint32_t c) {
            constexpr int W = decltype(width)::value;
            store_gradient(a.dpatches, uint64_t(row) * a.channels + c, fetch<W>(a.dy, from + c), a.accumulate);
        };
    });
}

}  // namespace

POLDER_KERNEL(embed_tokens_f32, embed_tokens<float>, EmbedTokensArgs<float>)
POLDER_KERNEL(embed_tokens_f16, embed_tokens<__half>, EmbedTokensArgs<__half>)
POLDER_KERNEL(embed_tokens_bf16, embed_tokens<__nv_bfloat16>, EmbedTokensArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(embed_tokens_f64, embed_tokens<double>, EmbedTokensArgs<double>)
POLDER_KERNEL(embed_tokens_backward_f32, embed_tokens_backward<float>, EmbedTokensBackwardArgs<float>)
POLDER_KERNEL(embed_tokens_backward_f16, embed_tokens_backward<__half>, EmbedTokensBackwardArgs<__half>)
POLDER_KERNEL(embed_tokens_backward_bf16, embed_tokens_backward<__nv_bfloat16>, EmbedTokensBackwardArgs<__nv_bfloat16>)
POLDER_HOST_KERNEL(embed_tokens_backward_f64, embed_tokens_backward<double>, EmbedTokensBackwardArgs<double>)
