// What the kernels that update weights share.
#pragma once

namespace {

/// The learning rate: a number, or so many times one on the device.
template <class Args>
__device__ __forceinline__ double learning_rate(const Args& a) {
    return a.lr_on_device != nullptr ? a.lr * *a.lr_on_device : a.lr;
}

}  // namespace
