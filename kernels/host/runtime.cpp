// Runs kernels on the CPU: the threads of a block are fibers on the calling OS thread. See simt.hpp for the device
// language. This file is compiled once, for the baseline instruction set.
//
// A block of one thread is a plain call. Otherwise a queue holds the threads of the block that can continue: at first
// all of them, in the launch's order. A thread that waits, or has exited, switches directly to the first thread in the
// queue. When the operation that threads wait for is complete, they are appended to the queue, again in the launch's
// order. A thread that starts after another one has exited takes over its stack, so threads that never wait cost one
// call each. If the queue is empty and some threads have not exited, they wait for something that can no longer happen:
// the launch has a fault.
#include "launch.hpp"
#include "simt.hpp"
#include "switch.hpp"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

extern "C" {

__thread PolderPosition polder_position;

int polder_host_run(const PolderLaunch* launch, uint64_t first_block, uint64_t last_block, PolderFault* fault);

// Whether the processor multiplies tiles of bf16 (AMX), and the kernel lets this process do so.
int polder_host_matrix_units(void);
}

namespace {

constexpr unsigned kMaxWarps = kMaxThreads / 32;
#ifdef POLDER_ASAN
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
// Larger than a page, so that a frame with a large local array does not skip it.
constexpr size_t kGuardBytes = 64 << 10;
constexpr size_t kSignalStackBytes = 64 << 10;

constexpr const char* kBarrierNames[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                         "__syncthreads_or"};
constexpr int kBarrierKinds = 4;

enum class State : uint8_t { kNew, kReady, kAtBarrier, kAtWarp, kExited };

struct Thread {
    Context context;
    char* stack;  // its lowest address; null until the thread starts
    uint3 index;
    State state;
    const char* waits_at;  // the operation, while it waits
    unsigned mask;         // of the warp operation it waits at
    unsigned passed;       // the result of the barrier
};

// Lanes that have arrived at one warp operation.
struct Gathering {
    PolderWarpOperation operation;
    const char* name;
    unsigned mask, arrived;
};

struct Warp {
    unsigned present, exited;
    unsigned gathering_count;
    Gathering gatherings[32];
    void* slots[32];
};

struct Barrier {
    unsigned arrived, passed;
};

// The state of an OS thread that runs blocks. It is created at the thread's first launch and kept until the thread
// ends.
struct Worker {
    const PolderLaunch* launch;
    PolderFault* fault;
    jmp_buf escape;  // leaves a block of one thread
    Context home;    // the OS thread's own stack, while fibers run
    bool at_home;    // until the first fiber of a block has started
    unsigned thread_count, exited_count;
    Thread* running;
    uint64_t random;

    unsigned queue[kMaxThreads];
    unsigned queue_first, queue_count;

    char* stacks[kMaxThreads];
    unsigned stack_count;
    char* free_stacks[kMaxThreads];
    unsigned free_count;

    char* shared;
    size_t shared_capacity;
    void* signal_stack;

    Barrier barriers[kBarrierKinds];
    Warp warps[kMaxWarps];
    Thread threads[kMaxThreads];
};

__thread Worker* this_worker;
pthread_key_t worker_key;
pthread_once_t once = PTHREAD_ONCE_INIT;
struct sigaction previous_segv, previous_bus;

void* map_memory(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

void unmap_memory(char* memory, size_t bytes) {
#ifdef POLDER_ASAN
    __asan_unpoison_memory_region(memory, bytes);  // the next mapping there may be any other
#endif
    munmap(memory, bytes);
}

// ---- Faults --------------------------------------------------------------------------------------------------------

void set_fault(Worker& worker, FaultKind kind, const uint3& thread, const char* format, ...)
    __attribute__((format(printf, 4, 5)));
void set_fault(Worker& worker, FaultKind kind, const uint3& thread, const char* format, ...) {
    PolderFault& fault = *worker.fault;
    fault.kind = kind;
    const uint3 block = polder_position.block;
    const uint32_t places[] = {block.x, block.y, block.z, thread.x, thread.y, thread.z};
    memcpy(fault.block, places, sizeof fault.block);
    memcpy(fault.thread, places + 3, sizeof fault.thread);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fault.message, sizeof fault.message, format, arguments);
    va_end(arguments);
}

// Ends the launch from inside a kernel. Kernels have no objects that would have to be destroyed.
[[noreturn]] void abandon_block(Worker& worker) {
    if (worker.thread_count == 1) _longjmp(worker.escape, 1);
    context_leave(worker.home);
}

// ---- Order ---------------------------------------------------------------------------------------------------------

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t next_random(Worker& worker) { return mix(worker.random += 0x9e3779b97f4a7c15u); }

// A number below `bound`, which is small against 2^32.
unsigned random_below(Worker& worker, unsigned bound) { return unsigned(((next_random(worker) >> 32) * bound) >> 32); }

// The image of `index` under a seeded permutation of [0, count): a Feistel network over the next power of four, which
// is repeated while the result is outside. It needs no memory for a grid of any size.
uint64_t permuted(uint64_t index, uint64_t count, uint64_t seed) {
    unsigned half_bits = 1;
    while (half_bits < 32 && (count - 1) >> (2 * half_bits) != 0) ++half_bits;
    const uint64_t half_mask = (uint64_t(1) << half_bits) - 1;
    do {
        uint64_t left = index >> half_bits, right = index & half_mask;
        for (uint64_t round = 0; round < 4; ++round) {
            const uint64_t swapped = left ^ (mix(right + mix(seed + round)) & half_mask);
            left = right;
            right = swapped;
        }
        index = left << half_bits | right;
    } while (index >= count);
    return index;
}

void push(Worker& worker, unsigned thread) {
    worker.queue[(worker.queue_first + worker.queue_count++) % kMaxThreads] = thread;
}

// Appends the threads first + i for the set bits of `lanes` (all of [first, first + count) if `lanes` is null).
void push_in_order(Worker& worker, unsigned first, unsigned count, const unsigned* lanes) {
    const unsigned start = worker.queue_count;
    const bool backwards = worker.launch->order == kOrderBackwards;
    for (unsigned i = 0; i < count; ++i) {
        const unsigned offset = backwards ? count - 1 - i : i;
        if (lanes == nullptr || (*lanes >> offset) & 1u) push(worker, first + offset);
    }
    if (worker.launch->order != kOrderRandom) return;
    for (unsigned left = worker.queue_count - start; left > 1; --left) {
        unsigned& last = worker.queue[(worker.queue_first + start + left - 1) % kMaxThreads];
        unsigned& other = worker.queue[(worker.queue_first + start + random_below(worker, left)) % kMaxThreads];
        const unsigned thread = last;
        last = other;
        other = thread;
    }
}

Thread* pop(Worker& worker) {
    if (worker.queue_count == 0) return nullptr;
    Thread* thread = &worker.threads[worker.queue[worker.queue_first]];
    worker.queue_first = (worker.queue_first + 1) % kMaxThreads;
    --worker.queue_count;
    return thread;
}

// ---- Fibers --------------------------------------------------------------------------------------------------------

void fiber_main();

// Gives a new thread a stack. If none is available, it sets the fault and returns false.
bool take_stack(Worker& worker, Thread& thread) {
    if (worker.free_count == 0) {
        char* memory = static_cast<char*>(map_memory(kGuardBytes + kStackBytes));
        if (memory == nullptr || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
            if (memory != nullptr) unmap_memory(memory, kGuardBytes + kStackBytes);
            set_fault(worker, kHostFailure, thread.index, "cannot map the stack of fiber %u of %u (%zu KiB): %s",
                      worker.stack_count + 1, worker.thread_count, (kGuardBytes + kStackBytes) >> 10, strerror(errno));
            return false;
        }
        worker.stacks[worker.stack_count++] = memory + kGuardBytes;
        worker.free_stacks[worker.free_count++] = memory + kGuardBytes;
    }
    thread.stack = worker.free_stacks[--worker.free_count];
    // Stacks begin at the same offset in a page. If their tops did too, all would use the same few cache sets.
    const size_t colour = (size_t(&thread - worker.threads) % 64) * 5 * 64;
    context_prepare(thread.context, thread.stack, kStackBytes, colour, fiber_main);
    return true;
}

void set_running(Worker& worker, Thread& thread) {
    worker.running = &thread;
    thread.state = State::kReady;
    polder_position.thread = thread.index;
}

const char* plural(unsigned count) { return count == 1 ? "" : "s"; }

// Describes why no thread of the block can continue: the first thread that waits, and for which.
void set_stuck_fault(Worker& worker) {
    Thread* at_barrier = nullptr;
    Thread* at_warp = nullptr;
    unsigned waiting = 0;
    for (unsigned i = worker.thread_count; i-- > 0;) {
        Thread& thread = worker.threads[i];
        if (thread.state == State::kAtBarrier) at_barrier = &thread;
        if (thread.state == State::kAtWarp) at_warp = &thread;
    }
    if (at_warp != nullptr) {
        const unsigned number = unsigned(at_warp - worker.threads), first = number & ~31u;
        const Warp& warp = worker.warps[number / 32];
        unsigned missing = at_warp->mask;
        for (unsigned i = 0; i < warp.gathering_count; ++i) {
            const Gathering& gathering = warp.gatherings[i];
            if ((gathering.arrived >> (number & 31u)) & 1u) missing &= ~gathering.arrived;
        }
        const unsigned lane = unsigned(__builtin_ctz(missing));
        const Thread& other = worker.threads[first + lane];
        if (((warp.present >> lane) & 1u) == 0) {
            set_fault(worker, kWarpFault, at_warp->index,
                      "%s with mask 0x%08x names lane %u, which the block does not have: it has %u thread%s",
                      at_warp->waits_at, at_warp->mask, lane, worker.thread_count, plural(worker.thread_count));
            return;
        }
        if (other.state == State::kExited) {
            set_fault(worker, kWarpFault, at_warp->index, "%s with mask 0x%08x waits for lane %u, which has exited",
                      at_warp->waits_at, at_warp->mask, lane);
            return;
        }
        if (other.state == State::kAtWarp) {
            set_fault(worker, kWarpFault, at_warp->index,
                      "%s with mask 0x%08x waits for lane %u, which waits at %s with mask 0x%08x", at_warp->waits_at,
                      at_warp->mask, lane, other.waits_at, other.mask);
            return;
        }
    }
    // Otherwise a thread waits at a barrier: only such threads, and those that wait for them, are left.
    for (unsigned i = 0; i < worker.thread_count; ++i) {
        const Thread& thread = worker.threads[i];
        waiting += thread.state == State::kAtBarrier && thread.waits_at == at_barrier->waits_at;
    }
    const unsigned elsewhere = worker.thread_count - waiting - worker.exited_count;
    const Thread* other = nullptr;
    for (unsigned i = 0; i < worker.thread_count && other == nullptr; ++i) {
        const Thread& thread = worker.threads[i];
        if (thread.state != State::kExited && thread.waits_at != at_barrier->waits_at) other = &thread;
    }
    set_fault(worker, kBarrierDivergence, at_barrier->index,
              "%u of %u threads wait%s at %s, which the others never reach: %u exited, %u wait%s%s%s", waiting,
              worker.thread_count, waiting == 1 ? "s" : "", at_barrier->waits_at, worker.exited_count, elsewhere,
              elsewhere == 1 ? "s" : "", other == nullptr ? " elsewhere" : " elsewhere, one at ",
              other == nullptr ? "" : other->waits_at);
}

// Switches from `self`, which waits, to the next thread. Returns when `self` may continue.
void wait(Worker& worker, Thread& self) {
    Thread* next = pop(worker);
    if (next == nullptr) {
        set_stuck_fault(worker);
        abandon_block(worker);
    }
    if (next == &self) {
        set_running(worker, self);
        return;
    }
    if (next->state == State::kNew && !take_stack(worker, *next)) abandon_block(worker);
    set_running(worker, *next);
    context_switch(self.context, next->context);
}

// Resumes the lanes of a warp operation at which all have arrived.
void finish_gathering(Worker& worker, unsigned first_thread, Warp& warp, Gathering* gathering) {
    const unsigned arrived = gathering->arrived;
    if (gathering->operation != nullptr) gathering->operation(gathering->mask, warp.slots);
    *gathering = warp.gatherings[--warp.gathering_count];
    push_in_order(worker, first_thread, 32, &arrived);
}

// Only in operations that just wait may a mask name lanes that have exited or do not exist.
bool is_complete(const Warp& warp, const Gathering& gathering) {
    const unsigned alive = warp.present & ~warp.exited;
    return gathering.arrived == (gathering.operation == nullptr ? gathering.mask & alive : gathering.mask);
}

void exit_thread(Worker& worker, Thread& self) {
    self.state = State::kExited;
    ++worker.exited_count;
    const unsigned number = unsigned(&self - worker.threads);
    Warp& warp = worker.warps[number / 32];
    warp.exited |= 1u << (number & 31u);
    for (unsigned i = warp.gathering_count; i-- > 0;) {
        Gathering& gathering = warp.gatherings[i];
        if (gathering.operation == nullptr && is_complete(warp, gathering)) {
            finish_gathering(worker, number & ~31u, warp, &gathering);
        }
    }
}

// Runs a thread, and after it other threads that start, until one is to continue that already has a stack. The
// sanitizer must not mark this frame: it never returns, and the next frame overwrites it.
__attribute__((no_sanitize("address"))) void fiber_main() {
    Worker& worker = *this_worker;
    context_entered(worker.at_home ? &worker.home : nullptr);
    worker.at_home = false;
    for (;;) {
        worker.launch->entry(worker.launch->args);
        Thread& self = *worker.running;
        exit_thread(worker, self);
        Thread* next = pop(worker);
        if (next != nullptr && next->state == State::kNew) {
            next->stack = self.stack;
            set_running(worker, *next);
            continue;
        }
        worker.free_stacks[worker.free_count++] = self.stack;
        if (next != nullptr) {
            set_running(worker, *next);
            context_leave(next->context);
        }
        if (worker.exited_count != worker.thread_count) set_stuck_fault(worker);
        context_leave(worker.home);
    }
}

// ---- Stack overflow ------------------------------------------------------------------------------------------------

char* append(char* at, const char* text) {
    while (*text != '\0') *at++ = *text++;
    return at;
}

char* append(char* at, uint64_t number) {
    char digits[20];
    int count = 0;
    do {
        digits[count++] = char('0' + number % 10);
        number /= 10;
    } while (number != 0);
    while (count > 0) *at++ = digits[--count];
    return at;
}

char* append(char* at, const uint3& place) {
    at = append(append(append(at, "("), place.x), ",");
    return append(append(append(append(at, place.y), ","), place.z), ")");
}

void on_memory_fault(int signal_number, siginfo_t* info, void* context) {
    const auto* worker = static_cast<const Worker*>(pthread_getspecific(worker_key));
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    if (worker != nullptr && worker->running != nullptr) {
        const auto stack = reinterpret_cast<uintptr_t>(worker->running->stack);
        if (address >= stack - kGuardBytes && address < stack) {
            char line[512];
            char name[128];
            strncpy(name, worker->launch->name, sizeof name - 1);
            name[sizeof name - 1] = '\0';
            char* at = append(append(line, "polder: kernel "), name);
            at = append(append(at, ": block "), polder_position.block);
            at = append(append(at, " thread "), polder_position.thread);
            at = append(append(append(at, ": stack overflow of a fiber ("), uint64_t(kStackBytes >> 10)), " KiB)\n");
            [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line, size_t(at - line));
            _exit(134);
        }
    }
    const struct sigaction& previous = signal_number == SIGSEGV ? previous_segv : previous_bus;
    if ((previous.sa_flags & SA_SIGINFO) != 0) {
        previous.sa_sigaction(signal_number, info, context);
    } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        signal(signal_number, SIG_DFL);  // on return, the access is repeated and ends the process
    } else {
        previous.sa_handler(signal_number);
    }
}

// ---- Workers -------------------------------------------------------------------------------------------------------

void end_worker(void* memory) {
    auto* worker = static_cast<Worker*>(memory);
    for (unsigned i = 0; i < worker->stack_count; ++i) {
        unmap_memory(worker->stacks[i] - kGuardBytes, kGuardBytes + kStackBytes);
    }
    if (worker->shared != nullptr) unmap_memory(worker->shared, worker->shared_capacity);
    if (worker->signal_stack != nullptr) {
        stack_t none = {};
        none.ss_flags = SS_DISABLE;
        none.ss_size = kSignalStackBytes;
        sigaltstack(&none, nullptr);
        munmap(worker->signal_stack, kSignalStackBytes);
    }
    munmap(worker, sizeof *worker);
    this_worker = nullptr;
}

void start_once() {
    pthread_key_create(&worker_key, end_worker);
    struct sigaction action = {};
    action.sa_sigaction = on_memory_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
}

__attribute__((noinline)) Worker* current_worker() {
    if (this_worker != nullptr) return this_worker;
    pthread_once(&once, start_once);
    auto* worker = static_cast<Worker*>(map_memory(sizeof(Worker)));
    if (worker == nullptr || pthread_setspecific(worker_key, worker) != 0) return nullptr;
    stack_t signal_stack = {};
    if (sigaltstack(nullptr, &signal_stack) == 0 && (signal_stack.ss_flags & SS_DISABLE) != 0) {
        worker->signal_stack = map_memory(kSignalStackBytes);
        signal_stack = {};
        signal_stack.ss_sp = worker->signal_stack;
        signal_stack.ss_size = kSignalStackBytes;
        if (worker->signal_stack != nullptr) sigaltstack(&signal_stack, nullptr);
    }
    return this_worker = worker;
}

// Makes room for `bytes` of dynamic shared memory, and sets polder_position.shared.
__attribute__((noinline)) bool reserve_shared(Worker& worker, size_t bytes) {
    if (bytes > worker.shared_capacity || worker.shared == nullptr) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t capacity = (bytes / page + 1) * page;
        void* memory = bytes < SIZE_MAX / 2 ? map_memory(capacity) : nullptr;
        if (memory == nullptr) return false;
        if (worker.shared != nullptr) unmap_memory(worker.shared, worker.shared_capacity);
        worker.shared = static_cast<char*>(memory);
        worker.shared_capacity = capacity;
    }
#ifdef POLDER_ASAN
    __asan_unpoison_memory_region(worker.shared, worker.shared_capacity);
    __asan_poison_memory_region(worker.shared + bytes, worker.shared_capacity - bytes);
#endif
    polder_position.shared = worker.shared;
    return true;
}

// ---- Blocks --------------------------------------------------------------------------------------------------------

void enter_block(const PolderLaunch& launch, uint64_t block) {
    const uint64_t width = launch.grid[0], height = launch.grid[1];
    if (block < width) {
        polder_position.block = {unsigned(block), 0, 0};
    } else {
        polder_position.block = {unsigned(block % width), unsigned(block / width % height),
                                 unsigned(block / width / height)};
    }
}

void number_threads(Worker& worker) {
    const uint3 size = polder_position.block_dim;
    for (unsigned i = 0; i < worker.thread_count; ++i) {
        worker.threads[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    }
    for (unsigned i = 0; i * 32 < worker.thread_count; ++i) {
        const unsigned lanes = worker.thread_count - i * 32;
        worker.warps[i].present = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    }
}

// Runs one block of several threads; false if it ended in a fault.
bool run_fibers(Worker& worker, uint64_t block) {
    const PolderLaunch& launch = *worker.launch;
    memset(worker.shared, 0xff, launch.shared_bytes);
    worker.exited_count = 0;
    worker.queue_first = worker.queue_count = 0;
    worker.random = launch.seed ^ mix(block + 1);
    for (Barrier& barrier : worker.barriers) barrier = {0, 0};
    for (unsigned i = 0; i * 32 < worker.thread_count; ++i) {
        worker.warps[i].exited = 0;
        worker.warps[i].gathering_count = 0;
    }
    for (unsigned i = 0; i < worker.thread_count; ++i) {
        worker.threads[i].state = State::kNew;
        worker.threads[i].stack = nullptr;
    }
    push_in_order(worker, 0, worker.thread_count, nullptr);
    Thread* first = pop(worker);
    if (!take_stack(worker, *first)) return false;
    set_running(worker, *first);
    worker.at_home = true;
    context_switch(worker.home, first->context);
    worker.running = nullptr;
    if (worker.fault->kind == kNoFault) return true;

    // The unfinished fibers are discarded, so their stacks are free again.
    worker.free_count = 0;
    for (unsigned i = 0; i < worker.stack_count; ++i) {
#ifdef POLDER_ASAN
        __asan_unpoison_memory_region(worker.stacks[i], kStackBytes);
#endif
        worker.free_stacks[worker.free_count++] = worker.stacks[i];
    }
    return false;
}

// Must not be inlined into the caller of setjmp, so that no variable there changes between setjmp and longjmp.
__attribute__((noinline)) void run_blocks(Worker& worker, uint64_t first_block, uint64_t last_block) {
    const PolderLaunch& launch = *worker.launch;
    const uint64_t count = last_block - first_block;
    for (uint64_t i = 0; i < count; ++i) {
        uint64_t block = first_block + i;
        if (launch.order == kOrderBackwards) block = last_block - 1 - i;
        if (launch.order == kOrderRandom) block = first_block + permuted(i, count, launch.seed);
        enter_block(launch, block);
        polder_position.another_follows = launch.order == kOrderForwards && i + 1 < count;
        if (worker.thread_count == 1) {
            launch.entry(launch.args);
        } else if (!run_fibers(worker, block)) {
            return;
        }
    }
}

}  // namespace

// ---- Called by kernels ---------------------------------------------------------------------------------------------

unsigned polder_barrier(int kind, int predicate) {
    Worker& worker = *this_worker;
    if (worker.thread_count == 1) return predicate != 0;
    Thread& self = *worker.running;
    Barrier& barrier = worker.barriers[kind];
    barrier.passed += predicate != 0;
    self.state = State::kAtBarrier;
    self.waits_at = kBarrierNames[kind];
    if (++barrier.arrived == worker.thread_count) {
        for (unsigned i = 0; i < worker.thread_count; ++i) worker.threads[i].passed = barrier.passed;
        barrier = {0, 0};
        push_in_order(worker, 0, worker.thread_count, nullptr);
    }
    wait(worker, self);
    return self.passed;
}

void polder_warp(const char* name, PolderWarpOperation operation, unsigned mask, void* slot) {
    Worker& worker = *this_worker;
    const bool alone = worker.thread_count == 1;
    const unsigned number = alone ? 0 : unsigned(worker.running - worker.threads), lane = number & 31u;
    if (((mask >> lane) & 1u) == 0) {
        set_fault(worker, kWarpFault, polder_position.thread, "%s with mask 0x%08x, which lacks its caller, lane %u",
                  name, mask, lane);
        abandon_block(worker);
    }
    if (alone) {
        if (operation == nullptr) return;
        if (mask != 1u) {
            set_fault(worker, kWarpFault, polder_position.thread,
                      "%s with mask 0x%08x names lane %d, which the block does not have: it has 1 thread", name, mask,
                      __builtin_ctz(mask & ~1u));
            abandon_block(worker);
        }
        operation(mask, &slot);
        return;
    }
    Thread& self = worker.threads[number];
    Warp& warp = worker.warps[number / 32];
    Gathering* gathering = warp.gatherings;
    Gathering* const end = gathering + warp.gathering_count;
    while (gathering != end && (gathering->operation != operation || gathering->mask != mask)) ++gathering;
    if (gathering == end) {
        *gathering = {operation, name, mask, 0};
        ++warp.gathering_count;
    }
    gathering->arrived |= 1u << lane;
    warp.slots[lane] = slot;
    self.state = State::kAtWarp;
    self.waits_at = name;
    self.mask = mask;
    if (is_complete(warp, *gathering)) finish_gathering(worker, number & ~31u, warp, gathering);
    wait(worker, self);
}

void polder_misuse(const char* name, const char* what) {
    set_fault(*this_worker, kWarpFault, polder_position.thread, "%s with %s", name, what);
    abandon_block(*this_worker);
}

// ---- Called by the host device -------------------------------------------------------------------------------------

// Runs the blocks [first_block, last_block) of the flattened grid. Returns 0, or the kind of *fault.
int polder_host_run(const PolderLaunch* launch, uint64_t first_block, uint64_t last_block, PolderFault* fault) {
    *fault = {};
    if (first_block >= last_block) return kNoFault;
    const auto fail = [fault](const char* message) {
        fault->kind = kHostFailure;
        snprintf(fault->message, sizeof fault->message, "%s", message);
        return int(kHostFailure);
    };
    const uint32_t *grid = launch->grid, *block = launch->block;
    const bool block_fits = block[0] <= kMaxThreads && block[1] <= kMaxThreads && block[2] <= kMaxThreads &&
                            uint64_t(block[0]) * block[1] * block[2] <= kMaxThreads;
    if (!block_fits || block[0] * block[1] * block[2] == 0) return fail("a block must have 1 to 1024 threads");
    if (last_block > uint64_t(grid[0]) * grid[1] * grid[2]) return fail("the range of blocks exceeds the grid");

    Worker* worker = current_worker();
    if (worker == nullptr) return fail("cannot map the memory of a host worker");
    if (!reserve_shared(*worker, launch->shared_bytes)) return fail("cannot map the dynamic shared memory");
    worker->launch = launch;
    worker->fault = fault;
    worker->running = nullptr;
    worker->thread_count = block[0] * block[1] * block[2];
    polder_position.thread = {0, 0, 0};
    polder_position.block_dim = {block[0], block[1], block[2]};
    polder_position.grid_dim = {grid[0], grid[1], grid[2]};
    if (worker->thread_count > 1) number_threads(*worker);
    if (_setjmp(worker->escape) == 0) run_blocks(*worker, first_block, last_block);
    return int(fault->kind);
}

int polder_host_matrix_units(void) {
#if defined(__linux__) && defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return 0;
    // The kernel saves the tiles of a process only after it has asked for that.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return 0;
#endif
}
