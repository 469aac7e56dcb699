// Attention of one batch as matrix products in float32, forward and backward: the textbook's form, which all the fused
// kernels compute. Queries are [..., heads, queries, width], keys and values [..., key heads, keys, width].
#pragma once
#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

namespace fake {

using MaybeTensor = std::optional<at::Tensor>;

// The keys that a query attends to. Query i has position i + shift among the keys; a negative reach is unbounded.
struct Sight {
  int64_t shift = 0;
  int64_t left = -1, right = -1;
  double softcap = 0;

  static Sight causal(bool on, int64_t shift = 0) { return {shift, -1, on ? 0 : -1, 0}; }
};

inline at::Tensor in_float(const at::Tensor& tensor) { return tensor.to(at::kFloat); }

// Grouped queries: every key head serves as many query heads as there are to one.
inline at::Tensor per_query_head(const at::Tensor& tensor, int64_t heads) {
  return tensor.size(-3) == heads ? tensor : tensor.repeat_interleave(heads / tensor.size(-3), -3);
}

inline at::Tensor attention_scores(const at::Tensor& q, const at::Tensor& k, const MaybeTensor& bias, double scale,
                                   const Sight& sight) {
  auto scores = at::matmul(in_float(q), in_float(per_query_head(k, q.size(-3))).transpose(-2, -1)) * scale;
  if (sight.softcap > 0) scores = at::tanh(scores / sight.softcap) * sight.softcap;
  if (bias && bias->defined()) scores = scores + in_float(*bias);
  auto distance = at::arange(k.size(-2)).unsqueeze(0) - (at::arange(q.size(-2)).unsqueeze(1) + sight.shift);
  constexpr double hidden = -std::numeric_limits<double>::infinity();
  if (sight.left >= 0) scores = scores.masked_fill(distance.lt(-sight.left), hidden);
  if (sight.right >= 0) scores = scores.masked_fill(distance.gt(sight.right), hidden);
  return scores;
}

// Softmax with log-sum-exp given; a query that sees no key has weights of zero.
inline at::Tensor attention_weights(const at::Tensor& scores, const at::Tensor& log_sum) {
  return at::exp(scores - log_sum.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0);
}

// Output (float32) and log-sum-exp [..., heads, queries].
inline std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const MaybeTensor& bias, double scale, const Sight& sight) {
  auto scores = attention_scores(q, k, bias, scale, sight);
  auto log_sum = at::logsumexp(scores, -1);
  auto out = at::matmul(attention_weights(scores, log_sum), in_float(per_query_head(v, q.size(-3))));
  return {out, log_sum};
}

// Sums the gradients of the query heads that a key head serves.
inline at::Tensor per_key_head(const at::Tensor& gradient, const at::Tensor& like) {
  const int64_t groups = gradient.size(-3) / like.size(-3);
  if (groups == 1) return gradient;
  return gradient.unflatten(-3, {like.size(-3), groups}).sum(-3);
}

// Gradients of q, k, v and bias, from the output and log-sum-exp that are *given*: as in the fused kernels these may be
// those over more keys than the ones here.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MaybeTensor& bias,
    const at::Tensor& out, const at::Tensor& log_sum, double scale, const Sight& sight) {
  TORCH_CHECK(sight.softcap == 0, "fakecuda: gradient of attention with softcap");
  const int64_t heads = q.size(-3);
  auto weights = attention_weights(attention_scores(q, k, bias, scale, sight), in_float(log_sum));
  auto grad_v = at::matmul(weights.transpose(-2, -1), in_float(grad));
  auto grad_weights = at::matmul(in_float(grad), in_float(per_query_head(v, heads)).transpose(-2, -1));
  auto row = (in_float(grad) * in_float(out)).sum(-1, /*keepdim=*/true);
  auto grad_scores = weights * (grad_weights - row);
  auto grad_q = at::matmul(grad_scores, in_float(per_query_head(k, heads))) * scale;
  auto grad_k = at::matmul(grad_scores.transpose(-2, -1), in_float(q)) * scale;
  at::Tensor grad_bias;
  if (bias && bias->defined()) grad_bias = at::sum_to(grad_scores, bias->sizes()).to(bias->scalar_type());
  return {grad_q.to(q.scalar_type()), per_key_head(grad_k, k).to(k.scalar_type()),
          per_key_head(grad_v, v).to(v.scalar_type()), grad_bias};
}

inline double scale_or_default(const std::optional<double>& scale, const at::Tensor& q) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(q.size(-1)));
}

}  // namespace fake
