// Declarations that the parts of the stand-in driver share: parsed kernels, running warps and blocks, and the device's
// memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

/// Ends the process with a message. A fault is one of the program under test.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

/// An integer from the environment.
long setting(const char* name, long otherwise);

// ---- Memory --------------------------------------------------------------------------------------------------------

/// The device's global memory, at host addresses. For every granule it knows the number of allocated bytes. Addresses
/// are never reused, so that late accesses to freed memory are found.
class Memory {
public:
    static constexpr uint64_t CAPACITY = 80ull << 30;

    Memory();
    /// 0 if too little is left.
    uint64_t allocate(uint64_t bytes);
    void release(uint64_t address);
    uint64_t used() const { return used_; }
    /// Fails unless all bytes are in one allocation.
    void check(uint64_t address, uint64_t bytes, const char* what);
    /// Whether these aligned bytes, at most 16, are in an allocation.
    bool has(uint64_t address, uint32_t bytes) const {
        const uint64_t offset = address - uint64_t(base_);
        return offset < SPACE && offset % GRANULE + bytes <= valid_[offset / GRANULE];
    }

private:
    static constexpr uint64_t SPACE = 1ull << 38, GRANULE = 256;
    uint8_t* base_;
    uint16_t* valid_;
    uint64_t next_ = GRANULE, used_ = 0;
    std::mutex mutex_;
    std::map<uint64_t, uint64_t> live_;  // bytes by offset
};

Memory& memory();

// ---- Kernels -------------------------------------------------------------------------------------------------------

constexpr int LANES = 32;
constexpr uint32_t NOWHERE = ~0u;

struct Warp;
struct Instruction;
/// Executes an instruction for the lanes in `mask`.
using Execute = void (*)(Warp&, const Instruction&, uint32_t mask);

/// The scheduler's kind of an instruction. The whole warp executes `kTogether` ones at the same time.
enum class Kind : uint8_t { kPlain, kBranch, kReturn, kBarrier, kTogether, kShuffle };
enum class Space : uint8_t { kGlobal, kShared, kParameter };

/// An operand is a row of registers, one for each lane, given by its place in the warp's registers. A predicate is one
/// word with a bit for each lane. Constants and special registers have rows too.
struct Instruction {
    Execute execute = nullptr;
    Kind kind = Kind::kPlain;
    uint32_t guard = NOWHERE;
    bool negated = false;
    uint32_t d = NOWHERE, a = NOWHERE, b = NOWHERE, c = NOWHERE, e = NOWHERE;
    /// The elements of vectors, or of mma (d, a, b, one after the other).
    uint32_t list[10] = {};
    // For accesses to memory: the elements, the bytes of each in memory and in registers, and the source of the
    // address.
    uint8_t elements = 1, bytes = 0, register_bytes = 0, address_bytes = 0;
    bool is_signed = false;
    Space space = Space::kGlobal;
    int64_t offset = 0;
    int target = -1;
    std::string text;
    int line = 0;
};

struct Kernel {
    std::string name, source;
    std::vector<Instruction> code;
    uint32_t parameter_bytes = 0, static_shared = 0, most_threads = 1024;
    /// Whether it waits for the previous kernel, so that it may be launched early.
    bool waits = false;
    /// The initial registers of a warp, with the constants.
    std::vector<uint8_t> registers;
};

/// Rows of registers that every kernel has: tid, ntid, ctaid, nctaid (x, y, z each), laneid, and the parameters'
/// address.
constexpr uint32_t ROW = LANES * 4, SPECIAL_ROWS = 13, PARAMETERS_ROW = SPECIAL_ROWS * ROW;

/// The kernels of a module by name.
using Kernels = std::map<std::string, std::shared_ptr<const Kernel>>;
Kernels parse(const std::string& ptx, const std::string& source);

/// An instruction on registers, and the bytes of its operands (1: a predicate): the destination, then the sources.
struct Operation {
    Execute execute;
    std::vector<uint8_t> operands;
};
/// Null for an instruction that is not known.
const Operation* find_operation(const std::string& name);

namespace execute {
void nothing(Warp&, const Instruction&, uint32_t), fence(Warp&, const Instruction&, uint32_t);
void load(Warp&, const Instruction&, uint32_t), store(Warp&, const Instruction&, uint32_t);
void atomic_add(Warp&, const Instruction&, uint32_t), atomic_exchange(Warp&, const Instruction&, uint32_t);
void atomic_or(Warp&, const Instruction&, uint32_t);
void copy_async(Warp&, const Instruction&, uint32_t), commit_group(Warp&, const Instruction&, uint32_t);
void wait_group(Warp&, const Instruction&, uint32_t);
void shuffle_xor(Warp&, const Instruction&, uint32_t);
void load_matrices(Warp&, const Instruction&, uint32_t), load_matrices_transposed(Warp&, const Instruction&, uint32_t);
void mma_f16(Warp&, const Instruction&, uint32_t), mma_bf16(Warp&, const Instruction&, uint32_t);
void mma_tf32(Warp&, const Instruction&, uint32_t);
void pack32(Warp&, const Instruction&, uint32_t), pack64(Warp&, const Instruction&, uint32_t);
void unpack32(Warp&, const Instruction&, uint32_t), unpack64(Warp&, const Instruction&, uint32_t);
}  // namespace execute

// ---- Running -------------------------------------------------------------------------------------------------------

/// A pending cp.async.
struct AsyncCopy {
    uint32_t to, bytes, given;
    uint64_t from;
    int thread;
};

/// Lanes at the same instruction.
struct Group {
    int at;
    uint32_t mask;
    bool waiting;
};

/// The last accesses to a byte of shared memory: by which thread, and in which interval between barriers.
struct Touched {
    uint32_t written = 0, read = 0;
    int16_t writer = -1, reader = -1;
};
constexpr int16_t SEVERAL = -2;
/// Atomic accesses of all threads, which do not race with each other.
constexpr int16_t ATOMICALLY = -3;

/// The accesses of an instruction: sectors of global and wavefronts of shared memory, and the minimum of each.
struct Count {
    uint64_t read = 0, written = 0, least_sectors = 0, wavefronts = 0, least_wavefronts = 0;
};

struct Block {
    const Kernel* kernel;
    /// By instruction; empty if nothing is counted.
    std::vector<Count> counts;
    std::vector<uint8_t> parameters;
    std::vector<uint8_t> shared;
    std::vector<Touched> touched;
    std::vector<Warp> warps;
    uint32_t interval = 0;
    uint32_t index[3];
};

struct Warp {
    Block* block;
    int number;
    std::vector<uint8_t> registers;
    std::vector<Group> groups;
    uint32_t live;
    bool done;
    std::vector<AsyncCopy> open;
    std::vector<std::vector<AsyncCopy>> committed;

    template <class T>
    T* row(uint32_t place) {
        return reinterpret_cast<T*>(registers.data() + place);
    }
    int thread(int lane) const { return number * LANES + lane; }
};

/// Calls f for every lane in the mask. For a full mask the loop vectorises.
template <class F>
inline void for_lanes(uint32_t mask, F f) {
    if (mask == ~0u) {
        for (int lane = 0; lane < LANES; ++lane) f(lane);
    } else {
        for (int lane = 0; lane < LANES; ++lane) {
            if (mask >> lane & 1) f(lane);
        }
    }
}

/// Fails with the instruction, the block and the thread.
[[noreturn]] void fault(Warp& warp, const Instruction& instruction, int lane, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

bool is_counting();
/// Counts an access of the lanes in the mask, `bytes` each.
void count_access(Count& count, uint32_t mask, const uint64_t (&addresses)[LANES], uint32_t bytes, Space space,
                  bool writes);
/// Adds the counts of the blocks of a launch, or of some of them.
void add_counts(const Kernel& kernel, const std::vector<Count>& counts, bool is_launch);

/// Runs all blocks of a grid to their end.
void run(const Kernel& kernel, const uint32_t (&grid)[3], const uint32_t (&block)[3], uint32_t dynamic_shared,
         const std::vector<uint8_t>& parameters);
