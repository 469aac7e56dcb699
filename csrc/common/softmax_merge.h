// Merge softmax sums of parts of a row. Any device.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/stack.h>

#include <limits>

namespace megarl {

// From parts [P, R, 4] of token_logprob statistics to the whole row's [R, 4].
inline at::Tensor merge_stats(const at::Tensor& parts, const at::Tensor& temperature) {
  if (parts.size(0) == 1) return parts.select(0, 0);
  const at::Tensor maxima = parts.select(-1, 0);
  const at::Tensor maximum = maxima.amax(0);
  // A part without finite logits has sums of 0 and a shift of -inf (or NaN).
  const at::Tensor shift =
      ((maxima - maximum) / temperature)
          .masked_fill(maxima == -std::numeric_limits<double>::infinity(), 0.0);
  const at::Tensor scale = shift.exp();
  const at::Tensor sums = parts.select(-1, 1);
  return at::stack({maximum, (scale * sums).sum(0), parts.select(-1, 2).amax(0),
                    (scale * (parts.select(-1, 3) + shift * sums)).sum(0)},
                   -1);
}

}  // namespace megarl
