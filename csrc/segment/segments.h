// Boundaries of segments on CPUs: checks, and a parallel loop that gives each thread about equally many values.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/check.h"

namespace megarl {

constexpr int64_t kValuesPerThread = 8192;

// cu [S + 1] int32 from 0 to num_values, never falling. Returns its data; `cu` must outlive it.
inline const int32_t* check_segments(const char* op, const char* name, const at::Tensor& cu, int64_t num_values) {
  MEGARL_CHECK(op, cu.dim() == 1 && cu.numel() > 0, name, " must have shape [S + 1], got ", cu.sizes());
  check_vector(op, name, cu, cu.numel(), at::kInt);
  MEGARL_CHECK(op, cu.is_contiguous(), name, " must be contiguous, got strides ", cu.strides());
  const int32_t* bounds = cu.const_data_ptr<int32_t>();
  const int64_t last = cu.numel() - 1;
  MEGARL_CHECK(op, bounds[0] == 0 && bounds[last] == num_values, name, " must run from 0 to ", num_values, ", found ",
               bounds[0], " to ", bounds[last]);
  for (int64_t s = 0; s < last; ++s) {
    MEGARL_CHECK(op, bounds[s] <= bounds[s + 1], name, "[", s + 1, "] = ", bounds[s + 1], " falls below ", bounds[s]);
  }
  return bounds;
}

// Calls body(first, last) on ranges of segments.
template <typename Body>
void for_segments(const int32_t* cu, int64_t num_segments, const Body& body) {
  const int64_t average = num_segments == 0 ? 1 : std::max(1, cu[num_segments] / static_cast<int32_t>(num_segments));
  at::parallel_for(0, num_segments, std::max<int64_t>(1, kValuesPerThread / average), body);
}

}  // namespace megarl
