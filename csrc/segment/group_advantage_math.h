// Group-relative advantages; definitions in megarl/advantages/group.py.
#pragma once

#include <cmath>
#include <cstdint>

namespace megarl {

// Statistics of a group from two passes: one for the mean, one for the deviations from it.
struct GroupStatistics {
  int64_t size;
  double mean;
  double sum_squared_deviations;
  bool all_equal;  // compared on the rewards: a computed deviation keeps a rounding residue
};

// advantage = (reward - mean) * scale.
inline double group_scale(const GroupStatistics& group, bool leave_one_out, bool normalize_std, double epsilon) {
  if (group.all_equal || group.size < 2) {
    return 0.0;
  }
  const double others = static_cast<double>(group.size - 1);
  // reward - mean of the others = (reward - mean of all) * G / (G - 1)
  double scale = leave_one_out ? static_cast<double>(group.size) / others : 1.0;
  if (normalize_std) {
    scale /= sqrt(group.sum_squared_deviations / others) + epsilon;
  }
  return scale;
}

}  // namespace megarl
