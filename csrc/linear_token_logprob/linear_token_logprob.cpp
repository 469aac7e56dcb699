// token_logprob of a head's output, one tile of logits at a time: the GEMMs are ATen's, the statistics come from
// the token_logprob ops of the tensors' device. See csrc/bindings.cpp.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/head_tiles.h"
#include "common/softmax_merge.h"

namespace megarl {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor stats_of(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                    int64_t vocab_start, const OptionalTensor& min_logit) {
  using Op = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, const OptionalTensor&,
                        const OptionalTensor&, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("megarl::token_logprob", "").typed<Op>();
  return op.call(logits, targets, temperature, vocab_start, std::nullopt, min_logit, true);
}

void logits_to_gradient_(at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                         int64_t vocab_start, const OptionalTensor& min_logit, const at::Tensor& row_max,
                         const at::Tensor& grad_stats) {
  using Op = void(at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, const OptionalTensor&,
                  const OptionalTensor&, const at::Tensor&, const at::Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("megarl::token_logprob_backward_", "").typed<Op>();
  op.call(logits, targets, temperature, vocab_start, std::nullopt, min_logit, row_max, grad_stats);
}

// temperature and min_logit of a block of rows; one temperature serves all rows.
at::Tensor block_of(const at::Tensor& per_row, int64_t row, int64_t n, int64_t num_rows) {
  return per_row.size(0) == 1 && num_rows != 1 ? per_row : per_row.narrow(0, row, n);
}

OptionalTensor block_of(const OptionalTensor& per_row, int64_t row, int64_t n) {
  return per_row ? OptionalTensor(per_row->narrow(0, row, n)) : std::nullopt;
}

void check_rows(const char* op, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                const at::Tensor& temperature, const OptionalTensor& min_logit) {
  check_head(op, hidden, weight);
  const int64_t rows = hidden.size(0);
  check_vector(op, "targets", targets, rows, at::kLong);
  check_vector(op, "temperature", temperature, temperature.numel() == 1 ? 1 : rows, at::kFloat);
  if (min_logit) check_vector(op, "min_logit", *min_logit, rows, min_logit->scalar_type());
}

at::Tensor linear_token_logprob(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                const at::Tensor& temperature, int64_t vocab_start,
                                const OptionalTensor& min_logit, int64_t max_extra_bytes) {
  constexpr const char* op = "linear_token_logprob";
  check_rows(op, hidden, weight, targets, temperature, min_logit);
  const int64_t num_rows = hidden.size(0);
  const HeadTiles tiles(op, hidden, weight, max_extra_bytes);
  const auto dtype = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor stats = at::empty({num_rows, 4}, hidden.options().dtype(dtype));
  at::Tensor parts = at::empty({tiles.tiles_per_row(), tiles.rows, 4}, stats.options());
  Head head(hidden, weight, tiles);
  tiles.for_each([&](int64_t row, int64_t n, int64_t column, int64_t c) {
    const at::Tensor heat = block_of(temperature, row, n, num_rows);
    const at::Tensor part = stats_of(head.logits(row, n, column, c), targets.narrow(0, row, n), heat,
                                     vocab_start + column, block_of(min_logit, row, n));
    const at::Tensor block = parts.narrow(1, 0, n);
    block.select(0, column / tiles.columns).copy_(part);
    if (column + c == tiles.num_columns) stats.narrow(0, row, n).copy_(merge_stats(block, heat));
  });
  return stats;
}

std::tuple<at::Tensor, at::Tensor> linear_token_logprob_backward(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets, const at::Tensor& temperature,
    int64_t vocab_start, const OptionalTensor& min_logit, const at::Tensor& row_max, const at::Tensor& grad_stats,
    int64_t max_extra_bytes, bool need_hidden, bool need_weight) {
  constexpr const char* op = "linear_token_logprob_backward";
  check_rows(op, hidden, weight, targets, temperature, min_logit);
  const int64_t num_rows = hidden.size(0);
  const HeadTiles tiles(op, hidden, weight, max_extra_bytes);
  Head head(hidden, weight, tiles);
  HeadGradient gradient(hidden, weight, tiles, need_hidden, need_weight);
  tiles.for_each([&](int64_t row, int64_t n, int64_t column, int64_t c) {
    at::Tensor tile = head.logits(row, n, column, c);
    logits_to_gradient_(tile, targets.narrow(0, row, n), block_of(temperature, row, n, num_rows),
                        vocab_start + column, block_of(min_logit, row, n), row_max.narrow(0, row, n),
                        grad_stats.narrow(0, row, n));
    gradient.add(tile, row, column);
  });
  return gradient.take();
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CompositeExplicitAutograd, m) {
  m.impl("linear_token_logprob", &linear_token_logprob);
  m.impl("linear_token_logprob_backward", &linear_token_logprob_backward);
}

}  // namespace megarl
