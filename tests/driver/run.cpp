// Runs a grid: blocks one by one on a few threads, the warps of a block from barrier to barrier, and the lanes of a
// warp in lockstep until they diverge. DRIVER_SEED sets the order of warps and blocks, because CUDA guarantees none.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <random>
#include <thread>

#include "ptx.hpp"

namespace {

/// Runs a warp to the next barrier or to its end. Of groups of lanes that have diverged, the one furthest behind
/// continues, so that they converge again. An instruction for the whole warp waits for all lanes.
void advance(Warp& w) {
    const Kernel& kernel = *w.block->kernel;
    const auto ready = [&](const Group& group) {
        return group.mask == w.live && kernel.code[group.at].kind != Kind::kBarrier;
    };
    while (!w.groups.empty()) {
        auto behind = w.groups.end();
        for (auto group = w.groups.begin(); group != w.groups.end(); ++group) {
            if (!group->waiting && (behind == w.groups.end() || group->at < behind->at)) behind = group;
        }
        if (behind == w.groups.end()) {
            if (w.groups.size() == 1 && kernel.code[w.groups[0].at].kind == Kind::kBarrier) return;
            fault(w, kernel.code[w.groups[0].at], 0, "lanes of a warp wait for one another in %zu places",
                  w.groups.size());
        }
        Group group = *behind;
        w.groups.erase(behind);
        int meeting = int(kernel.code.size());
        for (const Group& other : w.groups) {
            if (other.at >= group.at) meeting = std::min(meeting, other.at);
        }
        for (bool together = true; together;) {
            if (group.at == meeting) {
                std::erase_if(w.groups, [&](const Group& other) {
                    if (other.at == group.at) group.mask |= other.mask;
                    return other.at == group.at;
                });
                w.groups.push_back(group);
                break;
            }
            const Instruction& i = kernel.code[group.at];
            uint32_t mask = group.mask;
            if (i.guard != NOWHERE) mask &= i.negated ? ~*w.row<uint32_t>(i.guard) : *w.row<uint32_t>(i.guard);
            switch (i.kind) {
                case Kind::kPlain:
                    if (mask != 0) i.execute(w, i, mask);
                    ++group.at;
                    break;
                case Kind::kBranch:
                    if (mask == 0) {
                        ++group.at;
                        break;
                    }
                    group.mask &= ~mask;
                    if (group.mask != 0) w.groups.push_back({group.at + 1, group.mask, false});
                    w.groups.push_back({i.target, mask, false});
                    together = false;
                    break;
                case Kind::kReturn:
                    w.live &= ~mask;
                    group.mask &= ~mask;
                    ++group.at;
                    if (group.mask != 0) w.groups.push_back(group);
                    for (Group& other : w.groups) other.waiting = other.waiting && !ready(other);
                    together = false;
                    break;
                case Kind::kBarrier:
                case Kind::kTogether:
                case Kind::kShuffle:
                    if (mask == 0) {
                        ++group.at;
                        break;
                    }
                    if (mask != group.mask) fault(w, i, 0, "guarded, so that only a part of the lanes executes it");
                    // A shuffle concerns only the lanes in its mask.
                    const uint32_t wanted =
                        i.kind == Kind::kShuffle ? w.row<uint32_t>(i.e)[__builtin_ctz(mask)] & w.live : w.live;
                    if (i.kind != Kind::kBarrier && mask == wanted) {
                        i.execute(w, i, mask);
                        ++group.at;
                        break;
                    }
                    group.waiting = true;
                    w.groups.push_back(group);
                    together = false;
                    break;
            }
        }
    }
    if (!w.open.empty()) fail("%s ends with copies that were not committed", kernel.name.c_str());
    for (const auto& copies : w.committed) {
        if (!copies.empty()) fail("%s ends with copies without a wait", kernel.name.c_str());
    }
    w.done = true;
}

void run_block(Block& b, const uint32_t (&grid)[3], const uint32_t (&size)[3], uint64_t number, std::mt19937* order) {
    const Kernel& kernel = *b.kernel;
    b.index[0] = uint32_t(number % grid[0]);
    b.index[1] = uint32_t(number / grid[0] % grid[1]);
    b.index[2] = uint32_t(number / grid[0] / grid[1]);
    ++b.interval;
    // Shared memory begins with arbitrary content.
    std::fill(b.shared.begin(), b.shared.end(), uint8_t(0x5D));
    const uint32_t threads = size[0] * size[1] * size[2];
    for (Warp& w : b.warps) {
        const uint32_t lanes = std::min<uint32_t>(LANES, threads - w.number * LANES);
        w.live = lanes == LANES ? ~0u : (1u << lanes) - 1;
        w.groups = {{0, w.live, false}};
        w.done = false;
        w.open.clear();
        w.committed.clear();
        for (int lane = 0; lane < LANES; ++lane) {
            const uint32_t thread = uint32_t(w.thread(lane));
            const uint32_t index[3] = {thread % size[0], thread / size[0] % size[1], thread / size[0] / size[1]};
            for (int axis = 0; axis < 3; ++axis) {
                w.row<uint32_t>(axis * ROW)[lane] = index[axis];
                w.row<uint32_t>((3 + axis) * ROW)[lane] = size[axis];
                w.row<uint32_t>((6 + axis) * ROW)[lane] = b.index[axis];
                w.row<uint32_t>((9 + axis) * ROW)[lane] = grid[axis];
            }
            w.row<uint32_t>(12 * ROW)[lane] = uint32_t(lane);
            w.row<uint64_t>(PARAMETERS_ROW)[lane] = uint64_t(b.parameters.data());
        }
    }
    std::vector<Warp*> turns;
    for (Warp& w : b.warps) turns.push_back(&w);
    while (true) {
        if (order != nullptr) std::shuffle(turns.begin(), turns.end(), *order);
        for (Warp* w : turns) advance(*w);
        const auto done = std::count_if(b.warps.begin(), b.warps.end(), [](const Warp& w) { return w.done; });
        if (done == long(b.warps.size())) return;
        if (done != 0) fail("%s: some warps have ended while others wait at a barrier", kernel.name.c_str());
        const int at = b.warps[0].groups[0].at;
        for (Warp& w : b.warps) {
            if (w.groups[0].at != at) fault(w, kernel.code[w.groups[0].at], 0, "warps meet at different barriers");
            w.groups[0] = {at + 1, w.live, false};
        }
        ++b.interval;
    }
}

}  // namespace

void run(const Kernel& kernel, const uint32_t (&grid)[3], const uint32_t (&size)[3], uint32_t dynamic_shared,
         const std::vector<uint8_t>& parameters) {
    static const long seed = setting("DRIVER_SEED", 0), workers = setting("DRIVER_THREADS", 2);
    static std::atomic<uint32_t> launches{0};
    const uint32_t launch = launches++;
    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    std::vector<uint64_t> turns;
    if (seed != 0) {
        turns.resize(blocks);
        std::iota(turns.begin(), turns.end(), 0);
        std::shuffle(turns.begin(), turns.end(), std::mt19937(uint32_t(seed) + launch));
    }
    std::atomic<uint64_t> next{0};
    const auto work = [&](uint32_t worker) {
        Block b;
        b.kernel = &kernel;
        b.parameters = parameters;
        if (is_counting()) b.counts.resize(kernel.code.size());
        b.shared.resize(kernel.static_shared + dynamic_shared);
        b.touched.resize(b.shared.size());
        const uint32_t warps = (size[0] * size[1] * size[2] + LANES - 1) / LANES;
        b.warps.resize(warps);
        for (uint32_t number = 0; number < warps; ++number) {
            b.warps[number].block = &b;
            b.warps[number].number = int(number);
            // Rows of constants are filled once. The others begin with arbitrary content.
            b.warps[number].registers = kernel.registers;
        }
        std::mt19937 order(uint32_t(seed) + launch * 31 + worker);
        for (uint64_t n = next++; n < blocks; n = next++) {
            run_block(b, grid, size, seed != 0 ? turns[n] : n, seed != 0 ? &order : nullptr);
        }
        if (is_counting()) add_counts(kernel, b.counts, worker == 0);
    };
    std::vector<std::thread> others;
    for (long worker = 1; worker < std::min<long>(workers, long(blocks)); ++worker)
        others.emplace_back(work, uint32_t(worker));
    work(0);
    for (std::thread& other : others) other.join();
}
