// The PTX instructions that access memory or work on a whole warp. The layouts are those of the PTX ISA's chapters on
// mma, ldmatrix, shfl and cp.async, independent of the kernels.
#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "ptx.hpp"

void fault(Warp& w, const Instruction& i, int lane, const char* format, ...) {
    char what[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    const Block& b = *w.block;
    fail("%s\n  %s.ptx:%d: %s\n  in %s, block (%u, %u, %u), thread %d", what, b.kernel->source.c_str(), i.line,
         i.text.c_str(), b.kernel->name.c_str(), b.index[0], b.index[1], b.index[2], w.thread(lane));
}

namespace {

/// Records an access to shared memory by a thread, or by `ATOMICALLY`. Fails if two threads access the same bytes
/// between two barriers and one of them writes.
void touch(Warp& w, const Instruction& i, int lane, uint32_t at, uint32_t bytes, bool writes, int thread) {
    Block& b = *w.block;
    for (uint32_t place = at; place < at + bytes; ++place) {
        Touched& last = b.touched[place];
        if (last.written == b.interval && last.writer != thread) {
            fault(w, i, lane,
                  "a race: thread %d %s byte %u of shared memory, which thread %d wrote since the last barrier", thread,
                  writes ? "writes" : "reads", at, last.writer);
        }
        if (writes && last.read == b.interval && last.reader != thread) {
            fault(w, i, lane, "a race: thread %d writes byte %u of shared memory, which %s read since the last barrier",
                  thread, at,
                  last.reader == SEVERAL ? "several threads" : ("thread " + std::to_string(last.reader)).c_str());
        }
        if (writes) {
            last.written = b.interval, last.writer = int16_t(thread);
        } else if (last.read != b.interval) {
            last.read = b.interval, last.reader = int16_t(thread);
        } else if (last.reader != thread) {
            last.reader = SEVERAL;
        }
    }
}

uint64_t address_of(Warp& w, const Instruction& i, int lane) {
    const uint64_t base = i.address_bytes == 8   ? w.row<uint64_t>(i.a)[lane]
                          : i.address_bytes == 4 ? w.row<uint32_t>(i.a)[lane]
                                                 : 0;
    return base + i.offset;
}

/// The address of an access of one lane, after a check that it is aligned and inside an allocation.
uint8_t* reach(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, Space space, bool writes,
               bool atomically = false) {
    const char* verb = writes ? "a store" : "a load";
    if (address % bytes != 0)
        fault(w, i, lane, "%s of %u bytes at %lx, which is not aligned to them", verb, bytes, address);
    Block& b = *w.block;
    switch (space) {
        case Space::kGlobal:
            if (!memory().has(address, bytes))
                fault(w, i, lane, "%s of %u bytes at %lx, which is outside of every allocation", verb, bytes, address);
            return reinterpret_cast<uint8_t*>(address);
        case Space::kShared:
            if (address > b.shared.size() || bytes > b.shared.size() - address) {
                fault(w, i, lane, "%s of %u bytes at %lu of %zu bytes of shared memory", verb, bytes, address,
                      b.shared.size());
            }
            touch(w, i, lane, uint32_t(address), bytes, writes, atomically ? ATOMICALLY : w.thread(lane));
            return b.shared.data() + address;
        case Space::kParameter: break;
    }
    const uint64_t offset = address - uint64_t(b.parameters.data());
    if (offset > b.parameters.size() || bytes > b.parameters.size() - offset) {
        fault(w, i, lane, "parameter bytes at %lu of %zu", offset, b.parameters.size());
    }
    return reinterpret_cast<uint8_t*>(address);
}

/// Counts an access, if counting is on. `address` gives the address of a lane.
template <class F>
void count(Warp& w, const Instruction& i, uint32_t mask, uint32_t bytes, Space space, bool writes, F address) {
    std::vector<Count>& counts = w.block->counts;
    if (counts.empty()) return;
    uint64_t addresses[LANES] = {};
    for_lanes(mask, [&](int lane) { addresses[lane] = address(lane); });
    count_access(counts[size_t(&i - w.block->kernel->code.data())], mask, addresses, bytes, space, writes);
}

template <class F>
void atomic(Warp& w, const Instruction& i, uint32_t mask, F change) {
    const uint32_t* b = w.row<uint32_t>(i.b);
    count(w, i, mask, 4, i.space, true, [&](int lane) { return address_of(w, i, lane); });
    for_lanes(mask, [&](int lane) {
        const uint32_t old = change(
            reinterpret_cast<uint32_t*>(reach(w, i, lane, address_of(w, i, lane), 4, i.space, true, true)), b[lane]);
        if (i.d != NOWHERE) w.row<uint32_t>(i.d)[lane] = old;
    });
}

void whole_warp(Warp& w, const Instruction& i, uint32_t mask) {
    if (mask != ~0u) fault(w, i, 0, "by the lanes %08x of a warp", mask);
}

template <bool TRANSPOSED>
void matrices(Warp& w, const Instruction& i, uint32_t mask) {
    whole_warp(w, i, mask);
    const uint32_t naming = ~0u >> (LANES - 8 * i.elements);
    count(w, i, naming, 16, Space::kShared, false, [&](int lane) { return address_of(w, i, lane); });
    uint16_t matrix[4][8][8];
    for (int m = 0; m < i.elements; ++m) {
        for (int row = 0; row < 8; ++row) {
            const int lane = 8 * m + row;
            memcpy(matrix[m][row], reach(w, i, lane, address_of(w, i, lane), 16, Space::kShared, false), 16);
        }
    }
    for (int m = 0; m < i.elements; ++m) {
        for (int lane = 0; lane < LANES; ++lane) {
            const int group = lane / 4, pair = lane % 4 * 2;
            const uint16_t low = TRANSPOSED ? matrix[m][pair][group] : matrix[m][group][pair];
            const uint16_t high = TRANSPOSED ? matrix[m][pair + 1][group] : matrix[m][group][pair + 1];
            w.row<uint32_t>(i.list[m])[lane] = uint32_t(high) << 16 | low;
        }
    }
}

float bits_to_float(uint32_t bits) {
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
float half_of(uint32_t word, int half) { return _cvtsh_ss(uint16_t(word >> 16 * half)); }
float brain_of(uint32_t word, int half) { return bits_to_float(half == 0 ? word << 16 : word & 0xffff0000u); }

/// D = A B + C of 16 x K, K x 8 and 16 x 8. `element(word, half)` is an element of A or B, of which a register holds
/// `PER_WORD`.
template <int K, int PER_WORD, class F>
void multiply(Warp& w, const Instruction& i, uint32_t mask, F element) {
    whole_warp(w, i, mask);
    float a[16][K], b[K][8], sum[16][8];
    const uint32_t c[4] = {i.a, i.b, i.c, i.e};
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane / 4, member = lane % 4;
        for (int n = 0; n < 4; ++n) {
            const uint32_t word = w.row<uint32_t>(i.list[4 + n])[lane];
            for (int h = 0; h < PER_WORD; ++h)
                a[group + n % 2 * 8][member * PER_WORD + h + n / 2 * K / 2] = element(word, h);
            sum[group + n / 2 * 8][member * 2 + n % 2] = w.row<float>(c[n])[lane];
        }
        for (int n = 0; n < 2; ++n) {
            const uint32_t word = w.row<uint32_t>(i.list[8 + n])[lane];
            for (int h = 0; h < PER_WORD; ++h) b[member * PER_WORD + h + n * K / 2][group] = element(word, h);
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < K; ++k) {
            for (int column = 0; column < 8; ++column)
                sum[row][column] = std::fma(a[row][k], b[k][column], sum[row][column]);
        }
    }
    for (int lane = 0; lane < LANES; ++lane) {
        for (int n = 0; n < 4; ++n) w.row<float>(i.list[n])[lane] = sum[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2];
    }
}

template <class Whole, class Part>
void pack(Warp& w, const Instruction& i, uint32_t mask) {
    Whole* d = w.row<Whole>(i.d);
    const Part *low = w.row<Part>(i.list[0]), *high = w.row<Part>(i.list[1]);
    for_lanes(mask, [=](int lane) { d[lane] = Whole(Whole(low[lane]) | Whole(high[lane]) << (8 * sizeof(Part))); });
}

template <class Whole, class Part>
void unpack(Warp& w, const Instruction& i, uint32_t mask) {
    const Whole* a = w.row<Whole>(i.a);
    for_lanes(mask, [&](int lane) {
        const Whole whole = a[lane];
        if (i.list[0] != NOWHERE) w.row<Part>(i.list[0])[lane] = Part(whole);
        if (i.list[1] != NOWHERE) w.row<Part>(i.list[1])[lane] = Part(whole >> (8 * sizeof(Part)));
    });
}

}  // namespace

namespace execute {

void nothing(Warp&, const Instruction&, uint32_t) {}

void fence(Warp&, const Instruction&, uint32_t) { std::atomic_thread_fence(std::memory_order_seq_cst); }

void load(Warp& w, const Instruction& i, uint32_t mask) {
    count(w, i, mask, i.bytes * i.elements, i.space, false, [&](int lane) { return address_of(w, i, lane); });
    for_lanes(mask, [&](int lane) {
        const uint8_t* from = reach(w, i, lane, address_of(w, i, lane), i.bytes * i.elements, i.space, false);
        for (int n = 0; n < i.elements; ++n) {
            if (i.list[n] == NOWHERE) continue;
            uint64_t bits = 0;
            memcpy(&bits, from + n * i.bytes, i.bytes);
            const int unused = 64 - 8 * i.bytes;
            if (i.is_signed) bits = uint64_t(int64_t(bits << unused) >> unused);
            memcpy(&w.registers[i.list[n] + lane * i.register_bytes], &bits, i.register_bytes);
        }
    });
}

void store(Warp& w, const Instruction& i, uint32_t mask) {
    count(w, i, mask, i.bytes * i.elements, i.space, true, [&](int lane) { return address_of(w, i, lane); });
    for_lanes(mask, [&](int lane) {
        uint8_t* to = reach(w, i, lane, address_of(w, i, lane), i.bytes * i.elements, i.space, true);
        for (int n = 0; n < i.elements; ++n)
            memcpy(to + n * i.bytes, &w.registers[i.list[n] + lane * i.register_bytes], i.bytes);
    });
}

void atomic_add(Warp& w, const Instruction& i, uint32_t mask) {
    atomic(w, i, mask, [](uint32_t* at, uint32_t b) { return __atomic_fetch_add(at, b, __ATOMIC_SEQ_CST); });
}
void atomic_exchange(Warp& w, const Instruction& i, uint32_t mask) {
    atomic(w, i, mask, [](uint32_t* at, uint32_t b) { return __atomic_exchange_n(at, b, __ATOMIC_SEQ_CST); });
}
void atomic_or(Warp& w, const Instruction& i, uint32_t mask) {
    atomic(w, i, mask, [](uint32_t* at, uint32_t b) { return __atomic_fetch_or(at, b, __ATOMIC_SEQ_CST); });
}

/// A copy arrives as late as allowed, when it is waited for. Until then its destination has arbitrary content. It
/// counts as a write to shared memory when it begins and when it ends.
void copy_async(Warp& w, const Instruction& i, uint32_t mask) {
    const auto given_to = [&](int lane) { return i.c == NOWHERE ? i.bytes : w.row<uint32_t>(i.c)[lane]; };
    const auto source_of = [&](int lane) { return w.row<uint64_t>(i.a)[lane] + i.offset; };
    uint32_t reading = 0;
    for_lanes(mask, [&](int lane) { reading |= uint32_t(given_to(lane) > 0) << lane; });
    count(w, i, reading, i.bytes, Space::kGlobal, false, source_of);
    count(w, i, mask, i.bytes, Space::kShared, true, [&](int lane) { return w.row<uint32_t>(i.d)[lane]; });
    for_lanes(mask, [&](int lane) {
        const uint32_t given = given_to(lane);
        const uint64_t from = source_of(lane);
        if (given > i.bytes) fault(w, i, lane, "a copy of %u bytes", given);
        if (from % i.bytes != 0) fault(w, i, lane, "a copy from %lx, which is not aligned to %u bytes", from, i.bytes);
        if (given > 0) reach(w, i, lane, from, i.bytes, Space::kGlobal, false);
        const uint32_t to = w.row<uint32_t>(i.d)[lane];
        memset(reach(w, i, lane, to, i.bytes, Space::kShared, true), 0xA5, i.bytes);
        w.open.push_back({to, i.bytes, given, from, w.thread(lane)});
    });
}

void commit_group(Warp& w, const Instruction& i, uint32_t mask) {
    if (mask != w.live) fault(w, i, 0, "by the lanes %08x of %08x", mask, w.live);
    w.committed.push_back(std::move(w.open));
    w.open.clear();
}

void wait_group(Warp& w, const Instruction& i, uint32_t mask) {
    if (mask != w.live) fault(w, i, 0, "by the lanes %08x of %08x", mask, w.live);
    while (w.committed.size() > size_t(i.offset)) {
        for (const AsyncCopy& copy : w.committed.front()) {
            touch(w, i, copy.thread % LANES, copy.to, copy.bytes, true, copy.thread);
            uint8_t* to = w.block->shared.data() + copy.to;
            memcpy(to, reinterpret_cast<const void*>(copy.from), copy.given);
            memset(to + copy.given, 0, copy.bytes - copy.given);
        }
        w.committed.erase(w.committed.begin());
    }
}

void shuffle_xor(Warp& w, const Instruction& i, uint32_t mask) {
    const uint32_t *a = w.row<uint32_t>(i.a), *b = w.row<uint32_t>(i.b), *c = w.row<uint32_t>(i.c),
                   *members = w.row<uint32_t>(i.e);
    uint32_t received[LANES], in_range = 0;
    for_lanes(mask, [&](int lane) {
        const int clamp = c[lane] & 31, segment = c[lane] >> 8 & 31, last = (lane & segment) | (clamp & ~segment);
        int from = lane ^ int(b[lane] & 31);
        if (from > last) from = lane;
        else in_range |= 1u << lane;
        if (!(members[lane] >> from & 1) || !(mask >> from & 1))
            fault(w, i, lane, "lane %d takes no part in the shuffle", from);
        received[lane] = a[from];
    });
    for_lanes(mask, [&](int lane) { w.row<uint32_t>(i.d)[lane] = received[lane]; });
    if (i.list[0] != NOWHERE) {
        uint32_t* predicate = w.row<uint32_t>(i.list[0]);
        *predicate = (*predicate & ~mask) | (in_range & mask);
    }
}

void load_matrices(Warp& w, const Instruction& i, uint32_t mask) { matrices<false>(w, i, mask); }
void load_matrices_transposed(Warp& w, const Instruction& i, uint32_t mask) { matrices<true>(w, i, mask); }

void mma_f16(Warp& w, const Instruction& i, uint32_t mask) { multiply<16, 2>(w, i, mask, half_of); }
void mma_bf16(Warp& w, const Instruction& i, uint32_t mask) { multiply<16, 2>(w, i, mask, brain_of); }
/// A GPU reads 19 bits of a TF32 operand: without rounding, it is truncated.
void mma_tf32(Warp& w, const Instruction& i, uint32_t mask) {
    multiply<8, 1>(w, i, mask, [](uint32_t word, int) { return bits_to_float(word & ~0x1fffu); });
}

void pack32(Warp& w, const Instruction& i, uint32_t mask) { pack<uint32_t, uint16_t>(w, i, mask); }
void pack64(Warp& w, const Instruction& i, uint32_t mask) { pack<uint64_t, uint32_t>(w, i, mask); }
void unpack32(Warp& w, const Instruction& i, uint32_t mask) { unpack<uint32_t, uint16_t>(w, i, mask); }
void unpack64(Warp& w, const Instruction& i, uint32_t mask) { unpack<uint64_t, uint32_t>(w, i, mask); }

}  // namespace execute
