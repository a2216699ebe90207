// Where a training run is, on the device: what changes from step to step is read there, so that one recorded step can be replayed.
#include "include/polder.cuh"

namespace {

struct AdvanceClockArgs {
    uint64_t* clock;      // batches since the epoch began, steps since the run began
    const double* rates;  // of the epoch's steps
    double* rate;
    uint64_t count;
};

/// Ends a step: counts it, and looks the next one's learning rate up, zero after the last. One thread.
__device__ void advance_clock(const AdvanceClockArgs& a) {
    if (threadIdx.x != 0 || blockIdx.x != 0) return;
    const uint64_t batch = a.clock[0] + 1;
    a.clock[0] = batch;
    a.clock[1] += 1;
    a.rate[0] = batch < a.count ? a.rates[batch] : 0.0;
}

}  // namespace

POLDER_KERNEL(clock_advance, advance_clock, AdvanceClockArgs)
