// Counts the kernels' accesses to memory: sectors of 32 bytes for accesses of warps to global memory, and wavefronts
// for those to shared memory, each with the minimum. With DRIVER_COUNT=FILE the counts are written there when the
// process ends, with a line for each kernel and for each of its instructions that accessed memory. count.py prints
// tables of them.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "ptx.hpp"

namespace {

/// A kernel's counts over all of its launches, by instruction.
struct Total {
    const Kernel* kernel = nullptr;
    uint64_t launches = 0;
    std::vector<Count> counts;
};

struct Totals {
    std::mutex mutex;
    std::map<std::string, Total> by_name;
};

/// Never destroyed: it is written when the process ends.
Totals& totals() {
    static Totals& all = *new Totals;
    return all;
}

void add(Count& to, const Count& from) {
    to.read += from.read;
    to.written += from.written;
    to.least_sectors += from.least_sectors;
    to.wavefronts += from.wavefronts;
    to.least_wavefronts += from.least_wavefronts;
}

/// Kernels live as long as the driver, which exists longer than this.
void write() {
    std::lock_guard lock(totals().mutex);
    FILE* file = fopen(getenv("DRIVER_COUNT"), "w");
    if (file == nullptr) fail("DRIVER_COUNT: %s cannot be written", getenv("DRIVER_COUNT"));
    for (const auto& [name, total] : totals().by_name) {
        fprintf(file, "%s\t%" PRIu64 "\n", name.c_str(), total.launches);
        for (size_t n = 0; n < total.counts.size(); ++n) {
            const Count& c = total.counts[n];
            const Instruction& i = total.kernel->code[n];
            if (c.least_sectors + c.least_wavefronts == 0) continue;
            fprintf(file, "%s\t%" PRIu64 "\t%" PRIu64 "\t%" PRIu64 "\t%" PRIu64 "\t%" PRIu64 "\t%s.ptx:%d: %s\n",
                    name.c_str(), c.read, c.written, c.least_sectors, c.wavefronts, c.least_wavefronts,
                    total.kernel->source.c_str(), i.line, i.text.c_str());
        }
    }
    if (fclose(file) != 0) fail("DRIVER_COUNT: %s cannot be written", getenv("DRIVER_COUNT"));
}

/// Wavefronts of an access to shared memory: at a time as many lanes as access 128 bytes, and one more for each further
/// word in a bank.
uint32_t wavefronts(const uint64_t (&addresses)[LANES], uint32_t mask, uint32_t bytes, bool least) {
    constexpr uint32_t WORD = 4, BANKS = 32;
    const int at_once = std::min<int>(LANES, int(BANKS * WORD / bytes));
    uint32_t result = 0;
    for (int first = 0; first < LANES; first += at_once) {
        std::vector<uint64_t> banks[BANKS];
        size_t most = 0;
        for (int lane = first; lane < first + at_once; ++lane) {
            if ((mask >> lane & 1) == 0) continue;
            for (uint64_t word = addresses[lane] / WORD; word * WORD < addresses[lane] + bytes; ++word) {
                std::vector<uint64_t>& bank = banks[word % BANKS];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        result += least ? most > 0 : uint32_t(most);
    }
    return result;
}

/// The number of different units of `size` bytes in an access.
uint32_t touched(const uint64_t (&addresses)[LANES], uint32_t mask, uint32_t bytes, uint32_t size) {
    std::vector<uint64_t> units;
    for_lanes(mask, [&](int lane) {
        for (uint64_t unit = addresses[lane] / size; unit * size < addresses[lane] + bytes; ++unit)
            units.push_back(unit);
    });
    std::sort(units.begin(), units.end());
    return uint32_t(std::unique(units.begin(), units.end()) - units.begin());
}

}  // namespace

bool is_counting() {
    static const bool asked = getenv("DRIVER_COUNT") != nullptr;
    return asked;
}

void count_access(Count& count, uint32_t mask, const uint64_t (&addresses)[LANES], uint32_t bytes, Space space,
                  bool writes) {
    if (space == Space::kShared) {
        count.wavefronts += wavefronts(addresses, mask, bytes, false);
        count.least_wavefronts += wavefronts(addresses, mask, bytes, true);
    } else if (space == Space::kGlobal) {
        constexpr uint32_t SECTOR = 32;
        (writes ? count.written : count.read) += touched(addresses, mask, bytes, SECTOR);
        // The minimum: as if the bytes were contiguous.
        count.least_sectors += (touched(addresses, mask, bytes, 1) + SECTOR - 1) / SECTOR;
    }
}

void add_counts(const Kernel& kernel, const std::vector<Count>& counts, bool is_launch) {
    std::lock_guard lock(totals().mutex);
    if (totals().by_name.empty()) atexit(write);
    Total& total = totals().by_name[kernel.name];
    total.kernel = &kernel;
    total.counts.resize(kernel.code.size());
    total.launches += is_launch;
    for (size_t n = 0; n < counts.size(); ++n) add(total.counts[n], counts[n]);
}
