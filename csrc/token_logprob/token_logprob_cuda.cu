// Launchers of token_logprob on CUDA. See csrc/bindings.cpp for the schemas, token_logprob_kernels.cuh for the kernels.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/cuda_launch.h"
#include "token_logprob/token_logprob_kernels.cuh"

namespace megarl {
namespace {

namespace kernels = token_logprob;

at::ScalarType stats_dtype(const at::Tensor& logits) { return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Returns R. Values on the device are checked by the kernels (row_index) or by the caller (targets, temperature).
int64_t check_arguments(const char* op, const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& temperature, const std::optional<at::Tensor>& row_index,
                        const std::optional<at::Tensor>& min_logit) {
  check_logits(op, "logits", logits);
  MEGARL_CHECK(op, logits.size(1) <= INT_MAX / 2, "logits has ", logits.size(1), " columns, more than ", INT_MAX / 2);
  const int64_t rows = row_index ? row_index->numel() : logits.size(0);
  check_input(op, "targets", targets, rows, at::kLong, logits);
  const bool one_temperature = temperature.dim() == 1 && temperature.size(0) == 1;
  check_input(op, "temperature", temperature, one_temperature ? 1 : rows, at::kFloat, logits);
  if (row_index) check_input(op, "row_index", *row_index, rows, at::kLong, logits);
  if (min_logit) check_input(op, "min_logit", *min_logit, rows, stats_dtype(logits), logits);
  return rows;
}

template <class T>
kernels::Rows<T> rows_of(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                         int64_t vocab_start, const std::optional<at::Tensor>& row_index,
                         const std::optional<at::Tensor>& min_logit) {
  return {
      .logits = static_cast<T*>(const_cast<void*>(logits.const_data_ptr())),
      .stride = logits.stride(0),
      .num_logits = logits.size(0),
      .columns = static_cast<int>(logits.size(1)),
      .num_rows = targets.numel(),
      .targets = targets.const_data_ptr<int64_t>(),
      .vocab_start = vocab_start,
      .temperature = temperature.const_data_ptr<float>(),
      .one_temperature = temperature.numel() == 1,
      .row_index = data_or_null<int64_t>(row_index),
      .min_logit = data_or_null<acc_t<T>>(min_logit),
  };
}

at::Tensor token_logprob_cuda(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                              int64_t vocab_start, const std::optional<at::Tensor>& row_index,
                              const std::optional<at::Tensor>& min_logit, bool /*inplace_backward*/) {
  constexpr const char* op = "token_logprob";
  const int64_t rows = check_arguments(op, logits, targets, temperature, row_index, min_logit);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(stats_dtype(logits));
  at::Tensor stats = at::empty({rows, kernels::kNumStats}, options);
  if (rows == 0) return stats;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch_floating(op, "logits", logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Sums = SoftmaxSums<acc_t<T>>;
    const auto arguments = rows_of<T>(logits, targets, temperature, vocab_start, row_index, min_logit);
    const RowGrid grid = row_grid(logits, rows, kernels::kForwardBlocksPerSm<T>, kernels::kThreads * kThreadElements<T>);
    at::Tensor partial = at::empty({grid.num_splits > 1 ? rows * grid.num_splits * 3 : 0}, options);
    auto* sums = static_cast<Sums*>(partial.data_ptr());
    auto* out = stats.mutable_data_ptr<acc_t<T>>();
    dispatch_bool(min_logit.has_value(), [&](auto masked) {
      kernels::forward<T, decltype(masked)::value>
          <<<grid.blocks, kernels::kThreads, 0, stream>>>(arguments, grid.num_splits, out, sums);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (grid.num_splits > 1) {
      kernels::combine_splits<T><<<blocks_for(rows, kernels::kThreads), kernels::kThreads, 0, stream>>>(
          arguments, grid.num_splits, sums, out);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return stats;
}

void token_logprob_backward_cuda(at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                                 int64_t vocab_start, const std::optional<at::Tensor>& row_index,
                                 const std::optional<at::Tensor>& min_logit, const at::Tensor& row_max,
                                 const at::Tensor& grad_stats) {
  constexpr const char* op = "token_logprob_backward_";
  const int64_t rows = check_arguments(op, logits, targets, temperature, row_index, min_logit);
  check_writable(op, "logits", logits);
  check_vector(op, "row_max", row_max, rows, stats_dtype(logits));
  MEGARL_CHECK(op, grad_stats.dim() == 2 && grad_stats.size(0) == rows && grad_stats.size(1) == kernels::kNumStats,
               "grad_stats must have shape [", rows, ", ", kernels::kNumStats, "], got ", grad_stats.sizes());
  MEGARL_CHECK(op, grad_stats.scalar_type() == row_max.scalar_type(), "grad_stats must be ", row_max.scalar_type(),
               ", got ", grad_stats.scalar_type());
  check_device(op, "row_max", row_max, logits);
  check_device(op, "grad_stats", grad_stats, logits);
  if (rows == 0) return;
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor grads = grad_stats.contiguous(), maxima = row_max.contiguous();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch_floating(op, "logits", logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto arguments = rows_of<T>(logits, targets, temperature, vocab_start, row_index, min_logit);
    const RowGrid grid = row_grid(logits, rows, kernels::kBackwardBlocksPerSm<T>, kernels::kThreads * kThreadElements<T>);
    dispatch_bool(min_logit.has_value(), [&](auto masked) {
      kernels::backward<T, decltype(masked)::value><<<grid.blocks, kernels::kThreads, 0, stream>>>(
          arguments, grid.num_splits, maxima.const_data_ptr<acc_t<T>>(), grads.const_data_ptr<acc_t<T>>());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CUDA, m) {
  m.impl("token_logprob", &token_logprob_cuda);
  m.impl("token_logprob_backward_", &token_logprob_backward_cuda);
}

}  // namespace megarl
