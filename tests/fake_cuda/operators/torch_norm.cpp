// The backward of torch's fused RMSNorm: the CPU computes it from parts and has no operator of that name.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <numeric>

namespace {
using at::Tensor;

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& input, c10::IntArrayRef shape,
                                             const Tensor& rstd, const std::optional<Tensor>& weight,
                                             std::array<bool, 2>) {
  std::vector<int64_t> normalized(shape.size());
  std::iota(normalized.begin(), normalized.end(), input.dim() - static_cast<int64_t>(shape.size()));
  const auto dims = input.sizes().slice(0, input.dim() - shape.size()).vec();
  std::vector<int64_t> per_row = dims;
  per_row.resize(input.dim(), 1);

  auto x_hat = input.to(at::kFloat) * rstd.to(at::kFloat).reshape(per_row);
  auto g = grad.to(at::kFloat);
  auto scaled = weight ? g * weight->to(at::kFloat) : g;
  auto grad_input = rstd.to(at::kFloat).reshape(per_row) * (scaled - x_hat * (scaled * x_hat).mean(normalized, true));
  Tensor grad_weight;
  if (weight) grad_weight = at::sum_to(g * x_hat, weight->sizes()).to(weight->scalar_type());
  return {grad_input.to(input.scalar_type()), grad_weight};
}

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_fused_rms_norm_backward", rms_norm_backward); }
}  // namespace
