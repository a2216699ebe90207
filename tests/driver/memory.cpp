// The device's memory, and the report of faults.
#include "ptx.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "\nstand-in driver: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    fflush(stderr);
    abort();
}

long setting(const char* name, long otherwise) {
    const char* value = getenv(name);
    return value != nullptr ? atol(value) : otherwise;
}

Memory& memory() {
    // Never destroyed: devices may be dropped while the process ends.
    static Memory* memory = new Memory;
    return *memory;
}

Memory::Memory() {
    const auto reserve = [](uint64_t bytes) {
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) fail("%lu bytes of addresses cannot be reserved", bytes);
        return at;
    };
    base_ = static_cast<uint8_t*>(reserve(SPACE));
    valid_ = static_cast<uint16_t*>(reserve(SPACE / GRANULE * sizeof(uint16_t)));
}

uint64_t Memory::allocate(uint64_t bytes) {
    const std::lock_guard guard(mutex_);
    if (bytes > CAPACITY - used_) return 0;
    const uint64_t offset = next_;
    // A free granule follows every allocation.
    next_ += (bytes + GRANULE - 1) / GRANULE * GRANULE + GRANULE;
    if (next_ > SPACE) fail("all addresses have been used");
    for (uint64_t at = 0; at < bytes; at += GRANULE) {
        valid_[(offset + at) / GRANULE] = uint16_t(std::min(GRANULE, bytes - at));
    }
    live_[offset] = bytes;
    used_ += bytes;
    memset(base_ + offset, 0xC7, bytes);
    return uint64_t(base_) + offset;
}

void Memory::release(uint64_t address) {
    const std::lock_guard guard(mutex_);
    const auto found = live_.find(address - uint64_t(base_));
    if (found == live_.end()) fail("%lx is freed, where no allocation begins", address);
    const auto [offset, bytes] = *found;
    for (uint64_t at = 0; at < bytes; at += GRANULE) valid_[(offset + at) / GRANULE] = 0;
    constexpr uint64_t PAGE = 4096;
    const uint64_t begin = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    used_ -= bytes;
    live_.erase(found);
}

void Memory::check(uint64_t address, uint64_t bytes, const char* what) {
    const std::lock_guard guard(mutex_);
    const uint64_t offset = address - uint64_t(base_);
    auto found = live_.upper_bound(offset);
    if (found == live_.begin()) fail("%s: %lx is not device memory", what, address);
    --found;
    if (offset + bytes > found->first + found->second) {
        fail("%s: %lu bytes at %lx run past an allocation of %lu", what, bytes, address, found->second);
    }
}
