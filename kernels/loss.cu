// Cross-entropy of a softmax over class logits, with label smoothing, its gradient and the gradient's tangent, and the
// count of right predictions.
//
// One warp takes one sample (on the CPU one thread takes several). A second kernel of one block sums the samples'
// losses in double, because sharpness is a small difference of such sums.
#include "include/reduce.cuh"

namespace {

template <class T>
struct CrossEntropyArgs {
    const T* logits;         // [batch, classes]
    const uint32_t* labels;  // [batch]
    const uint32_t* others;  // [batch]: each sample's other label; null for one label each
    const double* share;     // of the first label
    T* dlogits;              // [batch, classes], or null
    T* losses;               // [batch]
    uint32_t* correct;       // one counter, added to
    const double* scale;     // of the gradient, or null for 1
    uint32_t batch;
    uint32_t classes;
    double inverse_batch;  // 1 / batch
    double smoothing;
    double smoothing_share;  // smoothing / classes
};

/// The factor of a sample's gradient in the gradient of the mean, times the loss scale.
template <class T>
__device__ __forceinline__ T gradient_scale(const double* scale, double inverse_batch) {
    return T(scale != nullptr ? scale[0] * inverse_batch : inverse_batch);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
#if defined(POLDER_HOST)
__forceinline__ double exponential(double x) { return exp(x); }
__forceinline__ double logarithm(double x) { return log(x); }
#endif

/// The largest logit and its first index. A NaN is never the largest. An index of `classes` means that there is none.
template <class T>
struct Largest {
    T value;
    uint32_t index;

    __device__ __forceinline__ void take(T other, uint32_t place) {
        if (other > value || (other == value && place < index)) {
            value = other;
            index = place;
        }
    }
};

/// loss = log(sum exp z) - (1 - smoothing) z[label] - smoothing / classes sum z, all relative to the largest logit, and
/// its gradient over the batch size, times the loss scale. With two labels, share z[label] + (1 - share) z[other]. A
/// logit that is not finite gives a loss that is not finite, because it enters the last term, whose product with a
/// smoothing of zero is then a NaN.
template <class T>
__device__ void cross_entropy(const CrossEntropyArgs<T>& a) {
    const bool alone = block_threads() == 1;
    const uint32_t lanes = alone ? 1 : 32, lane = threadIdx.x % lanes;
    const uint32_t warps = gridDim.x * (blockDim.x / lanes), classes = a.classes;
    const T scale = gradient_scale<T>(a.scale, a.inverse_batch), infinity = T(INFINITY);
    const double share = a.others != nullptr ? *a.share : 1.0;
    const T on = T((1.0 - a.smoothing) * share), off = T(a.smoothing_share);
    const T on_other = T((1.0 - a.smoothing) * (1.0 - share));
    for (uint32_t n = (blockIdx.x * blockDim.x + threadIdx.x) / lanes; n < a.batch; n += warps) {
        const T* const z = a.logits + uint64_t(n) * classes;
        const uint32_t label = a.labels[n], other = a.others != nullptr ? a.others[n] : label;
        Largest<T> largest = {-infinity, classes};
        for (uint32_t k = lane; k < classes; k += lanes) largest.take(z[k], k);
        for (uint32_t distance = lanes / 2; distance > 0; distance /= 2) {
            const T value = __shfl_xor_sync(0xffffffffu, largest.value, int(distance));
            largest.take(value, __shfl_xor_sync(0xffffffffu, largest.index, int(distance)));
        }
        T exponentials = 0, shifted = 0;
        for (uint32_t k = lane; k < classes; k += lanes) {
            exponentials += exponential(z[k] - largest.value);
            shifted += z[k] - largest.value;
        }
        if (!alone) {
            exponentials = warp_sum(exponentials);
            shifted = warp_sum(shifted);
        }
        const bool known = label < classes && other < classes;
        const T nan = infinity - infinity;
        if (lane == 0) {
            const T at_label = known ? z[label] - largest.value : nan;
            T at_labels = on * at_label;
            if (known && a.others != nullptr) at_labels += on_other * (z[other] - largest.value);
            a.losses[n] = logarithm(exponentials) - at_labels - off * shifted;
            if (known && largest.index == label) atomicAdd(a.correct, 1u);
        }
        if (a.dlogits == nullptr) continue;
        T* const dz = a.dlogits + uint64_t(n) * classes;
        for (uint32_t k = lane; k < classes; k += lanes) {
            T target = (k == label ? on : T(0)) + off;
            if (a.others != nullptr && k == other) target += on_other;
            const T p = exponential(z[k] - largest.value) / exponentials;
            dz[k] = known ? (p - target) * scale : nan;
        }
    }
}

template <class T>
struct CrossEntropyTangentArgs {
    const T* logits;          // [batch, classes]
    const T* logits_tangent;  // [batch, classes]
    T* dlogits_tangent;       // [batch, classes]
    const double* scale;      // of it, or null for 1
    uint32_t batch;
    uint32_t classes;
    double inverse_batch;  // 1 / batch
};

/// dz' = p (z' - sum p z') / batch with p = softmax(z). The labels are constants, so they do not occur.
template <class T>
__device__ void cross_entropy_tangent(const CrossEntropyTangentArgs<T>& a) {
    const bool alone = block_threads() == 1;
    const uint32_t lanes = alone ? 1 : 32, lane = threadIdx.x % lanes;
    const uint32_t warps = gridDim.x * (blockDim.x / lanes), classes = a.classes;
    const T scale = gradient_scale<T>(a.scale, a.inverse_batch);
    for (uint32_t n = (blockIdx.x * blockDim.x + threadIdx.x) / lanes; n < a.batch; n += warps) {
        const T* const z = a.logits + uint64_t(n) * classes;
        const T* const tangent = a.logits_tangent + uint64_t(n) * classes;
        T largest = -T(INFINITY);
        for (uint32_t k = lane; k < classes; k += lanes) largest = max(largest, z[k]);
        if (!alone) largest = warp_max(largest);
        // Relative to the first class's tangent, so that a constant over all classes cancels before it is rounded.
        const T shift = tangent[0];
        T exponentials = 0, weighted = 0;
        for (uint32_t k = lane; k < classes; k += lanes) {
            const T e = exponential(z[k] - largest);
            exponentials += e;
            weighted += e * (tangent[k] - shift);
        }
        if (!alone) {
            exponentials = warp_sum(exponentials);
            weighted = warp_sum(weighted);
        }
        const T mean = weighted / exponentials;
        T* const dz = a.dlogits_tangent + uint64_t(n) * classes;
        for (uint32_t k = lane; k < classes; k += lanes) {
            const T p = exponential(z[k] - largest) / exponentials;
            dz[k] = p * ((tangent[k] - shift) - mean) * scale;
        }
    }
}

template <class T>
struct MeanLossArgs {
    const T* losses;
    double* loss;
    uint32_t* flag;  // or null
    uint64_t batch;
};

/// The mean of the samples' losses, by one block; flag[0] = 1 if it is infinite or NaN.
template <class T>
__device__ void mean_loss(const MeanLossArgs<T>& a) {
    const Sums<1> sum = block_sums_of<1>(
        a.batch, [](double loss) { return Sums<1>{{loss}}; }, a.losses);
    if (thread_in_block() != 0) return;
    const double loss = sum.v[0] / double(a.batch);
    *a.loss = loss;
    if (a.flag != nullptr && !(fabs(loss) < double(INFINITY))) atomicOr(a.flag, 1u);
}

}  // namespace

POLDER_KERNEL(cross_entropy_f32, cross_entropy<float>, CrossEntropyArgs<float>)
POLDER_HOST_KERNEL(cross_entropy_f64, cross_entropy<double>, CrossEntropyArgs<double>)
POLDER_KERNEL(cross_entropy_tangent_f32, cross_entropy_tangent<float>, CrossEntropyTangentArgs<float>)
POLDER_HOST_KERNEL(cross_entropy_tangent_f64, cross_entropy_tangent<double>, CrossEntropyTangentArgs<double>)
POLDER_KERNEL(mean_loss_f32, mean_loss<float>, MeanLossArgs<float>)
POLDER_HOST_KERNEL(mean_loss_f64, mean_loss<double>, MeanLossArgs<double>)
