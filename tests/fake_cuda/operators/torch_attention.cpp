// torch's fused attention, for the CPU key: scaled_dot_product_attention's three back ends and the packed form that
// torch.nn.attention.varlen takes, with their layouts of outputs and log-sum-exp. Without dropout.
#include <torch/library.h>

#include "attention_math.h"

namespace {
using at::Tensor;
using c10::SymInt;
using fake::MaybeTensor;
using fake::Sight;
using std::optional;

MaybeTensor maybe(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }
void refuse_dropout(double p) { TORCH_CHECK(p == 0, "fakecuda: attention with dropout"); }

// The kernels write [batch, queries, heads, width] and return it transposed.
Tensor as_written(const Tensor& out, const Tensor& q) {
  return out.to(q.scalar_type()).transpose(1, 2).contiguous().transpose(1, 2);
}

using FlashResult = std::tuple<Tensor, Tensor, Tensor, Tensor, SymInt, SymInt, Tensor, Tensor, Tensor>;

FlashResult flash(const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, bool,
                  optional<double> scale) {
  refuse_dropout(dropout);
  auto [out, lse] = fake::attention(q, k, v, {}, fake::scale_or_default(scale, q), Sight::causal(causal));
  auto seed = at::zeros({2}, at::kUInt64), offset = at::zeros({}, at::kUInt64);
  return {as_written(out, q), lse, Tensor(), Tensor(), q.size(2), k.size(2), seed, offset, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                  const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor&,
                                                  const Tensor&, SymInt, SymInt, double dropout, bool causal,
                                                  const Tensor&, const Tensor&, optional<double> scale) {
  refuse_dropout(dropout);
  auto [dq, dk, dv, _] = fake::attention_backward(grad, q, k, v, {}, out, lse, fake::scale_or_default(scale, q),
                                                  Sight::causal(causal));
  return {dq, dk, dv};
}

// This kernel pads its log-sum-exp to whole blocks of queries.
constexpr int64_t EFFICIENT_BLOCK = 32;

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const MaybeTensor& bias, bool wants_lse, double dropout,
                                                     bool causal, optional<double> scale) {
  refuse_dropout(dropout);
  auto [out, lse] = fake::attention(q, k, v, bias, fake::scale_or_default(scale, q), Sight::causal(causal));
  const int64_t padding = (EFFICIENT_BLOCK - lse.size(2) % EFFICIENT_BLOCK) % EFFICIENT_BLOCK;
  lse = at::constant_pad_nd(lse, {0, padding}, INFINITY);
  if (!wants_lse) lse = lse.narrow(2, 0, 0).contiguous();
  return {as_written(out, q), lse, at::zeros({}, at::kLong), at::zeros({}, at::kLong)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& out,
    const Tensor& lse, const Tensor&, const Tensor&, double dropout, std::array<bool, 4>, bool causal,
    optional<double> scale) {
  refuse_dropout(dropout);
  return fake::attention_backward(grad, q, k, v, maybe(bias), out, lse.narrow(2, 0, q.size(2)),
                                  fake::scale_or_default(scale, q), Sight::causal(causal));
}

FlashResult cudnn(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias, bool, double dropout,
                  bool causal, bool, optional<double> scale) {
  refuse_dropout(dropout);
  auto [out, lse] = fake::attention(q, k, v, bias, fake::scale_or_default(scale, q), Sight::causal(causal));
  auto seed = at::zeros({}, at::kLong), offset = at::zeros({}, at::kLong);
  return {as_written(out, q), lse.unsqueeze(-1), Tensor(), Tensor(), q.size(2), k.size(2), seed, offset, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor> cudnn_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                  const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor&,
                                                  const Tensor&, const Tensor& bias, const Tensor&, const Tensor&,
                                                  SymInt, SymInt, double dropout, bool causal,
                                                  optional<double> scale) {
  refuse_dropout(dropout);
  auto [dq, dk, dv, _] =
      fake::attention_backward(grad, q, k, v, maybe(bias), out, lse.flatten(2).narrow(2, 0, q.size(2)),
                               fake::scale_or_default(scale, q), Sight::causal(causal));
  return {dq, dk, dv};
}

// The operators below scaled_dot_product_attention: [batch, tokens, heads, width], or with cum_seq packed sequences
// [tokens, heads, width]. One sequence's rows, heads first, as attention_math.h takes them.
class Sequences {
 public:
  Sequences(const MaybeTensor& q_bounds, const MaybeTensor& k_bounds) {
    packed_ = q_bounds && q_bounds->defined();
    if (packed_) q_bounds_ = q_bounds->to(at::kLong), k_bounds_ = k_bounds->to(at::kLong);
  }
  int64_t count(const Tensor& q) const { return packed_ ? q_bounds_.numel() - 1 : q.size(0); }
  Tensor queries(const Tensor& tensor, int64_t i) const { return rows(tensor, q_bounds_, i); }
  Tensor keys(const Tensor& tensor, int64_t i) const { return rows(tensor, k_bounds_, i); }
  // Log-sum-exp is [batch, heads, tokens], packed [heads, tokens].
  Tensor sums(const Tensor& lse, int64_t i) const {
    return packed_ ? lse.narrow(1, first(q_bounds_, i), length(q_bounds_, i)) : lse[i];
  }
  Tensor no_sums(const Tensor& q) const {
    if (packed_) return at::zeros({q.size(1), q.size(0)}, at::kFloat);
    return at::zeros({q.size(0), q.size(2), q.size(1)}, at::kFloat);
  }

 private:
  static int64_t first(const Tensor& bounds, int64_t i) { return bounds[i].item<int64_t>(); }
  static int64_t length(const Tensor& bounds, int64_t i) { return first(bounds, i + 1) - first(bounds, i); }
  Tensor rows(const Tensor& tensor, const Tensor& bounds, int64_t i) const {
    auto sequence = packed_ ? tensor.narrow(0, first(bounds, i), length(bounds, i)) : tensor[i];
    return sequence.transpose(0, 1);
  }

  bool packed_;
  Tensor q_bounds_, k_bounds_;
};

// Causal counts from the last key.
Sight sight_of(const Tensor& q, const Tensor& k, bool causal, const optional<SymInt>& left,
               const optional<SymInt>& right) {
  Sight sight = Sight::causal(causal, k.size(1) - q.size(1));
  if (left) sight.left = left->expect_int();
  if (right && !causal) sight.right = right->expect_int();
  return sight;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& cum_q, const MaybeTensor& cum_k, SymInt,
    SymInt, double dropout, bool causal, bool, optional<double> scale, optional<SymInt> left, optional<SymInt> right,
    const MaybeTensor& used, const MaybeTensor& slopes, const MaybeTensor& pages, optional<int64_t>) {
  refuse_dropout(dropout);
  TORCH_CHECK(!used && !slopes && !pages, "fakecuda: _flash_attention_forward with pages or slopes");
  const Sequences all(cum_q, cum_k);
  auto out = at::zeros_like(q);
  auto lse = all.no_sums(q);
  for (int64_t i = 0; i < all.count(q); i++) {
    auto qi = all.queries(q, i), ki = all.keys(k, i);
    auto [part, part_lse] = fake::attention(qi, ki, all.keys(v, i), {}, fake::scale_or_default(scale, q),
                                            sight_of(qi, ki, causal, left, right));
    all.queries(out, i).copy_(part);
    all.sums(lse, i).copy_(part_lse);
  }
  return {out, lse, at::zeros({2}, at::kUInt64), at::zeros({}, at::kUInt64), at::empty({0}, q.options())};
}

std::tuple<Tensor, Tensor, Tensor> flash_gradients(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                   const Tensor& v, const Tensor& out, const Tensor& lse,
                                                   const Tensor& cum_q, const Tensor& cum_k, SymInt, SymInt,
                                                   double dropout, bool causal, const Tensor&, const Tensor&,
                                                   optional<double> scale, optional<SymInt> left,
                                                   optional<SymInt> right) {
  refuse_dropout(dropout);
  const Sequences all(maybe(cum_q), maybe(cum_k));
  auto dq = at::zeros_like(q), dk = at::zeros_like(k), dv = at::zeros_like(v);
  for (int64_t i = 0; i < all.count(q); i++) {
    auto qi = all.queries(q, i), ki = all.keys(k, i);
    auto [gq, gk, gv, _] = fake::attention_backward(
        all.queries(grad, i), qi, ki, all.keys(v, i), {}, all.queries(out, i), all.sums(lse, i),
        fake::scale_or_default(scale, q), sight_of(qi, ki, causal, left, right));
    all.queries(dq, i).copy_(gq);
    all.keys(dk, i).copy_(gk);
    all.keys(dv, i).copy_(gv);
  }
  return {dq, dk, dv};
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_scaled_dot_product_flash_attention", flash);
  m.impl("_scaled_dot_product_flash_attention_backward", flash_backward);
  m.impl("_scaled_dot_product_efficient_attention", efficient);
  m.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward);
  m.impl("_scaled_dot_product_cudnn_attention", cudnn);
  m.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward);
  m.impl("_flash_attention_forward", flash_forward);
  m.impl("_flash_attention_backward", flash_gradients);
}
}  // namespace
