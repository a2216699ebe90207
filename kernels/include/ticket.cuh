// Determines the last block of a launch. It continues with the results of all blocks, which saves another launch.
#pragma once
#include "polder.cuh"

namespace {

/// Whether this block is the last of `count` that calls this. If so, it sees everything that the others wrote before
/// their calls, and the ticket is zero again, for the next launch.
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
