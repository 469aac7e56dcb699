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

// Packed sequences: q [tokens, heads, width], their bounds in cum_seq; causal counts from the last key.
struct Packed {
  Tensor q_bounds, k_bounds;
  int64_t count;

  Packed(const MaybeTensor& q, const MaybeTensor& k) {
    TORCH_CHECK(q && q->defined() && k && k->defined(), "fakecuda: _flash_attention_forward without cum_seq");
    q_bounds = q->to(at::kLong), k_bounds = k->to(at::kLong), count = q->numel() - 1;
  }
  static Tensor rows(const Tensor& tensor, const Tensor& bounds, int64_t i) {
    const int64_t from = bounds[i].item<int64_t>();
    return tensor.narrow(0, from, bounds[i + 1].item<int64_t>() - from);
  }
  Tensor queries(const Tensor& tensor, int64_t i) const { return rows(tensor, q_bounds, i); }
  Tensor keys(const Tensor& tensor, int64_t i) const { return rows(tensor, k_bounds, i); }
  Tensor queries_by_head(const Tensor& tensor, int64_t i) const { return queries(tensor, i).transpose(0, 1); }
  Tensor keys_by_head(const Tensor& tensor, int64_t i) const { return keys(tensor, i).transpose(0, 1); }
  Sight sight(bool causal, const optional<SymInt>& left, const optional<SymInt>& right, int64_t i) const {
    auto length = [&](const Tensor& bounds) { return (bounds[i + 1] - bounds[i]).item<int64_t>(); };
    Sight sight = Sight::causal(causal, length(k_bounds) - length(q_bounds));
    if (left) sight.left = left->expect_int();
    if (right && !causal) sight.right = right->expect_int();
    return sight;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_flash(
    const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& cum_q, const MaybeTensor& cum_k, SymInt,
    SymInt, double dropout, bool causal, bool, optional<double> scale, optional<SymInt> left, optional<SymInt> right,
    const MaybeTensor& used, const MaybeTensor& slopes, const MaybeTensor& pages, optional<int64_t>) {
  refuse_dropout(dropout);
  TORCH_CHECK(!used && !slopes && !pages, "fakecuda: _flash_attention_forward with pages or slopes");
  const Packed packed(cum_q, cum_k);
  auto out = at::zeros_like(q);
  auto lse = at::zeros({q.size(1), q.size(0)}, at::kFloat);
  for (int64_t i = 0; i < packed.count; i++) {
    auto [part, part_lse] = fake::attention(
        packed.queries_by_head(q, i), packed.keys_by_head(k, i), packed.keys_by_head(v, i), {},
        fake::scale_or_default(scale, q), packed.sight(causal, left, right, i));
    packed.queries_by_head(out, i).copy_(part);
    packed.queries(lse.t(), i).copy_(part_lse.t());
  }
  return {out, lse, at::zeros({2}, at::kUInt64), at::zeros({}, at::kUInt64), at::empty({0}, q.options())};
}

std::tuple<Tensor, Tensor, Tensor> packed_flash_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, const Tensor& out, const Tensor& lse,
                                                         const Tensor& cum_q, const Tensor& cum_k, SymInt, SymInt,
                                                         double dropout, bool causal, const Tensor&, const Tensor&,
                                                         optional<double> scale, optional<SymInt> left,
                                                         optional<SymInt> right) {
  refuse_dropout(dropout);
  const Packed packed(cum_q, cum_k);
  auto dq = at::zeros_like(q), dk = at::zeros_like(k), dv = at::zeros_like(v);
  for (int64_t i = 0; i < packed.count; i++) {
    auto [gq, gk, gv, _] = fake::attention_backward(
        packed.queries_by_head(grad, i), packed.queries_by_head(q, i), packed.keys_by_head(k, i),
        packed.keys_by_head(v, i), {}, packed.queries_by_head(out, i), packed.queries(lse.t(), i).t(),
        fake::scale_or_default(scale, q), packed.sight(causal, left, right, i));
    packed.queries_by_head(dq, i).copy_(gq);
    packed.keys_by_head(dk, i).copy_(gk);
    packed.keys_by_head(dv, i).copy_(gv);
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
  m.impl("_flash_attention_forward", packed_flash);
  m.impl("_flash_attention_backward", packed_flash_backward);
}
}  // namespace
