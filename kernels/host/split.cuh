// Products of numbers that are split into bf16 pieces, for the CPU's matrix units (AMX).
//
// A float is the sum of two bf16 numbers to 16 bits, and of three to all its 24. So a product of floats is a sum of
// products of pieces, of which those that fall below the last bit are left out: three of four with two pieces, six of
// nine with three. A matrix unit multiplies pieces exactly and sums in f32.
//
// A matrix unit multiplies 16 rows by 16 columns over a depth of 32. It does the following for each element of the
// result: it sums the products of even depths with 16 fused multiply-adds, those of odd depths likewise, adds the two,
// and adds that to the element. Subnormal numbers count as zero. Where there is no matrix unit, vector code does the
// same, so the bits are the same but for results below 2^-126.
//
// An operand's channels are stored in chunks of 32, and the pieces of a chunk are next to each other. If 16 channels
// are left, a chunk holds two of their pieces, so that no part of a product is wasted on zeros with three pieces. A row
// of channels is a multiple of 64 bytes, so that a row of a tile is one cache line.
#pragma once
#include "tiles.cuh"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int kSide = 16, kDepth = 32;  // a tile's rows and columns, and the depth of a product of tiles
constexpr int kTile = kSide * kDepth;   // numbers of an operand's tile

typedef float Floats __attribute__((vector_size(4 * kSide)));
typedef uint32_t Words __attribute__((vector_size(4 * kSide)));
typedef uint16_t Halves __attribute__((vector_size(2 * kSide)));

/// How a type is stored, and the pieces of a factor.
struct Bf16 {
    typedef __nv_bfloat16 Stored;
    static constexpr int pieces = 1;
};
struct Bf16x3 {
    typedef float Stored;
    static constexpr int pieces = 2;
};
struct Bf16x6 {
    typedef float Stored;
    static constexpr int pieces = 3;
};

template <int...>
struct Indices {};

// ---- Splitting -----------------------------------------------------------------------------------------------------

/// Rounds to bf16. Subnormal numbers become zero.
__forceinline__ Halves narrow(const Floats& x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const Words bits = reinterpret_cast<Words>(x), magnitude = bits & 0x7fffffffu;
    Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = magnitude < 0x00800000u ? (bits >> 16) & 0x8000u : rounded;
    rounded = magnitude > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
    return __builtin_convertvector(rounded, Halves);
#endif
}

__forceinline__ Floats widened(const Halves& x) {
    return reinterpret_cast<Floats>(__builtin_convertvector(x, Words) << 16);
}

template <class V>
__forceinline__ V load_as(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

/// 16 neighbouring numbers as floats.
__forceinline__ Floats load_floats(const float* p) { return load_as<Floats>(p); }
__forceinline__ Floats load_floats(const __nv_bfloat16* p) { return widened(load_as<Halves>(p)); }

template <class V, int D, int... I>
__forceinline__ void exchange(V& a, V& b, RowCount<D>, Indices<I...>) {
    // Blocks of D lanes: the first of every two of both, and the second.
    const V first = __builtin_shufflevector(a, b, (I / D % 2 == 0 ? I : I - D + kSide)...);
    b = __builtin_shufflevector(a, b, (I / D % 2 == 0 ? I + D : I + kSide)...);
    a = first;
}

/// Exchanges rows and columns of 16 vectors of 16 lanes.
template <class V>
__forceinline__ void transpose(V (&rows)[kSide]) {
    using Lanes = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
    for (int i = 0; i < 8; ++i) exchange(rows[i], rows[i + 8], RowCount<8>{}, Lanes{});
    for (int i = 0; i < 8; ++i) exchange(rows[i / 4 * 8 + i % 4], rows[i / 4 * 8 + i % 4 + 4], RowCount<4>{}, Lanes{});
    for (int i = 0; i < 8; ++i) exchange(rows[i / 2 * 4 + i % 2], rows[i / 2 * 4 + i % 2 + 2], RowCount<2>{}, Lanes{});
    for (int i = 0; i < 8; ++i) exchange(rows[2 * i], rows[2 * i + 1], RowCount<1>{}, Lanes{});
}

/// The pieces of 16 numbers, the largest first.
template <class P>
struct Split {
    Halves piece[P::pieces];

    __forceinline__ explicit Split(Floats x) {
        for (int p = 0; p < P::pieces; ++p) {
            piece[p] = narrow(x);
            x -= widened(piece[p]);
        }
    }
};

/// The pieces of two neighbouring numbers, as pairs.
__forceinline__ Words paired(const Halves& first, const Halves& second) {
    return __builtin_convertvector(first, Words) | (__builtin_convertvector(second, Words) << 16);
}

/// The pieces of two vectors, as pairs: the first one's in the lower halves of words.
template <class P>
struct SplitPair {
    Words piece[P::pieces];

    __forceinline__ SplitPair(Floats first, Floats second) {
        for (int p = 0; p < P::pieces; ++p) {
            piece[p] = narrow_pair(first, second);
            first -= reinterpret_cast<Floats>(piece[p] << 16);
            second -= reinterpret_cast<Floats>(piece[p] & 0xffff0000u);
        }
    }

private:
    static __forceinline__ Words narrow_pair(const Floats& first, const Floats& second) {
#if defined(__AVX512BF16__)
        // Both, one behind the other, and then in turns.
        const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
        const Words turns = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                             0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
        return reinterpret_cast<Words>(
            _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(turns), reinterpret_cast<__m512i>(both)));
#else
        return paired(narrow(first), narrow(second));
#endif
    }
};

/// Chunks of the last 16 channels in a row, if their number is not a multiple of 32.
template <class P>
constexpr int kLastChunks = P::pieces == 3 ? 2 : 1;

/// Numbers of a row of an operand with so many channels, in all pieces. Channels are a multiple of 16.
template <class P>
__forceinline__ int row_length(int channels) {
    return (P::pieces * (channels / kDepth) + (channels % kDepth == 0 ? 0 : kLastChunks<P>)) * kDepth;
}

/// The pieces of the last 16 channels in the order of a row, as `multiply_channels` reads them.
template <class P>
constexpr int kLast[4] = {P::pieces == 3 ? 2 : 0, P::pieces == 3 ? 0 : 1, 0, 1};

/// Writes 16 channels of a row, from channel number `channel` of `channels` on.
template <class P>
__forceinline__ void store_split(uint16_t* row, int channel, int channels, const Floats& x) {
    const Split<P> split(x);
    if (channels - channel == kSide && channel % kDepth == 0) {
        row += P::pieces * channel;
        if (P::pieces == 1) {
            const Halves zero{};
            memcpy(row, &split.piece[0], sizeof zero);
            memcpy(row + kSide, &zero, sizeof zero);
        } else {
            for (int i = 0; i < 2 * kLastChunks<P>; ++i) {
                memcpy(row + kSide * i, &split.piece[kLast<P>[i]], sizeof(Halves));
            }
        }
        return;
    }
    row += P::pieces * (channel / kDepth * kDepth) + channel % kDepth;
    for (int p = 0; p < P::pieces; ++p) memcpy(row + kDepth * p, &split.piece[p], sizeof(Halves));
}

// ---- Tiles ---------------------------------------------------------------------------------------------------------

/// Calls f(RowCount<FIRST>{}) ... f(RowCount<END - 1>{}).
template <int FIRST, int END, class F>
__forceinline__ void for_constants(F f) {
    if constexpr (FIRST < END) {
        f(RowCount<FIRST>{});
        for_constants<FIRST + 1, END>(f);
    }
}

#if defined(__AMX_BF16__)

template <int TILE>
__forceinline__ void load_tile(const void* first, int64_t pitch_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(pitch_bytes), "i"(TILE) : "memory");
}

/// Prepares the matrix unit for left tiles of `rows` rows, while it exists. It has eight tiles: 0 ... 3 are sums, 4 and
/// 5 are left and 6 and 7 are right.
struct MatrixUnit {
    __forceinline__ explicit MatrixUnit(int rows) {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } layout{};
        static_assert(sizeof layout == 64, "as the processor reads it");
        layout.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            layout.row_bytes[tile] = 64;
            layout.rows[tile] = uint8_t(tile < 6 ? rows : kSide);
        }
        asm volatile("ldtilecfg %0" ::"m"(layout));
    }
    MatrixUnit(const MatrixUnit&) = delete;
    __forceinline__ ~MatrixUnit() { asm volatile("tilerelease"); }
};

/// Sums of products of M left tiles and N right tiles, at most four in all. A left tile has rows that are `pitch`
/// numbers apart, a right tile kDepth / 2 rows of 16 pairs of neighbouring depths. Three right tiles need left ones of
/// 16 rows.
template <int M, int N>
class TileSums {
    const uint16_t* const* left_;
    const uint16_t* const* right_;
    int64_t pitch_, left_offset_ = 0;
    // With one right tile, left ones are loaded one after the other.
    static constexpr bool one_right = N == 1 && M > 1;
    static constexpr int first_right = 8 - N;
    static_assert(N < 4 && (M <= 2 || one_right), "more than eight tiles");

    template <int LEFT, int RIGHT, int SUM>
    static __forceinline__ void add_product() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
    }

public:
    /// `left` and `right` are the places of the tiles, which `load_left` and `load_right` move.
    __forceinline__ TileSums(const MatrixUnit&, const uint16_t* const* left, int pitch, const uint16_t* const* right)
        : left_(left), right_(right), pitch_(2 * int64_t(pitch)) {}

    __forceinline__ void clear() {
        for_constants<0, M * N>([](auto i) { asm volatile("tilezero %%tmm%c0" ::"i"(decltype(i)::value)); });
    }
    __forceinline__ void load_sum(int which, const float* from, int64_t pitch) {
        for_constants<0, M * N>([&](auto i) {
            if (i.value == which) load_tile<decltype(i)::value>(from, 4 * pitch);
        });
    }
    __forceinline__ void store_sum(int which, float* to, int64_t pitch) {
        for_constants<0, M * N>([&](auto i) {
            if (i.value != which) return;
            asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * pitch), "i"(decltype(i)::value)
                         : "memory");
        });
    }
    __forceinline__ void load_left(int64_t offset) {
        left_offset_ = offset;
        if constexpr (!one_right) {
            for_constants<0, M>([&](auto m) { load_tile<4 + decltype(m)::value>(left_[m.value] + offset, pitch_); });
        }
    }
    __forceinline__ void load_right(int64_t offset) {
        for_constants<0, N>([&](auto n) { load_tile<first_right + decltype(n)::value>(right_[n.value] + offset, 64); });
    }
    __forceinline__ void multiply() {
        for_constants<0, M * N>([&](auto i) {
            constexpr int I = decltype(i)::value, m = I / N, left = one_right ? 4 + m % 2 : 4 + m;
            if constexpr (one_right) load_tile<left>(left_[m] + left_offset_, pitch_);
            add_product<left, first_right + I % N, I>();
        });
    }
    /// Adds products of the left tiles at one offset with right tiles at two, one after the other.
    __forceinline__ void multiply_by_two(int64_t left_offset, int64_t first, int64_t second) {
        load_left(left_offset);
        load_right(first);
        if constexpr (one_right) {
            load_tile<first_right - 1>(right_[0] + second, 64);
            for_constants<0, M>([&](auto m) {
                constexpr int I = decltype(m)::value, left = 4 + I % 2;
                load_tile<left>(left_[I] + left_offset, pitch_);
                add_product<left, first_right, I>();
                add_product<left, first_right - 1, I>();
            });
        } else {
            multiply();
            load_right(second);
            multiply();
        }
    }
};

#else

struct MatrixUnit {
    int rows;
    explicit MatrixUnit(int rows) : rows(rows) {}
};

template <int M, int N>
class TileSums {
    const MatrixUnit& unit_;
    const uint16_t* const* left_;
    const uint16_t* const* right_;
    int64_t pitch_, left_offset_ = 0, right_offset_ = 0;
    Floats sums_[M * N][kSide];

public:
    TileSums(const MatrixUnit& unit, const uint16_t* const* left, int pitch, const uint16_t* const* right)
        : unit_(unit), left_(left), right_(right), pitch_(pitch) {}

    void clear() { memset(sums_, 0, sizeof sums_); }
    void load_sum(int which, const float* from, int64_t pitch) {
        for (int row = 0; row < unit_.rows; ++row) sums_[which][row] = load_as<Floats>(from + row * pitch);
    }
    void store_sum(int which, float* to, int64_t pitch) {
        for (int row = 0; row < unit_.rows; ++row) memcpy(to + row * pitch, &sums_[which][row], sizeof(Floats));
    }
    void load_left(int64_t offset) { left_offset_ = offset; }
    void load_right(int64_t offset) { right_offset_ = offset; }
    void multiply_by_two(int64_t left_offset, int64_t first, int64_t second) {
        load_left(left_offset);
        load_right(first);
        multiply();
        load_right(second);
        multiply();
    }
    void multiply() {
        for (int n = 0; n < N; ++n) {
            Floats even[kSide], odd[kSide];
            for (int k = 0; k < kSide; ++k) {
                const Words pairs = load_as<Words>(right_[n] + right_offset_ + k * kDepth);
                even[k] = reinterpret_cast<Floats>(pairs << 16);
                odd[k] = reinterpret_cast<Floats>(pairs & 0xffff0000u);
            }
            for (int m = 0; m < M; ++m) {
                const uint16_t* row = left_[m] + left_offset_;
                for (int i = 0; i < unit_.rows; ++i, row += pitch_) {
                    Floats evens{}, odds{};
                    for (int k = 0; k < kSide; ++k) {
                        evens += __bfloat162float({row[2 * k]}) * even[k];
                        odds += __bfloat162float({row[2 * k + 1]}) * odd[k];
                    }
                    sums_[m * N + n][i] += evens + odds;
                }
            }
        }
    }
};

#endif

// ---- Products ------------------------------------------------------------------------------------------------------

/// Adds the products of all channels of a row, for the left operand's offset `left` and the right one's tiles from
/// `right` on: for each chunk one tile for each piece, and for the last 16 channels those of `last_piece`. With three
/// pieces the largest products are last. The offset behind the right operand's tiles is returned.
template <class P, class Sums>
__forceinline__ int64_t multiply_channels(Sums& sums, int64_t left, int64_t right, int channels) {
    const auto step = [&](int64_t a, int64_t b) {
        if (a >= 0) sums.load_left(left + a);
        if (b >= 0) sums.load_right(right + b);
        sums.multiply();
    };
    constexpr int64_t same = -1;
    for (int chunk = 0; chunk < channels / kDepth; ++chunk, left += P::pieces * kDepth, right += P::pieces * kTile) {
        if constexpr (P::pieces == 1) {
            step(0, 0);
        } else if constexpr (P::pieces == 2) {
            step(kDepth, 0), step(0, same), step(same, kTile);
        } else {
            step(2 * kDepth, 0), step(kDepth, same), step(same, kTile);
            step(0, same), step(same, 2 * kTile), step(same, 0);
        }
    }
    if (channels % kDepth == 0) return right;
    if constexpr (P::pieces == 1) {
        step(0, 0);
        return right + kTile;
    } else if constexpr (P::pieces == 2) {
        sums.multiply_by_two(left, right + kTile, right);  // [0 1] with [1 -] and [0 0]
        return right + 2 * kTile;
    } else {
        step(0, 2 * kTile);                                         // [2 0] with [0 2]
        sums.multiply_by_two(left + kDepth, right + kTile, right);  // [0 1] with [1 1] and [0 0]
        return right + 3 * kTile;
    }
}

/// Adds the products of all pieces, of which the left ones are `left_pitch` apart and the right ones `right_pitch`.
template <class P, class Sums>
__forceinline__ void multiply_pieces(Sums& sums, int64_t left, int64_t left_pitch, int64_t right, int64_t right_pitch) {
    const auto a = [&](int p) { sums.load_left(left + p * left_pitch); };
    const auto b = [&](int p) { sums.load_right(right + p * right_pitch); };
    if constexpr (P::pieces == 1) {
        a(0), b(0), sums.multiply();
    } else if constexpr (P::pieces == 2) {
        a(1), b(0), sums.multiply(), a(0), sums.multiply(), b(1), sums.multiply();
    } else {
        a(2), b(0), sums.multiply(), a(1), sums.multiply(), b(1), sums.multiply();
        a(0), sums.multiply(), b(2), sums.multiply(), b(0), sums.multiply();
    }
}

/// The pieces of the last 16 channels in the right operand's tile number `tile`, for the first and the second half of
/// its depth; negative for zeros. The left operand's order is `kLast`.
template <class P>
__forceinline__ int last_piece(int tile, int half) {
    if (P::pieces == 1) return half == 0 ? 0 : -1;
    if (P::pieces == 2) return tile == 0 ? 0 : half == 0 ? 1 : -1;
    return tile < 2 ? tile : half == 0 ? 0 : 2;
}

/// Tiles of the right operand for all channels of a row.
template <class P>
__forceinline__ int row_tiles(int channels) {
    return P::pieces * (channels / kDepth + (channels % kDepth != 0));
}

/// Packs channels of the right operand: to[tile][pair][column][2], where row(channel) is 16 columns as floats.
template <class P, class Row>
__forceinline__ void pack_channels(uint16_t* to, int channels, Row row) {
    for (int channel = 0; channel < channels / kDepth * kDepth; channel += 2) {
        const Floats first = row(channel);  // rows are asked for in order
        const SplitPair<P> split(first, row(channel + 1));
        uint16_t* at = to + P::pieces * (channel / kDepth) * kTile + channel % kDepth / 2 * kDepth;
        for (int p = 0; p < P::pieces; ++p) memcpy(at + p * kTile, &split.piece[p], sizeof(Words));
    }
    if (channels % kDepth == 0) return;
    to += P::pieces * (channels / kDepth) * kTile;
    for (int k = 0; k < kSide; k += 2) {
        const Floats first = row(channels - kSide + k);
        const SplitPair<P> split(first, row(channels - kSide + k + 1));
        for (int tile = 0; tile < P::pieces; ++tile) {
            for (int half = 0; half < 2; ++half) {
                const int p = last_piece<P>(tile, half);
                const Words pairs = p < 0 ? Words{} : split.piece[p < 0 ? 0 : p];
                memcpy(to + tile * kTile + (half * kSide + k) / 2 * kDepth, &pairs, sizeof pairs);
            }
        }
    }
}

}  // namespace
