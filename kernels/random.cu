// Vectors of random numbers. Each element depends only on the seed and its position in the stream.
#include "include/polder.cuh"

#include "include/philox.cuh"
#include "include/reduce.cuh"

namespace {

template <class T>
struct RandomArgs {
    T* out;
    uint64_t n;
    uint64_t seed, offset;
};

template <class T>
struct Four {
    T v[4];
};

/// out[i] = the number that `from_block` computes for position offset + i. First whole blocks of four, then the parts
/// of blocks at both ends, of up to three elements each.
template <class T, class F>
__device__ __forceinline__ void for_each_random(const RandomArgs<T>& a, F from_block) {
    const uint64_t seed = a.seed;
    const uint64_t head = (4 - (a.offset & 3)) & 3, start = head < a.n ? head : a.n;
    const uint64_t blocks = (a.n - start) / 4, first_block = (a.offset + start) / 4;
    T* whole = a.out + start;
    for_each_index(blocks, [=](uint64_t b) {
        const Four<T> values = from_block(philox_block(seed, first_block + b));
        POLDER_UNROLL
        for (int v = 0; v < 4; ++v) whole[4 * b + v] = values.v[v];
    });
    const uint64_t tail = start + 4 * blocks;
    for_each_index(start + (a.n - tail), [=](uint64_t edge) {
        const uint64_t i = edge < start ? edge : tail + (edge - start), position = a.offset + i;
        const Four<T> values = from_block(philox_block(seed, position / 4));
        const uint32_t lane = uint32_t(position & 3);
        a.out[i] = lane == 0 ? values.v[0] : lane == 1 ? values.v[1] : lane == 2 ? values.v[2] : values.v[3];
    });
}

/// The generator's words themselves.
__device__ void random_bits_body(const RandomArgs<uint32_t>& a) {
    for_each_random(a, [](const PhiloxBlock& block) {
        return Four<uint32_t>{{block.v[0], block.v[1], block.v[2], block.v[3]}};
    });
}

/// Uniform in [0, 1), in steps of 2^-24.
template <class T>
__device__ void uniform(const RandomArgs<T>& a) {
    for_each_random(a, [](const PhiloxBlock& block) {
        return Four<T>{{T(uniform_from(block.v[0])), T(uniform_from(block.v[1])), T(uniform_from(block.v[2])),
                        T(uniform_from(block.v[3]))}};
    });
}

/// +1 or −1.
template <class T>
__device__ void rademacher(const RandomArgs<T>& a) {
    for_each_random(a, [](const PhiloxBlock& block) {
        return Four<T>{{T(rademacher_from(block.v[0])), T(rademacher_from(block.v[1])), T(rademacher_from(block.v[2])),
                        T(rademacher_from(block.v[3]))}};
    });
}

/// Four standard normal numbers from one block.
template <class T>
__device__ __forceinline__ Four<T> normals_from(const PhiloxBlock& block) {
    const NormalPair low = normal_from(block.v[0], block.v[1]), high = normal_from(block.v[2], block.v[3]);
    return {{T(low.first), T(low.second), T(high.first), T(high.second)}};
}

/// Standard normal.
template <class T>
__device__ void normal(const RandomArgs<T>& a) {
    for_each_random(a, [](const PhiloxBlock& block) { return normals_from<T>(block); });
}

// ---- Weights displaced along a normal vector, which is never stored: it is drawn twice, once for its norm -----------

template <class T>
struct PerturbNormalArgs {
    const T* w;
    const double* norm;
    T* out;
    double* partials;
    uint64_t n;
    uint64_t seed, first_block;
    double rho;
};

/// Σ z²
__device__ void normal_squares_body(const PerturbNormalArgs<float>& a) {
    const uint64_t seed = a.seed, first_block = a.first_block, n = a.n;
    const Sums<1> sums = block_sums_of_index<1>((n + 3) / 4, [=](uint64_t b) {
        const Four<float> z = normals_from<float>(philox_block(seed, first_block + b));
        double squares = 0.0;
        POLDER_UNROLL
        for (int v = 0; v < 4; ++v) squares += 4 * b + v < n ? double(z.v[v]) * double(z.v[v]) : 0.0;
        return Sums<1>{{squares}};
    });
    store_partials(a.partials, sums);
}

/// out = w + ρ z/(norm + 1e-12)
template <class T>
__device__ void perturb_normal(const PerturbNormalArgs<T>& a) {
    const T* w = a.w;
    T* out = a.out;
    const uint64_t seed = a.seed, first_block = a.first_block, blocks = a.n / 4, rest = a.n % 4;
    const T scale = normalized_step<T>(a.rho, a.norm);
    for_each_index(blocks, [=](uint64_t b) {
        const Four<T> z = normals_from<T>(philox_block(seed, first_block + b));
        POLDER_UNROLL
        for (int v = 0; v < 4; ++v) out[4 * b + v] = w[4 * b + v] + scale * z.v[v];
    });
    for_each_index(rest, [=](uint64_t v) {
        const Four<T> z = normals_from<T>(philox_block(seed, first_block + blocks));
        const T drawn = v == 0 ? z.v[0] : v == 1 ? z.v[1] : z.v[2];
        out[4 * blocks + v] = w[4 * blocks + v] + scale * drawn;
    });
}

/// One block of the generator for any counter and key: out[0..4] from counter and key, for the known answers.
struct PhiloxArgs {
    uint32_t* out;
    PhiloxBlock counter;
    uint32_t key[2];
};

__device__ void philox_once_body(const PhiloxArgs& a) {
    const PhiloxBlock block = philox(a.counter, a.key[0], a.key[1]);
    for (int v = 0; v < 4; ++v) a.out[v] = block.v[v];
}

}  // namespace

POLDER_KERNEL(random_bits, random_bits_body, RandomArgs<uint32_t>)
POLDER_KERNEL(philox_once, philox_once_body, PhiloxArgs)
POLDER_KERNEL(uniform_f32, uniform<float>, RandomArgs<float>)
POLDER_HOST_KERNEL(uniform_f64, uniform<double>, RandomArgs<double>)
POLDER_KERNEL(normal_f32, normal<float>, RandomArgs<float>)
POLDER_HOST_KERNEL(normal_f64, normal<double>, RandomArgs<double>)
POLDER_KERNEL(normal_squares, normal_squares_body, PerturbNormalArgs<float>)
POLDER_KERNEL(perturb_normal_f32, perturb_normal<float>, PerturbNormalArgs<float>)
POLDER_HOST_KERNEL(perturb_normal_f64, perturb_normal<double>, PerturbNormalArgs<double>)
POLDER_KERNEL(rademacher_f32, rademacher<float>, RandomArgs<float>)
POLDER_HOST_KERNEL(rademacher_f64, rademacher<double>, RandomArgs<double>)
