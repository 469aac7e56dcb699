// The packing planner. tests/oracles/packing.py defines it, step by step: both give the same plan.
#pragma once

#include <cstdint>
#include <vector>

namespace megarl::packing {

struct PlanRequest {
  const int64_t* lengths;  // [n], padded, each in 1..max_tokens
  int64_t n;
  int64_t max_tokens;
  int64_t num_ranks;
  int64_t group;  // divides the microbatch count of every rank
  bool equal_counts;
  double a;  // cost of a sequence: a * length + b * length^2
  double b;
};

struct Plan {
  std::vector<int64_t> indices;      // [n], sequences of rank 0's microbatches, then of rank 1's, ...
  std::vector<int64_t> offsets;      // [K + 1], start of each microbatch in indices
  std::vector<int64_t> rank_counts;  // [num_ranks], microbatches per rank
};

Plan plan_microbatches(const PlanRequest& request);

}  // namespace megarl::packing
