// Sums and means of losses on the device, so that the training loop need not wait for the loss of each step.
#include "include/polder.cuh"

namespace {

struct RecordArgs {
    const double* loss;
    const uint32_t* correct;
    const uint32_t* skip;
    double* totals;  // loss times samples, correct predictions, samples
    double samples;
};

/// Adds one step's mean loss and correct predictions to the totals, unless the step was skipped. One thread.
__device__ void record(const RecordArgs& a) {
    if (threadIdx.x != 0 || blockIdx.x != 0 || a.skip[0] != 0) return;
    a.totals[0] += a.loss[0] * a.samples;
    a.totals[1] += a.correct[0];
    a.totals[2] += a.samples;
}

struct MeanTermArgs {
    const double* term;
    double* mean;
    double weight;
    uint32_t add;
};

/// mean = weight · term, or mean += weight · term. One thread.
__device__ void mean_term_body(const MeanTermArgs& a) {
    if (threadIdx.x != 0 || blockIdx.x != 0) return;
    a.mean[0] = a.weight * a.term[0] + (a.add ? a.mean[0] : 0.0);
}

}  // namespace

POLDER_KERNEL(record_step, record, RecordArgs)
POLDER_KERNEL(mean_term, mean_term_body, MeanTermArgs)
