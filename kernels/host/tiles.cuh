// What the CPU's convolutions share: vectors, panels of channels, the size of register tiles, and bands of images.
#pragma once
#include "../include/elementwise.cuh"

// Fused multiply-adds, if the instruction set has them. AVX2 and AVX-512 do and give the same bits; the baseline gives
// different ones.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"  // no vector is passed to a function that is not inlined
#endif

namespace {

// A tile's rows by the vectors of a panel are 12 sums: enough to hide the latency of two multiply-adds at a time.
#if defined(__AVX512F__)
// The number of a row is broadcast as an operand of the multiply-add. Each row has a pointer; there are no registers
// for more.
constexpr int kVectorBytes = 64, kTileRows = 12;
#else
// With two vectors of the panel and one broadcast they use 15 of 16 registers.
constexpr int kVectorBytes = 32, kTileRows = 6;
#endif
constexpr int kVectors = kPanelBytes / kVectorBytes;

/// A panel or half of it: one register of AVX-512 or AVX2, two of narrower instruction sets.
template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(kVectorBytes)));
    static constexpr int lanes = kVectorBytes / sizeof(T);
};

/// Channels of a panel: 16 floats, 8 doubles.
template <class T>
constexpr int kPanel = kPanelBytes / sizeof(T);

template <class T>
__forceinline__ typename Vector<T>::type load_vector(const T* p) {
    typename Vector<T>::type v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
__forceinline__ void store_vector(T* p, const typename Vector<T>::type& v) {
    memcpy(p, &v, sizeof v);
}

__forceinline__ int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Copies count numbers, and widens those that are stored in fewer bits.
template <class S, class T>
__forceinline__ void copy_widened(T* __restrict__ to, const S* __restrict__ from, size_t count) {
    if constexpr (Same<S, T>::value) {
        memcpy(to, from, count * sizeof(T));
    } else {
        for (size_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    }
}

/// The number of a tile's rows, as a compile-time constant.
template <int ROWS>
struct RowCount {
    static constexpr int value = ROWS;
};

/// Calls f(RowCount<rows>{}) for 1 ... MOST rows; not for 0.
template <int MOST, class F>
__forceinline__ void with_rows(int rows, F f) {
    if (rows == MOST) {
        f(RowCount<MOST>{});
    } else if constexpr (MOST > 1) {
        with_rows<MOST - 1>(rows, f);
    }
}

/// A part of a zero-padded image.
struct Window {
    int first_row, rows, first_column, columns;  // in the unpadded image; may be outside
};

/// The part of the batch that a block works on: `images` whole images, or `rows` rows of one.
struct Bands {
    int32_t images, rows;
};

struct Band {
    int first_image, images, first_row, rows;
};

__forceinline__ Band band_at(const Bands& bands, int index, int batch, int total_rows) {
    const int per_image = (total_rows + bands.rows - 1) / bands.rows;
    const int first_image = index / per_image * bands.images, first_row = index % per_image * bands.rows;
    return {first_image, batch - first_image < bands.images ? batch - first_image : bands.images, first_row,
            total_rows - first_row < bands.rows ? total_rows - first_row : bands.rows};
}

/// The next band; empty if there is none.
__forceinline__ Band band_after(const Bands& bands, int index, bool follows, int batch, int total_rows) {
    return follows ? band_at(bands, index + 1, batch, total_rows) : Band{};
}

/// Memory that is prefetched into the cache during other work.
struct Ahead {
    uintptr_t line;
    int64_t pitch, left, at_once;  // bytes from line to line; lines left; lines at a time

    /// Prefetches `count` lines, beginning with element `first` of `tensor`, some in each of `parts` parts of the other
    /// work. If the parts are too small to hide them, nothing is prefetched.
    template <class S>
    Ahead(const S* tensor, int64_t first, int64_t pitch, int64_t count, int64_t parts)
        : line(reinterpret_cast<uintptr_t>(tensor) + first * int64_t(sizeof(S))), pitch(pitch),
          left(count <= 32 * parts ? count : 0), at_once(left > 0 ? (left + parts - 1) / parts : 0) {}

    __forceinline__ void fetch() {
        for (int64_t i = 0; i < at_once && left > 0; ++i, --left, line += pitch) {
            __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
        }
    }
};

constexpr int64_t kLineBytes = 64;

}  // namespace
