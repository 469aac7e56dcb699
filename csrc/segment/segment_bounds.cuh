// Boundaries of segments on a device. Invalid ones stop the kernel before an access outside the tensors.
#pragma once

#include "common/block_reduce.cuh"

namespace megarl {

struct Segment {
  int64_t begin, end;
};

// Segment `s` of `num_segments` bounded by cu [num_segments + 1], which must run from 0 to num_values without falling.
__device__ __forceinline__ Segment segment_at(const int32_t* cu, int64_t s, int64_t num_segments, int64_t num_values) {
  const Segment segment{cu[s], cu[s + 1]};
  MEGARL_DEVICE_CHECK(segment.begin <= segment.end, "cumulative lengths fall");
  MEGARL_DEVICE_CHECK((s > 0 || segment.begin == 0) && segment.begin >= 0, "cumulative lengths do not begin with 0");
  MEGARL_DEVICE_CHECK(s + 1 < num_segments || segment.end == num_values, "cumulative lengths do not end at T");
  MEGARL_DEVICE_CHECK(segment.end <= num_values, "cumulative lengths exceed T");
  return segment;
}

// Last s with bounds[s] <= value, for bounds that never fall and bounds[0] <= value; `count` entries.
template <class T>
__device__ __forceinline__ int64_t last_at_most(const T* bounds, int64_t count, int64_t value) {
  int64_t low = 0, high = count;  // bounds[low] <= value < bounds[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(bounds[middle]) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace megarl
