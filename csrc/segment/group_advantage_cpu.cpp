// Group-relative advantages on CPUs, in double precision.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "segment/group_advantage_math.h"
#include "segment/segments.h"

namespace megarl {
namespace {

template <typename scalar_t>
GroupStatistics group_statistics(const scalar_t* rewards, int64_t size) {
  GroupStatistics group{size, 0.0, 0.0, true};
  double sum = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    sum += static_cast<double>(rewards[i]);
    group.all_equal &= rewards[i] == rewards[0];
  }
  group.mean = size == 0 ? 0.0 : sum / static_cast<double>(size);
  for (int64_t i = 0; i < size; ++i) {
    const double deviation = static_cast<double>(rewards[i]) - group.mean;
    group.sum_squared_deviations += deviation * deviation;
  }
  return group;
}

at::Tensor group_advantage(const at::Tensor& rewards, const at::Tensor& cu_groups, bool leave_one_out,
                           bool normalize_std, double epsilon) {
  const char* op = "group_advantage";
  MEGARL_CHECK(op, rewards.dim() == 1 && rewards.is_contiguous(), "rewards must be contiguous [N], got ",
               rewards.sizes());
  MEGARL_CHECK(op, epsilon >= 0, "epsilon must not be negative, got ", epsilon);
  const int32_t* cu = check_segments(op, "cu_groups", cu_groups, rewards.size(0));
  at::Tensor advantages = at::empty_like(rewards);
  AT_DISPATCH_FLOATING_TYPES(rewards.scalar_type(), "megarl::group_advantage", [&] {
    const scalar_t* source = rewards.const_data_ptr<scalar_t>();
    scalar_t* target = advantages.data_ptr<scalar_t>();
    for_segments(cu, cu_groups.numel() - 1, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        const auto group = group_statistics(source + cu[g], cu[g + 1] - cu[g]);
        const double scale = group_scale(group, leave_one_out, normalize_std, epsilon);
        for (int64_t i = cu[g]; i < cu[g + 1]; ++i) {
          // 0 * (r - mean) would be -0 or NaN for some r
          const double advantage = scale == 0.0 ? 0.0 : (static_cast<double>(source[i]) - group.mean) * scale;
          target[i] = static_cast<scalar_t>(advantage);
        }
      }
    });
  });
  return advantages;
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CPU, m) { m.impl("group_advantage", &group_advantage); }

}  // namespace megarl
