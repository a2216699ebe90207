// The PTX instructions that use only registers: arithmetic, comparisons, conversions. The table has those that nvcc
// uses for these kernels, and similar ones. At any other instruction the parser stops with a message.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <unordered_map>

#include "ptx.hpp"

namespace {

template <class T, class F>
void unary(Warp& w, const Instruction& i, uint32_t mask) {
    T* d = w.row<T>(i.d);
    const T* a = w.row<T>(i.a);
    for_lanes(mask, [=](int l) { d[l] = F::of(a[l]); });
}

template <class T, class F>
void binary(Warp& w, const Instruction& i, uint32_t mask) {
    T* d = w.row<T>(i.d);
    const T *a = w.row<T>(i.a), *b = w.row<T>(i.b);
    for_lanes(mask, [=](int l) { d[l] = F::of(a[l], b[l]); });
}

template <class T, class F>
void ternary(Warp& w, const Instruction& i, uint32_t mask) {
    T* d = w.row<T>(i.d);
    const T *a = w.row<T>(i.a), *b = w.row<T>(i.b), *c = w.row<T>(i.c);
    for_lanes(mask, [=](int l) { d[l] = F::of(a[l], b[l], c[l]); });
}

template <class T, class F>
void shift(Warp& w, const Instruction& i, uint32_t mask) {
    T* d = w.row<T>(i.d);
    const T* a = w.row<T>(i.a);
    const uint32_t* b = w.row<uint32_t>(i.b);
    for_lanes(mask, [=](int l) { d[l] = F::of(a[l], b[l]); });
}

template <class S, class D>
void multiply_wide(Warp& w, const Instruction& i, uint32_t mask) {
    D* d = w.row<D>(i.d);
    const S *a = w.row<S>(i.a), *b = w.row<S>(i.b);
    for_lanes(mask, [=](int l) { d[l] = D(a[l]) * D(b[l]); });
}

template <class D, class S, class F>
void convert(Warp& w, const Instruction& i, uint32_t mask) {
    D* d = w.row<D>(i.d);
    const S* a = w.row<S>(i.a);
    for_lanes(mask, [=](int l) { d[l] = F::of(a[l]); });
}

template <class T>
void select(Warp& w, const Instruction& i, uint32_t mask) {
    T* d = w.row<T>(i.d);
    const T *a = w.row<T>(i.a), *b = w.row<T>(i.b);
    const uint32_t chosen = *w.row<uint32_t>(i.c);
    for_lanes(mask, [=](int l) { d[l] = chosen >> l & 1 ? a[l] : b[l]; });
}

inline void put(Warp& w, uint32_t row, uint32_t mask, uint32_t bits) {
    uint32_t* d = w.row<uint32_t>(row);
    *d = (*d & ~mask) | (bits & mask);
}

template <class T, class F>
void compare(Warp& w, const Instruction& i, uint32_t mask) {
    const T *a = w.row<T>(i.a), *b = w.row<T>(i.b);
    uint32_t bits = 0;
    for (int l = 0; l < LANES; ++l) bits |= uint32_t(F::of(a[l], b[l])) << l;
    put(w, i.d, mask, bits);
}

template <class F>
void predicate(Warp& w, const Instruction& i, uint32_t mask) {
    put(w, i.d, mask, F::of(*w.row<uint32_t>(i.a), i.b == NOWHERE ? 0 : *w.row<uint32_t>(i.b)));
}

void count_leading_zeros(Warp& w, const Instruction& i, uint32_t mask) {
    uint32_t* d = w.row<uint32_t>(i.d);
    const uint32_t* a = w.row<uint32_t>(i.a);
    for_lanes(mask, [=](int l) { d[l] = a[l] ? __builtin_clz(a[l]) : 32; });
}

/// The lowest bits of a, as many as e says, in b from bit c on.
void insert_bits(Warp& w, const Instruction& i, uint32_t mask) {
    uint32_t* d = w.row<uint32_t>(i.d);
    const uint32_t *a = w.row<uint32_t>(i.a), *b = w.row<uint32_t>(i.b), *c = w.row<uint32_t>(i.c),
                   *e = w.row<uint32_t>(i.e);
    for_lanes(mask, [=](int l) {
        const uint32_t first = c[l] & 255, count = e[l] & 255;
        const uint64_t ones = first > 31 ? 0 : ((count > 31 ? 1ull << 32 : 1ull << count) - 1) << first;
        d[l] = uint32_t((b[l] & ~ones) | ((first > 31 ? 0 : uint64_t(a[l]) << first) & ones));
    });
}

#define POLDER_OPERATION(NAME, PARAMETERS, RESULT) \
    struct NAME {                                  \
        template <class T>                         \
        static T of PARAMETERS {                   \
            return RESULT;                         \
        }                                          \
    };
POLDER_OPERATION(Same, (T a), a)
POLDER_OPERATION(Negative, (T a), T(-a))
POLDER_OPERATION(Not, (T a), T(~a))
POLDER_OPERATION(Absolute, (T a), std::fabs(a))
POLDER_OPERATION(Root, (T a), std::sqrt(a))
POLDER_OPERATION(Reciprocal, (T a), T(1) / a)
POLDER_OPERATION(Nearest, (T a), std::nearbyint(a))
POLDER_OPERATION(Saturated, (T a), !(a > 0) ? T(0) : a > 1 ? T(1) : a)
POLDER_OPERATION(Add, (T a, T b), T(a + b))
POLDER_OPERATION(Subtract, (T a, T b), T(a - b))
POLDER_OPERATION(Multiply, (T a, T b), T(a* b))
POLDER_OPERATION(Divide, (T a, T b), a / b)
POLDER_OPERATION(And, (T a, T b), T(a& b))
POLDER_OPERATION(Or, (T a, T b), T(a | b))
POLDER_OPERATION(Xor, (T a, T b), T(a ^ b))
POLDER_OPERATION(Inverse, (T a, T), T(~a))
POLDER_OPERATION(First, (T a, T), a)
POLDER_OPERATION(Smaller, (T a, T b), a < b ? a : b)
POLDER_OPERATION(Larger, (T a, T b), a > b ? a : b)
POLDER_OPERATION(MultiplyAdd, (T a, T b, T c), T(a* b + c))
POLDER_OPERATION(Fused, (T a, T b, T c), std::fma(a, b, c))

/// The result for a number and a NaN is the number, for two NaNs the canonical NaN; -0 is less than +0.
struct SmallerNumber {
    template <class T>
    static T of(T a, T b) {
        if (a != a || b != b) return a == a ? a : b == b ? b : std::numeric_limits<T>::quiet_NaN();
        return a < b || (a == b && std::signbit(a)) ? a : b;
    }
};
struct LargerNumber {
    template <class T>
    static T of(T a, T b) {
        if (a != a || b != b) return a == a ? a : b == b ? b : std::numeric_limits<T>::quiet_NaN();
        return a > b || (a == b && std::signbit(b)) ? a : b;
    }
};

/// Subnormal numbers become zero, for `.ftz`.
template <class T>
T flushed(T a) {
    return std::fabs(a) < std::numeric_limits<T>::min() ? std::copysign(T(0), a) : a;
}
struct Exponential2 {
    static float of(float a) { return flushed(std::exp2(flushed(a))); }
};

/// Division by zero gives all ones, as on a GPU, and does not trap.
struct WholeQuotient {
    template <class T>
    static T of(T a, T b) {
        if (b == 0) return T(-1);
        return std::is_signed_v<T> && b == T(-1) ? T(0 - std::make_unsigned_t<T>(a)) : T(a / b);
    }
};
struct Remainder {
    template <class T>
    static T of(T a, T b) {
        if (b == 0) return a;
        return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
    }
};
struct Left {
    template <class T>
    static T of(T a, uint32_t b) {
        return b >= sizeof(T) * 8 ? T(0) : T(a << b);
    }
};
struct Right {
    template <class T>
    static T of(T a, uint32_t b) {
        constexpr uint32_t LAST = sizeof(T) * 8 - 1;
        return b <= LAST ? T(a >> b) : std::is_signed_v<T> ? T(a >> LAST) : T(0);
    }
};
struct UpperHalf {
    static uint32_t of(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
    static int32_t of(int32_t a, int32_t b) { return int32_t(int64_t(a) * b >> 32); }
};
/// c and two products: the halves of a with the lower bytes of b.
struct TwoProducts {
    static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
        return c + (a & 0xffff) * (b & 0xff) + (a >> 16) * (b >> 8 & 0xff);
    }
};
/// Rounded towards minus infinity. A double holds the product, and a long double its sum with c if their exponents are
/// close: `expf` adds a product between 0 and some hundreds to about a half.
struct FusedDown {
    static float of(float a, float b, float c) {
        const long double exact = static_cast<long double>(double(a) * double(b)) + c;
        const float nearest = float(exact);
        return static_cast<long double>(nearest) > exact ? std::nextafter(nearest, -INFINITY) : nearest;
    }
};
/// To about 20 bits, to find code that relies on more bits of the GPU's approximation.
struct RoughReciprocal {
    static double of(double a) {
        const double reciprocal = flushed(1 / flushed(a));
        uint64_t bits;
        memcpy(&bits, &reciprocal, 8);
        bits &= ~0xffffffffull;
        double rough;
        memcpy(&rough, &bits, 8);
        return rough;
    }
};

// Comparisons with a NaN are false, except for the unordered ones (`...u`), which are true.
#define POLDER_COMPARISON(NAME, OPERATOR)            \
    struct NAME {                                    \
        template <class T>                           \
        static bool of(T a, T b) {                   \
            return a OPERATOR b && a == a && b == b; \
        }                                            \
    };                                               \
    struct NAME##OrNot {                             \
        template <class T>                           \
        static bool of(T a, T b) {                   \
            return a OPERATOR b || a != a || b != b; \
        }                                            \
    };
POLDER_COMPARISON(Equal, ==)
POLDER_COMPARISON(Unequal, !=)
POLDER_COMPARISON(Less, <)
POLDER_COMPARISON(AtMost, <=)
POLDER_COMPARISON(More, >)
POLDER_COMPARISON(AtLeast, >=)

/// A digit of c chooses each byte among the eight of a (the lower four) and b. If the digit's highest bit is set, the
/// byte is the chosen byte's sign, eight times.
struct PermutedBytes {
    static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
        const uint64_t bytes = uint64_t(b) << 32 | a;
        uint32_t result = 0;
        for (int k = 0; k < 4; ++k) {
            const uint32_t digit = c >> 4 * k & 15, byte = uint32_t(bytes >> 8 * (digit & 7) & 255);
            result |= (digit & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
        }
        return result;
    }
};

/// Whether one of two is a NaN.
struct NotANumber {
    template <class T>
    static bool of(T a, T b) {
        return a != a || b != b;
    }
};
/// Whether neither is.
struct BothNumbers {
    template <class T>
    static bool of(T a, T b) {
        return a == a && b == b;
    }
};

template <class D>
struct To {
    template <class S>
    static D of(S a) {
        return D(a);
    }
};
/// Rounds towards zero, and saturates.
template <class D>
struct ToWhole {
    template <class S>
    static D of(S a) {
        using Limits = std::numeric_limits<D>;
        if (a != a) return 0;
        return a <= S(Limits::min()) ? Limits::min() : a >= S(Limits::max()) ? Limits::max() : D(a);
    }
};
struct FromHalf {
    static float of(uint16_t a) { return _cvtsh_ss(a); }
};
struct ToHalf {
    static uint16_t of(float a) { return a != a ? 0x7fff : _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT); }
};
struct FromBrain {
    static float of(uint16_t a) {
        const uint32_t bits = uint32_t(a) << 16;
        float result;
        memcpy(&result, &bits, 4);
        return result;
    }
};
struct ToBrain {
    static uint16_t of(float a) {
        if (a != a) return 0x7fff;
        uint32_t bits;
        memcpy(&bits, &a, 4);
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};
/// Two floats, given as their bits: the first becomes the upper half.
struct ToBrainPair {
    static uint32_t of(uint32_t upper, uint32_t lower) { return uint32_t(rounded(upper)) << 16 | rounded(lower); }
    static uint16_t rounded(uint32_t bits) {
        float a;
        memcpy(&a, &bits, 4);
        return ToBrain::of(a);
    }
};
/// Rounds to nearest, ties away from zero.
struct ToTf32 {
    static uint32_t of(uint32_t bits) {
        const bool finite = (bits & 0x7f800000) != 0x7f800000;
        return finite ? (bits + 0x1000) & ~0x1fffu : bits & 0x7fffff ? 0x7fffffff : bits;
    }
};

using Table = std::unordered_map<std::string, Operation>;

/// The ordered comparisons, which for integers are all.
template <class T>
void add_comparisons(Table& table, const std::string& type) {
    const auto add = [&](const char* name, Execute execute) {
        table[name + type] = {execute, {1, sizeof(T), sizeof(T)}};
    };
    add("setp.eq.", compare<T, Equal>);
    add("setp.ne.", compare<T, Unequal>);
    add("setp.lt.", compare<T, Less>);
    add("setp.le.", compare<T, AtMost>);
    add("setp.gt.", compare<T, More>);
    add("setp.ge.", compare<T, AtLeast>);
}

template <class T>
void add_whole(Table& table, const std::string& type) {
    constexpr uint8_t N = sizeof(T);
    const auto add = [&](const char* name, Execute execute) { table[name + type] = {execute, {N, N, N}}; };
    add("add.", binary<T, Add>);
    add("sub.", binary<T, Subtract>);
    add("mul.lo.", binary<T, Multiply>);
    add("div.", binary<T, WholeQuotient>);
    add("rem.", binary<T, Remainder>);
    add("min.", binary<T, Smaller>);
    add("max.", binary<T, Larger>);
    table["mad.lo." + type] = {ternary<T, MultiplyAdd>, {N, N, N, N}};
    table["neg." + type] = {unary<T, Negative>, {N, N}};
    table["shr." + type] = {shift<T, Right>, {N, N, 4}};
    add_comparisons<T>(table, type);
}

/// Of any type of this many bits.
template <class T>
void add_bits(Table& table, const std::string& size) {
    constexpr uint8_t N = sizeof(T);
    table["and.b" + size] = {binary<T, And>, {N, N, N}};
    table["or.b" + size] = {binary<T, Or>, {N, N, N}};
    table["xor.b" + size] = {binary<T, Xor>, {N, N, N}};
    table["not.b" + size] = {unary<T, Not>, {N, N}};
    table["shl.b" + size] = {shift<T, Left>, {N, N, 4}};
    table["setp.eq.b" + size] = {compare<T, Equal>, {1, N, N}};
    table["setp.ne.b" + size] = {compare<T, Unequal>, {1, N, N}};
    for (const char* type : {"b", "u", "s", "f"}) {
        table["mov." + (type + size)] = {unary<T, Same>, {N, N}};
        table["selp." + (type + size)] = {select<T>, {N, N, N, 1}};
    }
}

template <class T>
void add_floating(Table& table, const std::string& type) {
    constexpr uint8_t N = sizeof(T);
    for (const std::string rounding : {"", "rn."}) {
        table["add." + rounding + type] = {binary<T, Add>, {N, N, N}};
        table["sub." + rounding + type] = {binary<T, Subtract>, {N, N, N}};
        table["mul." + rounding + type] = {binary<T, Multiply>, {N, N, N}};
    }
    table["div.rn." + type] = {binary<T, Divide>, {N, N, N}};
    table["fma.rn." + type] = {ternary<T, Fused>, {N, N, N, N}};
    table["min." + type] = {binary<T, SmallerNumber>, {N, N, N}};
    table["max." + type] = {binary<T, LargerNumber>, {N, N, N}};
    table["neg." + type] = {unary<T, Negative>, {N, N}};
    table["abs." + type] = {unary<T, Absolute>, {N, N}};
    table["sqrt.rn." + type] = {unary<T, Root>, {N, N}};
    table["rcp.rn." + type] = {unary<T, Reciprocal>, {N, N}};
    table["cvt.rni." + type + "." + type] = {unary<T, Nearest>, {N, N}};
    add_comparisons<T>(table, type);
    const auto add_unordered = [&](const char* name, Execute execute) { table[name + type] = {execute, {1, N, N}}; };
    add_unordered("setp.equ.", compare<T, EqualOrNot>);
    add_unordered("setp.neu.", compare<T, UnequalOrNot>);
    add_unordered("setp.ltu.", compare<T, LessOrNot>);
    add_unordered("setp.leu.", compare<T, AtMostOrNot>);
    add_unordered("setp.gtu.", compare<T, MoreOrNot>);
    add_unordered("setp.geu.", compare<T, AtLeastOrNot>);
    add_unordered("setp.nan.", compare<T, NotANumber>);
    add_unordered("setp.num.", compare<T, BothNumbers>);
}

template <class D, class S, class F = To<D>>
void add_conversion(Table& table, const char* name) {
    table[std::string("cvt.") + name] = {convert<D, S, F>, {sizeof(D), sizeof(S)}};
}

Table make_table() {
    Table table;
    add_bits<uint16_t>(table, "16"), add_bits<uint32_t>(table, "32"), add_bits<uint64_t>(table, "64");
    add_whole<int16_t>(table, "s16"), add_whole<uint16_t>(table, "u16");
    add_whole<int32_t>(table, "s32"), add_whole<uint32_t>(table, "u32");
    add_whole<int64_t>(table, "s64"), add_whole<uint64_t>(table, "u64");
    add_floating<float>(table, "f32"), add_floating<double>(table, "f64");

    table["mul.hi.u32"] = {binary<uint32_t, UpperHalf>, {4, 4, 4}};
    table["mul.hi.s32"] = {binary<int32_t, UpperHalf>, {4, 4, 4}};
    table["mul.wide.u16"] = {multiply_wide<uint16_t, uint32_t>, {4, 2, 2}};
    table["mul.wide.u32"] = {multiply_wide<uint32_t, uint64_t>, {8, 4, 4}};
    table["mul.wide.s32"] = {multiply_wide<int32_t, int64_t>, {8, 4, 4}};
    table["dp2a.lo.u32.u32"] = {ternary<uint32_t, TwoProducts>, {4, 4, 4, 4}};
    table["clz.b32"] = {count_leading_zeros, {4, 4}};
    table["prmt.b32"] = {ternary<uint32_t, PermutedBytes>, {4, 4, 4, 4}};
    table["bfi.b32"] = {insert_bits, {4, 4, 4, 4, 4}};
    table["cvta.to.global.u64"] = {unary<uint64_t, Same>, {8, 8}};

    table["and.pred"] = {predicate<And>, {1, 1, 1}};
    table["or.pred"] = {predicate<Or>, {1, 1, 1}};
    table["xor.pred"] = {predicate<Xor>, {1, 1, 1}};
    table["not.pred"] = {predicate<Inverse>, {1, 1}};
    table["mov.pred"] = {predicate<First>, {1, 1}};

    table["fma.rm.f32"] = {ternary<float, FusedDown>, {4, 4, 4, 4}};
    table["ex2.approx.ftz.f32"] = {unary<float, Exponential2>, {4, 4}};
    table["rcp.approx.ftz.f64"] = {unary<double, RoughReciprocal>, {8, 8}};
    table["cvt.sat.f32.f32"] = {unary<float, Saturated>, {4, 4}};

    add_conversion<uint64_t, uint32_t>(table, "u64.u32"), add_conversion<int64_t, int32_t>(table, "s64.s32");
    add_conversion<uint32_t, uint64_t>(table, "u32.u64"), add_conversion<uint32_t, uint16_t>(table, "u32.u16");
    add_conversion<uint16_t, uint32_t>(table, "u16.u32"), add_conversion<int32_t, int16_t>(table, "s32.s16");
    add_conversion<double, float>(table, "f64.f32"), add_conversion<float, double>(table, "rn.f32.f64");
    add_conversion<float, int32_t>(table, "rn.f32.s32"), add_conversion<float, uint32_t>(table, "rn.f32.u32");
    add_conversion<float, uint16_t>(table, "rn.f32.u16"), add_conversion<float, uint64_t>(table, "rn.f32.u64");
    add_conversion<double, int32_t>(table, "rn.f64.s32"), add_conversion<double, uint32_t>(table, "rn.f64.u32");
    add_conversion<double, uint64_t>(table, "rn.f64.u64");
    add_conversion<int32_t, float, ToWhole<int32_t>>(table, "rzi.s32.f32");
    add_conversion<uint32_t, float, ToWhole<uint32_t>>(table, "rzi.u32.f32");
    add_conversion<int32_t, double, ToWhole<int32_t>>(table, "rzi.s32.f64");
    add_conversion<uint32_t, double, ToWhole<uint32_t>>(table, "rzi.u32.f64");
    add_conversion<float, uint16_t, FromHalf>(table, "f32.f16"),
        add_conversion<uint16_t, float, ToHalf>(table, "rn.f16.f32");
    add_conversion<float, uint16_t, FromBrain>(table, "f32.bf16"),
        add_conversion<uint16_t, float, ToBrain>(table, "rn.bf16.f32");
    table["cvt.rn.bf16x2.f32"] = {binary<uint32_t, ToBrainPair>, {4, 4, 4}};
    add_conversion<uint32_t, uint32_t, ToTf32>(table, "rna.tf32.f32");
    return table;
}

}  // namespace

const Operation* find_operation(const std::string& name) {
    static const Table table = make_table();
    const auto found = table.find(name);
    return found != table.end() ? &found->second : nullptr;
}
