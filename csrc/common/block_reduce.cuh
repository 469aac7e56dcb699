// Sums and maxima over a warp, in a fixed order: results are bitwise repeatable.
#pragma once

#include "common/simt_portable.cuh"

namespace megarl {

template <class A>
__device__ __forceinline__ A warp_max(A value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

}  // namespace megarl
