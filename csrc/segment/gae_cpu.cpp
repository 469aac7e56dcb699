// Generalised advantage estimation on CPUs: one backward walk per sequence, sequences over threads.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "segment/gae_math.h"
#include "segment/segments.h"

namespace megarl {
namespace {

void check_per_token(const char* op, const char* name, const at::Tensor& tensor, int64_t size, at::ScalarType dtype) {
  check_vector(op, name, tensor, size, dtype);
  MEGARL_CHECK(op, tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

std::tuple<at::Tensor, at::Tensor> gae(const at::Tensor& rewards, const at::Tensor& values, const at::Tensor& mask,
                                       const at::Tensor& cu_seqlens, double gamma, double gae_lambda) {
  const char* op = "gae";
  MEGARL_CHECK(op, rewards.dim() == 1, "rewards must have shape [T], got ", rewards.sizes());
  MEGARL_CHECK(op, gamma >= 0 && gamma <= 1, "gamma must lie in [0, 1], got ", gamma);
  MEGARL_CHECK(op, gae_lambda >= 0 && gae_lambda <= 1, "gae_lambda must lie in [0, 1], got ", gae_lambda);
  const int64_t num_tokens = rewards.size(0);
  check_per_token(op, "rewards", rewards, num_tokens, rewards.scalar_type());
  check_per_token(op, "values", values, num_tokens, rewards.scalar_type());
  check_per_token(op, "mask", mask, num_tokens, at::kFloat);
  const int32_t* cu = check_segments(op, "cu_seqlens", cu_seqlens, num_tokens);
  at::Tensor advantages = at::empty_like(rewards);
  at::Tensor returns = at::empty_like(rewards);
  AT_DISPATCH_FLOATING_TYPES(rewards.scalar_type(), "megarl::gae", [&] {
    const scalar_t* reward = rewards.const_data_ptr<scalar_t>();
    const scalar_t* value = values.const_data_ptr<scalar_t>();
    const float* kept = mask.const_data_ptr<float>();
    scalar_t* advantage = advantages.data_ptr<scalar_t>();
    scalar_t* target = returns.data_ptr<scalar_t>();
    for_segments(cu, cu_seqlens.numel() - 1, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        GaeCarry<double> next{0.0, 0.0};
        for (int64_t t = cu[s + 1] - 1; t >= cu[s]; --t) {
          const bool used = kept[t] != 0.0f;
          if (used) {
            next = gae_step<double>(reward[t], value[t], next, gamma, gae_lambda);
          }
          advantage[t] = used ? static_cast<scalar_t>(next.advantage) : scalar_t(0);
          target[t] = used ? static_cast<scalar_t>(next.advantage + next.value) : scalar_t(0);
        }
      }
    });
  });
  return {advantages, returns};
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CPU, m) { m.impl("gae", &gae); }

}  // namespace megarl
