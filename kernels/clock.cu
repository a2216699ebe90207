// The position of a training run, on the device. Kernels read there what changes from step to step, so that a recorded
// step can be replayed.
#include "include/polder.cuh"

namespace {

struct AdvanceClockArgs {
    uint64_t* clock;      // batches since the epoch began, steps since the run began
    const double* rates;  // of the epoch's steps
    double* rate;
    uint64_t count;
};

/// Ends a step: counts it, and looks up the learning rate of the next step, which is zero after the last. One thread.
__device__ void advance_clock(const AdvanceClockArgs& a) {
    if (threadIdx.x != 0 || blockIdx.x != 0) return;
    const uint64_t batch = a.clock[0] + 1;
    a.clock[0] = batch;
    a.clock[1] += 1;
    a.rate[0] = batch < a.count ? a.rates[batch] : 0.0;
}

}  // namespace

POLDER_KERNEL(clock_advance, advance_clock, AdvanceClockArgs)
