// Masked sums and means per segment, one block per segment, accumulated in double precision in a fixed order.
#pragma once

#include "segment/segment_bounds.cuh"
#include "segment/segment_reduce_math.h"

namespace megarl::segment_reduce {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // values a thread loads before it adds the first

struct SegmentSum {
  double sum, count;
};

// Broadcasts to all threads; at most one call per kernel.
__device__ __forceinline__ SegmentSum block_sum(SegmentSum mine) {
  constexpr int kWarps = kThreads / 32;
  MEGARL_SHARED(SegmentSum, of_warp, [kWarps]);
  const SegmentSum warp{warp_sum(mine.sum), warp_sum(mine.count)};
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = warp;
  __syncthreads();
  SegmentSum total{0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total.sum += of_warp[w].sum;
    total.count += of_warp[w].count;
  }
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    forward(const T* __restrict__ values, const int32_t* __restrict__ cu, const float* __restrict__ mask,
            int64_t num_values, bool mean, T* __restrict__ reduced) {
  const Segment segment = segment_at(cu, blockIdx.x, gridDim.x, num_values);
  SegmentSum mine{0, 0};
  for (int64_t base = segment.begin + threadIdx.x; base < segment.end; base += kInFlight * kThreads) {
    T value[kInFlight];
    bool kept[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t at = base + k * kThreads;
      kept[k] = at < segment.end && (mask == nullptr || mask[at] != 0.0f);
      if (at < segment.end) value[k] = values[at];
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (kept[k]) {
        mine.sum += double(widen(value[k]));
        mine.count += 1;
      }
    }
  }
  const SegmentSum total = block_sum(mine);
  if (threadIdx.x == 0) reduced[blockIdx.x] = narrow<T>(acc_t<T>(total.sum * segment_scale(total.count, mean)));
}

// grad has any stride, 0 where it was expanded from a scalar.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    backward(const T* __restrict__ grad, int64_t grad_stride, const int32_t* __restrict__ cu,
             const float* __restrict__ mask, int64_t num_values, bool mean, T* __restrict__ grad_values) {
  const Segment segment = segment_at(cu, blockIdx.x, gridDim.x, num_values);
  double count = double(segment.end - segment.begin);
  if (mask != nullptr && mean) {
    SegmentSum mine{0, 0};
    for (int64_t at = segment.begin + threadIdx.x; at < segment.end; at += kThreads) mine.count += mask[at] != 0.0f;
    count = block_sum(mine).count;
  }
  const T each = narrow<T>(acc_t<T>(double(widen(grad[blockIdx.x * grad_stride])) * segment_scale(count, mean)));
  for (int64_t at = segment.begin + threadIdx.x; at < segment.end; at += kThreads) {
    grad_values[at] = mask == nullptr || mask[at] != 0.0f ? each : narrow<T>(0);
  }
}

}  // namespace megarl::segment_reduce
