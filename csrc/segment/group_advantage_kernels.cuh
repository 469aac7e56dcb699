// Group-relative advantages: one warp per group, in double precision; the mean first, then the deviations from it.
#pragma once

#include "segment/group_advantage_math.h"
#include "segment/segment_bounds.cuh"

namespace megarl::group_advantage {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

template <class T>
__device__ __forceinline__ GroupStatistics statistics(const T* rewards, int64_t size) {
  const int lane = threadIdx.x % 32;
  GroupStatistics group{size, 0.0, 0.0, true};
  double sum = 0, squares = 0;
  bool equal = true;
  for (int64_t i = lane; i < size; i += 32) {
    sum += double(rewards[i]);
    equal &= rewards[i] == rewards[0];
  }
  sum = warp_sum(sum);
  group.all_equal = __all_sync(kFullWarp, equal);
  group.mean = size == 0 ? 0.0 : sum / double(size);
  for (int64_t i = lane; i < size; i += 32) {
    const double deviation = double(rewards[i]) - group.mean;
    squares += deviation * deviation;
  }
  group.sum_squared_deviations = warp_sum(squares);
  return group;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const T* __restrict__ rewards, const int32_t* __restrict__ cu, int64_t num_groups, int64_t num_rewards,
            bool leave_one_out, bool normalize_std, double epsilon, T* __restrict__ advantages) {
  const int64_t g = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (g >= num_groups) return;
  const Segment segment = segment_at(cu, g, num_groups, num_rewards);
  const GroupStatistics group = statistics(rewards + segment.begin, segment.end - segment.begin);
  const double scale = group_scale(group, leave_one_out, normalize_std, epsilon);
  for (int64_t i = segment.begin + threadIdx.x % 32; i < segment.end; i += 32) {
    // 0 * (r - mean) would be -0 or NaN for some r
    advantages[i] = scale == 0.0 ? T(0) : T((double(rewards[i]) - group.mean) * scale);
  }
}

}  // namespace megarl::group_advantage
