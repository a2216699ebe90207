// Which block of a launch is the last to come: it goes on with what all of them have left, and no launch more is needed.
#pragma once
#include "polder.cuh"

namespace {

/// Whether this block is the last of `count` to come here. If so, it sees all that the others wrote before they came, and the
/// ticket is zero again for the next launch.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket, uint32_t count) {
    __shared__ uint32_t last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        last = atomicAdd(ticket, 1u) + 1 == count;
        if (last) atomicExch(ticket, 0u);
    }
    __syncthreads();
    const bool result = last != 0;
    if (result) __threadfence();
    return result;
}

}  // namespace
