// Tensor cores and the copies that feed them: mma, ldmatrix and cp.async, as PTX on the GPU and emulated on the CPU.
//
// Fragments are those of the PTX ISA. The product is of 16 x K by K x 8, where K = 16 for 16-bit elements (two in a
// register) and 8 for TF32 (one in a register). With group = lane / 4 and member = lane % 4, a lane holds:
//
//   a[0 ... 3]: row group (group + 8 in a[1] and a[3]), register `member` of the row's lower half (upper in a[2] and
//   a[3]) b[0 ... 1]: column group, register `member` of the column's lower half (upper in b[1]) c[0 ... 3]: row group
//   (group + 8 in c[2] and c[3]), columns 2 member and 2 member + 1
//
// The order and rounding in which one mma adds its products to c are not specified. On the CPU their sum is computed in
// double and rounded once.
#pragma once
#include "polder.cuh"

namespace {

// ---- mma -----------------------------------------------------------------------------------------------------------

/// Stands for a float that is multiplied as the sum of PIECES numbers of bf16: the float rounded to bf16, what is left
/// of it rounded to bf16, and so on. Of the products of two such sums, those of piece i and piece j with i + j < PIECES
/// are summed. Two pieces hold 16 bits of a float, and three hold all 24.
template <int PIECES>
struct Split {};
typedef Split<2> Bf16x3;
typedef Split<3> Bf16x6;

/// A factor on the tensor cores: how it is stored, and its pieces. `float` stands for TF32; `to_tf32` rounds it before.
template <class P>
struct Factor {
    typedef P Stored;
    static constexpr int PIECES = 1;
};
template <int PIECES_>
struct Factor<Split<PIECES_>> {
    typedef float Stored;
    static constexpr int PIECES = PIECES_;
};
template <class P>
using Stored = typename Factor<P>::Stored;

#if defined(POLDER_HOST)

__forceinline__ float polder_operand(__half, uint32_t bits, int half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> (16 * half))));
}
__forceinline__ float polder_operand(__nv_bfloat16, uint32_t bits, int half) {
    return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits >> (16 * half))));
}
/// The instruction reads 19 bits. If others are set, a rounding is missing: the result is NaN.
__forceinline__ float polder_operand(float, uint32_t bits, int) {
    return __uint_as_float((bits & 0x1fffu) == 0 ? bits : 0x7fffffffu);
}

struct PolderMmaSlot {
    const uint32_t *a, *b;
    float* c;
};

template <class T>
inline void polder_mma_warp(unsigned, void* const* slots) {
    constexpr int PACKED = 4 / int(sizeof(T)), DEPTH = 8 * PACKED;
    double a[16][DEPTH], b[DEPTH][8];
    for (int lane = 0; lane < warpSize; ++lane) {
        const auto* slot = static_cast<const PolderMmaSlot*>(slots[lane]);
        const int group = lane / 4, first = lane % 4 * PACKED;
        for (int i = 0; i < PACKED; ++i) {
            for (int r = 0; r < 4; ++r) {
                a[group + r % 2 * 8][first + i + r / 2 * (DEPTH / 2)] = double(polder_operand(T{}, slot->a[r], i));
            }
            for (int r = 0; r < 2; ++r)
                b[first + i + r * (DEPTH / 2)][group] = double(polder_operand(T{}, slot->b[r], i));
        }
    }
    for (int row = 0; row < 16; ++row) {
        double sum[8] = {};
        for (int k = 0; k < DEPTH; ++k) {
            for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
        }
        for (int column = 0; column < 8; ++column) {
            const int lane = row % 8 * 4 + column / 2;
            float& c = static_cast<const PolderMmaSlot*>(slots[lane])->c[row / 8 * 2 + column % 2];
            c = float(double(c) + sum[column]);
        }
    }
}

/// c += a * b over the warp.
template <class T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    PolderMmaSlot slot{a, b, c};
    polder_warp("mma", polder_mma_warp<T>, 0xffffffffu, &slot);
}

/// x rounded to the 10 bits of TF32's fraction, ties away from zero, as the bits of a float.
__forceinline__ uint32_t to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits & 0x7f800000u) == 0x7f800000u ? (x != x ? 0x7fffe000u : bits) : (bits + 0x1000u) & ~0x1fffu;
}

/// Two numbers rounded to bf16, ties to even, in a register; `low` is in its lower half.
__forceinline__ uint32_t to_bf16_pair(float low, float high) {
    const auto bits = [](float x) { return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(x))); };
    return bits(high) << 16 | bits(low);
}

#else

/// c += a * b over the warp.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define POLDER_MMA(T, SHAPE, TYPE)                                                                       \
    template <>                                                                                          \
    __device__ __forceinline__ void mma<T>(float(&c)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { \
        asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                             \
                     ".f32 "                                                                             \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                \
    }
POLDER_MMA(__half, "m16n8k16", "f16")
POLDER_MMA(__nv_bfloat16, "m16n8k16", "bf16")
POLDER_MMA(float, "m16n8k8", "tf32")
#undef POLDER_MMA

/// x rounded to the 10 bits of TF32's fraction, ties away from zero, as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
}

/// Two numbers rounded to bf16, ties to even, in a register; `low` is in its lower half.
__device__ __forceinline__ uint32_t to_bf16_pair(float low, float high) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return uint32_t(__cvta_generic_to_shared(shared));
}

#endif

// ---- ldmatrix ------------------------------------------------------------------------------------------------------

#if defined(POLDER_HOST)

struct PolderLdmatrixSlot {
    const unsigned char* row;
    uint32_t* matrices;
};

template <bool TRANSPOSED>
inline void polder_ldmatrix_warp(unsigned, void* const* slots) {
    const auto slot = [slots](int lane) { return static_cast<const PolderLdmatrixSlot*>(slots[lane]); };
    for (int lane = 0; lane < warpSize; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            for (int half = 0; half < 2; ++half) {
                const int along = lane % 4 * 2 + half, across = lane / 4;
                const int row = TRANSPOSED ? along : across, column = TRANSPOSED ? across : along;
                memcpy(reinterpret_cast<unsigned char*>(&slot(lane)->matrices[matrix]) + 2 * half,
                       slot(8 * matrix + row)->row + 2 * column, 2);
            }
        }
    }
}

/// Four matrices of 8 rows of 16 bytes in shared memory: lane l names row l % 8 of matrix l / 8. Of each, it gets the
/// two 16-bit elements (or the one of 32 bits) 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, transposed: of column l / 4.
template <bool TRANSPOSED>
inline void ldmatrix(const void* row, uint32_t (&matrices)[4]) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) polder_misuse("ldmatrix", "a row that is not aligned to 16 bytes");
    PolderLdmatrixSlot slot{static_cast<const unsigned char*>(row), matrices};
    polder_warp("ldmatrix", polder_ldmatrix_warp<TRANSPOSED>, 0xffffffffu, &slot);
}

#else

/// Four matrices of 8 rows of 16 bytes in shared memory: lane l names row l % 8 of matrix l / 8. Of each, it gets the
/// two 16-bit elements (or the one of 32 bits) 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, transposed: of column l / 4.
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix(const void* row, uint32_t (&matrices)[4]) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

#endif

// ---- cp.async ------------------------------------------------------------------------------------------------------

/// A thread's pending copies of 16 bytes from global to shared memory. They are committed in groups. The bytes of a
/// group are visible to the thread after it has waited for the group, and to other threads after a barrier too.
///
/// On the CPU a copy happens as late as allowed, when it is waited for. Until then its destination reads as NaN.
struct AsyncCopies {
#if defined(POLDER_HOST)
    struct Copy {
        void* to;
        const void* from;
        int group;
    };
    static constexpr int MOST = 64;
    Copy pending[MOST];
    int count = 0, group = 0;

    /// Copies 16 bytes, or writes 16 zeros if `there` is false: then nothing is read, and `from` need only be aligned.
    /// With L1, the cache keeps the data, because the block is likely to read it again.
    template <bool L1>
    void copy(void* to, const void* from, bool there) {
        const uintptr_t addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
        if (addresses % 16 != 0) polder_misuse("cp.async", "an address that is not aligned to 16 bytes");
        if (count == MOST) polder_misuse("cp.async", "more pending copies than the CPU keeps track of");
        memset(to, 0xff, 16);
        pending[count++] = {to, there ? from : nullptr, group};
    }
    void commit() { ++group; }
    /// Waits until only the LATEST most recent groups are pending.
    template <int LATEST>
    void wait() {
        int left = 0;
        for (int i = 0; i < count; ++i) {
            const Copy& copy = pending[i];
            if (copy.group >= group - LATEST) {
                pending[left++] = copy;
            } else if (copy.from != nullptr) {
                memcpy(copy.to, copy.from, 16);
            } else {
                memset(copy.to, 0, 16);
            }
        }
        count = left;
    }
#else
    /// Copies 16 bytes, or writes 16 zeros if `there` is false: then nothing is read, and `from` need only be aligned.
    /// With L1, the cache keeps the data, because the block is likely to read it again.
    template <bool L1>
    __device__ __forceinline__ void copy(void* to, const void* from, bool there) {
        const int bytes = there ? 16 : 0;
        if constexpr (L1) {
            asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                         "r"(bytes)
                         : "memory");
        } else {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                         "r"(bytes)
                         : "memory");
        }
    }
    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    /// Waits until only the LATEST most recent groups are pending.
    template <int LATEST>
    __device__ __forceinline__ void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
    }
#endif
};

}  // namespace
