// A gradient whose tensors lie anywhere, as another framework has left them, gathered into one vector. The same pass
// divides by the loss scale, checks that the elements are finite, and sums squares for the norm.
#include "include/elementwise.cuh"
#include "include/finish.cuh"
#include "include/reduce.cuh"

namespace {

/// A part of a tensor, which a block copies at a time.
struct GatherPiece {
    uint64_t from;  // address of its first element; 0 for zeros
    uint64_t to;    // its place in the vector; kGatherStays if it is only read
    uint64_t n;     // elements, at most kGatherElements
};

/// The elements at an address, which lie in the memory that `known` points to. On a GPU an address from a table has no
/// space, and loads from it would take longer; the distance to a pointer of the arguments has that pointer's.
template <class T>
__device__ __forceinline__ const T* at_address(const T* known, uint64_t address) {
#if defined(POLDER_HOST)
    (void)known;
    return reinterpret_cast<const T*>(address);
#else
    return known + int64_t(address - reinterpret_cast<uintptr_t>(known)) / int64_t(sizeof(T));
#endif
}

/// Where a piece goes: itself if it stays.
template <class T>
__device__ __forceinline__ T* destination(T* out, const GatherPiece& piece) {
    return piece.to == kGatherStays ? const_cast<T*>(at_address<T>(out, piece.from)) : out + piece.to;
}

template <class T>
struct GatherArgs {
    const GatherPiece* table;
    T* out;
    double* partials;
    uint64_t pieces;
    uint32_t streamed;  // whether the vector leaves the CPU's caches before it is read
    uint32_t squared;   // whether the norm is wanted
    FinishArgs finish;
};

#if defined(POLDER_HOST)
/// A block of one thread takes its share of the pieces in stretches that the first-level cache holds: one loop reads
/// and sums a stretch, the next one copies it, past the caches if the vector is long.
template <class T>
void gather_serially(const GatherArgs<T>& a, Finished<T>& finished) {
    constexpr uint64_t kStretch = 8192 / sizeof(T);
    const T inverse = finished.inverse;
    Sums<1> sums = {};
    const uint64_t last = a.pieces * (blockIdx.x + 1) / gridDim.x;
    for (uint64_t number = a.pieces * blockIdx.x / gridDim.x; number < last; ++number) {
        const GatherPiece piece = a.table[number];
        for (uint64_t first = 0; first < piece.n; first += kStretch) {
            const uint64_t n = first + kStretch < piece.n ? kStretch : piece.n - first;
            const T* const from = at_address<T>(a.out, piece.from) + first;
            T* const out = destination(a.out, piece) + first;
            if (piece.from == 0) {
                for (uint64_t i = 0; i < n; ++i) out[i] = T(0);
                continue;
            }
            uint32_t seen = 0;
            if (a.squared != 0) {
                sums.add(serial_sums<1>(0, n, [&](uint64_t i) -> Sums<1> {
                    seen |= exponent_overflow(from[i]);
                    const T value = from[i] * inverse;
                    return {{double(value) * double(value)}};
                }));
            } else {
                for (uint64_t i = 0; i < n; ++i) seen |= exponent_overflow(from[i]);
            }
            finished.seen |= seen;
            if (a.finish.scale != nullptr) {
                for (uint64_t i = 0; i < n; ++i) out[i] = from[i] * inverse;
            } else if (from != out) {
                if (a.streamed != 0 && aligned16(from)) {
                    stream_copy(out, from, n);
                } else {
                    for (uint64_t i = 0; i < n; ++i) out[i] = from[i];
                }
            }
        }
    }
    stream_fence();
    store_partials(a.partials, sums);
}
#endif

/// out = the pieces / scale; flag[0] = 1 if an element is infinite or NaN; and the partial sums of squares
template <class T>
__device__ void gather(const GatherArgs<T>& a) {
    Finished<T> finished(a.finish);
#if defined(POLDER_HOST)
    if (block_threads() == 1) {
        gather_serially(a, finished);
        finished.raise(a.finish);
        return;
    }
#endif
    Sums<1> sums = {};
    for (uint64_t number = blockIdx.x; number < a.pieces; number += gridDim.x) {
        const GatherPiece piece = a.table[number];
        const T* const from = at_address<T>(a.out, piece.from);
        T* const out = destination(a.out, piece);
        const bool writes = from != out || a.finish.scale != nullptr;
        const auto move = [&](auto width, uint64_t i) {
            constexpr int W = decltype(width)::value;
            Pack<T, W> pack = {};
            if (piece.from != 0) pack = load<W>(from, i);
            POLDER_UNROLL
            for (int v = 0; v < W; ++v) {
                pack.v[v] = finished.value(pack.v[v]);
                if (a.squared != 0) sums.add({{double(pack.v[v]) * double(pack.v[v])}});
            }
            if (writes) store(out, i, pack);
        };
        const uint64_t packs = aligned16(from, out) ? piece.n / kPack<T> : 0;
        for (uint64_t pack = threadIdx.x; pack < packs; pack += kBlockThreads) {
            move(Width<kPack<T>>{}, pack * kPack<T>);
        }
        for (uint64_t i = packs * kPack<T> + threadIdx.x; i < piece.n; i += kBlockThreads) move(Width<1>{}, i);
    }
    store_partials(a.partials, block_sum(sums));
    finished.raise(a.finish);
}

}  // namespace

POLDER_KERNEL(gather_f32, gather<float>, GatherArgs<float>)
POLDER_HOST_KERNEL(gather_f64, gather<double>, GatherArgs<double>)
