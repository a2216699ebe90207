// Philox4x32-10, the counter-based random generator of Salmon, Moraes, Dror and Shaw 2011, "Parallel Random Numbers: As
// Easy as 1, 2, 3", and numbers made from its bits: uniform, normal, ±1.
//
// The element at position p of a stream is word p % 4 of the block whose counter is p / 4 and whose key is the seed, so
// it depends only on seed and position. The normal numbers have the same bits on every device: each operation below is
// a single rounding that no compiler may contract, and logarithm, sine and cosine are the polynomials here.
#pragma once
#include "polder.cuh"

namespace {

struct PhiloxBlock {
    uint32_t v[4];
};

/// Ten rounds on a counter of 128 bits with a key of 64.
__device__ __forceinline__ PhiloxBlock philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
    uint32_t c0 = counter.v[0], c1 = counter.v[1], c2 = counter.v[2], c3 = counter.v[3];
    POLDER_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
        c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
        c1 = uint32_t(product1);
        c3 = uint32_t(product0);
        key0 += 0x9E3779B9u;  // the golden ratio
        key1 += 0xBB67AE85u;  // sqrt(3) - 1
    }
    return {{c0, c1, c2, c3}};
}

/// The block of the stream `seed` that holds the positions 4 index ... 4 index + 3.
__device__ __forceinline__ PhiloxBlock philox_block(uint64_t seed, uint64_t index) {
    return philox({{uint32_t(index), uint32_t(index >> 32), 0, 0}}, uint32_t(seed), uint32_t(seed >> 32));
}

/// A further block of the same index: each `use` above 0 is a stream of its own.
__device__ __forceinline__ PhiloxBlock philox_block(uint64_t seed, uint64_t index, uint32_t use) {
    return philox({{uint32_t(index), uint32_t(index >> 32), use, 0}}, uint32_t(seed), uint32_t(seed >> 32));
}

/// The word at one position.
__device__ __forceinline__ uint32_t philox_word(uint64_t seed, uint64_t position) {
    const PhiloxBlock block = philox_block(seed, position / 4);
    const uint32_t lane = uint32_t(position & 3);
    return lane == 0 ? block.v[0] : lane == 1 ? block.v[1] : lane == 2 ? block.v[2] : block.v[3];
}

// ---- Operations of one rounding each -------------------------------------------------------------------------------

#if defined(POLDER_HOST)
// The host compiler does not contract: build.rs forbids it.
__device__ __forceinline__ float exact_add(float a, float b) { return a + b; }
__device__ __forceinline__ float exact_mul(float a, float b) { return a * b; }
__device__ __forceinline__ float exact_div(float a, float b) { return a / b; }
__device__ __forceinline__ float exact_sqrt(float a) { return __builtin_sqrtf(a); }
__device__ __forceinline__ double exact_add(double a, double b) { return a + b; }
__device__ __forceinline__ double exact_mul(double a, double b) { return a * b; }
__device__ __forceinline__ double exact_div(double a, double b) { return a / b; }
#else
__device__ __forceinline__ float exact_add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float exact_mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float exact_div(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float exact_sqrt(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double exact_add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double exact_mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double exact_div(double a, double b) { return __ddiv_rn(a, b); }
#endif

/// a b + c in two roundings
__device__ __forceinline__ float mul_add(float a, float b, float c) { return exact_add(exact_mul(a, b), c); }

// ---- Numbers -------------------------------------------------------------------------------------------------------

/// Uniform in [0, 1): the upper 24 bits, each value exact.
__device__ __forceinline__ float uniform_from(uint32_t bits) { return exact_mul(float(int32_t(bits >> 8)), 0x1p-24f); }

/// +1 or −1 by the upper bit.
__device__ __forceinline__ float rademacher_from(uint32_t bits) {
    return __uint_as_float(0x3f800000u | (bits & 0x80000000u));
}

/// bits as a float, rounded once: the lower half is exact, and so is the upper half times 2^16.
__device__ __forceinline__ float float_from(uint32_t bits) {
    return mul_add(float(int32_t(bits >> 16)), 65536.0f, float(int32_t(bits & 0xffffu)));
}

/// −ln((bits + 1)/2^32), within a few units in the last place: 0 to 22.18.
__device__ __forceinline__ float negative_log_from(uint32_t bits) {
    // u = (bits + 1)/2^32 = 2^e (1 + f) with 1 + f between sqrt(1/2) and sqrt(2). Near 1, ln u ≈ u − 1 would lose the
    // bits that rounding u cuts off, so f is computed from the distance to 1, which is exact before it is rounded.
    const bool near_one = bits >= 0xB504F333u;  // sqrt(1/2) 2^32
    const float scaled = float_from(near_one ? ~bits : bits + 1u);
    const uint32_t pattern = __float_as_uint(scaled);
    const uint32_t shifted = pattern - 0x3f3504f3u;  // sqrt(1/2) as a float
    const int32_t exponent = int32_t(shifted >> 23);
    const float mantissa = __uint_as_float((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float f = near_one ? exact_mul(scaled, -0x1p-32f) : exact_add(mantissa, -1.0f);
    const float e = near_one ? 0.0f : float(exponent - 32);
    // ln(1 + f) = 2 atanh(s) = 2s (1 + s²/3 + s⁴/5 + ...) with s = f/(2 + f), |s| <= 0.172: the next term is below
    // 2^-32.
    const float s = exact_div(f, exact_add(2.0f, f)), z = exact_mul(s, s);
    float series = mul_add(z, 2.0f / 11.0f, 2.0f / 9.0f);
    series = mul_add(z, series, 2.0f / 7.0f);
    series = mul_add(z, series, 2.0f / 5.0f);
    series = mul_add(z, series, 2.0f / 3.0f);
    const float tail = exact_mul(exact_mul(s, z), series);
    // e times the upper part of ln 2 is exact: that part has 15 bits.
    const float low = exact_add(tail, exact_mul(e, 1.42860677e-6f));
    const float log1p = exact_add(exact_add(s, s), low);
    return exact_add(exact_mul(e, -0.693145752f), -log1p);
}

struct SinCos {
    float sine, cosine;
};

/// sin and cos of 2π bits/2^32, within a few units in the last place.
__device__ __forceinline__ SinCos sin_cos_from(uint32_t bits) {
    // The nearest quarter turn, and the exact distance from it, at most an eighth of a turn.
    const uint32_t quarter = (bits + 0x20000000u) >> 30;
    const int32_t distance = int32_t(bits - (quarter << 30));
    const float x = exact_mul(float(distance), 1.46291807926715968e-9f);  // 2π/2^32
    const float z = exact_mul(x, x);
    float sine = mul_add(z, 1.0f / 362880.0f, -1.0f / 5040.0f);
    sine = mul_add(z, sine, 1.0f / 120.0f);
    sine = mul_add(z, sine, -1.0f / 6.0f);
    sine = mul_add(exact_mul(z, x), sine, x);
    float cosine = mul_add(z, -1.0f / 3628800.0f, 1.0f / 40320.0f);
    cosine = mul_add(z, cosine, -1.0f / 720.0f);
    cosine = mul_add(z, cosine, 1.0f / 24.0f);
    cosine = mul_add(z, cosine, -0.5f);
    cosine = mul_add(z, cosine, 1.0f);
    const bool odd = (quarter & 1u) != 0;
    const float s = odd ? cosine : sine, c = odd ? sine : cosine;
    return {quarter >= 2 ? -s : s, quarter == 1 || quarter == 2 ? -c : c};
}

struct NormalPair {
    float first, second;
};

/// Two independent standard normal numbers from two words, by Box and Muller's transform: sqrt(−2 ln u) times the
/// cosine and the sine of 2πv, with u = (bits0 + 1)/2^32 and v = bits1/2^32. Their magnitude is at most 6.66.
__device__ __forceinline__ NormalPair normal_from(uint32_t bits0, uint32_t bits1) {
    const float negative_log = negative_log_from(bits0);
    const float radius = exact_sqrt(exact_add(negative_log, negative_log));
    const SinCos angle = sin_cos_from(bits1);
    return {exact_mul(radius, angle.cosine), exact_mul(radius, angle.sine)};
}

}  // namespace
