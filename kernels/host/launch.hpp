// What the host's runtime and src/device/host.rs share. build.rs writes it as Rust; see include/constants.cuh.
#pragma once
#include <stdint.h>

extern "C" {

/// A kernel's entry point.
typedef void PolderEntry(const void* args);

/// A launch.
struct PolderLaunch {
    PolderEntry* entry;
    const char* name;
    const void* args;
    uint32_t grid[3];
    uint32_t block[3];
    uint64_t shared_bytes;
    uint32_t order;  // one of BlockOrder
    uint32_t reserved;
    uint64_t seed;  // of a random order
};

/// A kernel's violation of a rule.
struct PolderFault {
    uint32_t kind;  // one of FaultKind
    uint32_t block[3];
    uint32_t thread[3];
    char message[236];  // ends with a zero
};
}

namespace {

enum FaultKind : uint32_t {
    kNoFault = 0,
    kBarrierDivergence = 1,
    kWarpFault = 2,
    kHostFailure = 3,
};

/// The order in which blocks run, and within a block its threads.
enum BlockOrder : uint32_t {
    kOrderForwards = 0,
    kOrderBackwards = 1,
    kOrderRandom = 2,
};

/// The most threads of a block on the host.
constexpr unsigned kMaxThreads = 1024;

}  // namespace
