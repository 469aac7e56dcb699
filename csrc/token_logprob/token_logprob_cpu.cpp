// Per-token softmax statistics and their gradient on CPUs. See csrc/bindings.cpp for the schemas.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "common/check.h"
#include "common/logit_rows.h"
#include "common/vec_exp.h"

namespace megarl {
namespace {

constexpr int64_t kNumStats = 4;

// The arguments that every row needs, checked once.
template <typename scalar_t>
struct Rows {
  using acc = acc_t<scalar_t>;

  scalar_t* logits;
  int64_t stride;
  int64_t columns;
  const int64_t* targets;
  int64_t vocab_start;
  const float* temperature;
  bool one_temperature;
  const int64_t* row_index;
  const acc* min_logit;

  scalar_t* row(int64_t i) const { return logits + (row_index ? row_index[i] : i) * stride; }
  acc inverse_temperature(int64_t i) const {
    return acc(1) / static_cast<acc>(temperature[one_temperature ? 0 : i]);
  }
  std::optional<acc> minimum(int64_t i) const {
    return min_logit ? std::optional<acc>(min_logit[i]) : std::nullopt;
  }
  // Column of the target in this shard, or -1.
  int64_t target_column(int64_t i) const {
    const int64_t column = targets[i] - vocab_start;
    return column >= 0 && column < columns ? column : -1;
  }
};

int64_t check_arguments(const char* op, const at::Tensor& logits, const at::Tensor& targets,
                        const at::Tensor& temperature, const std::optional<at::Tensor>& row_index,
                        const std::optional<at::Tensor>& min_logit) {
  check_logits(op, "logits", logits);
  const int64_t rows = row_index ? row_index->numel() : logits.size(0);
  check_vector(op, "targets", targets, rows, at::kLong);
  const int64_t num_temperatures = temperature.dim() == 1 && temperature.size(0) == 1 ? 1 : rows;
  check_vector(op, "temperature", temperature, num_temperatures, at::kFloat);
  MEGARL_CHECK(op, targets.is_contiguous(), "targets must be contiguous, got strides ", targets.strides());
  MEGARL_CHECK(op, temperature.is_contiguous(), "temperature must be contiguous, got strides ",
               temperature.strides());
  const float* values = temperature.const_data_ptr<float>();
  for (int64_t i = 0; i < num_temperatures; ++i) {
    MEGARL_CHECK(op, values[i] > 0 && std::isfinite(values[i]), "temperature[", i,
                 "] must be positive and finite, got ", values[i]);
  }
  if (row_index) {
    check_vector(op, "row_index", *row_index, rows, at::kLong);
    MEGARL_CHECK(op, row_index->is_contiguous(), "row_index must be contiguous");
    const int64_t* index = row_index->const_data_ptr<int64_t>();
    std::vector<bool> seen(logits.size(0));
    for (int64_t i = 0; i < rows; ++i) {
      MEGARL_CHECK(op, index[i] >= 0 && index[i] < logits.size(0), "row_index[", i, "] = ", index[i],
                   " is outside the ", logits.size(0), " rows of logits");
      MEGARL_CHECK(op, !seen[index[i]], "row_index[", i, "] = ", index[i], " appears twice");
      seen[index[i]] = true;
    }
  }
  if (min_logit) {
    check_vector(op, "min_logit", *min_logit, rows, stats_dtype(logits.scalar_type()));
    MEGARL_CHECK(op, min_logit->is_contiguous(), "min_logit must be contiguous");
  }
  return rows;
}

template <typename scalar_t>
Rows<scalar_t> rows_of(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                       int64_t vocab_start, const std::optional<at::Tensor>& row_index,
                       const std::optional<at::Tensor>& min_logit) {
  using acc = acc_t<scalar_t>;
  return {
      .logits = static_cast<scalar_t*>(const_cast<void*>(logits.const_data_ptr())),
      .stride = logits.stride(0),
      .columns = logits.size(1),
      .targets = targets.const_data_ptr<int64_t>(),
      .vocab_start = vocab_start,
      .temperature = temperature.const_data_ptr<float>(),
      .one_temperature = temperature.numel() == 1,
      .row_index = row_index ? row_index->const_data_ptr<int64_t>() : nullptr,
      .min_logit = min_logit ? min_logit->const_data_ptr<acc>() : nullptr,
  };
}

template <typename acc>
acc block_max(const acc* block, int64_t n) {
  using Vec = Vectorized<acc>;
  constexpr int64_t size = Vec::size();
  Vec maximum[4] = {Vec::loadu(block), Vec::loadu(block), Vec::loadu(block), Vec::loadu(block)};
  int64_t i = 0;
  for (; i + 4 * size <= n; i += 4 * size) {
    for (int k = 0; k < 4; ++k) maximum[k] = fast_max(maximum[k], Vec::loadu(block + i + k * size));
  }
  for (; i < n; i += size) maximum[0] = fast_max(maximum[0], Vec::loadu(block + i));
  const Vec both = fast_max(fast_max(maximum[0], maximum[1]), fast_max(maximum[2], maximum[3]));
  return at::vec::vec_reduce_all<acc>([](Vec a, Vec b) { return fast_max(a, b); }, both);
}

// Adds sum of exp(d) and of d * exp(d) over a block, d = (x - shift) / temperature; returns its maximum.
// The shift is passed as offset = shift * factor, so that d takes one instruction.
template <typename acc>
acc block_sums(const acc* block, int64_t n, acc offset, const ShiftedExp<acc>& shifted_exp, double* sum,
               double* weighted) {
  using Vec = Vectorized<acc>;
  constexpr int64_t size = Vec::size();
  constexpr int kChains = 2;  // independent sums, so that additions do not wait for one another
  const Vec factors(shifted_exp.factor), offsets(-offset), smallest(ShiftedExp<acc>::kSmallest);
  const Vec first = Vec::loadu(block);
  Vec maxima[kChains] = {first, first};
  Vec sums[kChains] = {Vec(0), Vec(0)}, weights[kChains] = {Vec(0), Vec(0)};
  auto add = [&](int k, const acc* x) {
    const Vec value = Vec::loadu(x);
    maxima[k] = fast_max(maxima[k], value);
    const Vec y = fast_max(smallest, at::vec::fmadd(value, factors, offsets));
    const Vec e = shifted_exp.power(y);
    sums[k] = sums[k] + e;
    weights[k] = at::vec::fmadd(y, e, weights[k]);
  };
  int64_t i = 0;
  for (; i + kChains * size <= n; i += kChains * size) {
    // The hardware's prefetchers stop at page boundaries, which is where a block ends.
    constexpr int64_t line = 64 / sizeof(acc);
    for (int64_t k = 0; k < kChains * size; k += line) __builtin_prefetch(block + i + k + kBlock);
    for (int k = 0; k < kChains; ++k) add(k, block + i + k * size);
  }
  for (; i < n; i += size) add(0, block + i);
  auto plus = [](Vec a, Vec b) { return a + b; };
  *sum += at::vec::vec_reduce_all<acc>(plus, sums[0] + sums[1]);
  *weighted += static_cast<double>(at::vec::vec_reduce_all<acc>(plus, weights[0] + weights[1])) *
               ShiftedExp<acc>::kNatural;
  return at::vec::vec_reduce_all<acc>([](Vec a, Vec b) { return fast_max(a, b); },
                                      fast_max(maxima[0], maxima[1]));
}

template <typename scalar_t>
void row_stats(const Rows<scalar_t>& rows, int64_t i, acc_t<scalar_t>* stats) {
  using acc = acc_t<scalar_t>;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  alignas(64) acc buffer[kBlock];
  const scalar_t* row = rows.row(i);
  const std::optional<acc> minimum = rows.minimum(i);
  const int64_t target_column = rows.target_column(i);
  const acc target = target_column < 0 ? lowest : static_cast<acc>(row[target_column]);
  const ShiftedExp<acc> shifted_exp(rows.inverse_temperature(i));

  // Any shift near the maximum works, so one pass over memory is enough: the first block's maximum is used until a
  // block exceeds it by so much that float sums would lose digits or overflow. That block is then summed again
  // from the cache.
  constexpr acc kSlack = 16;
  double shift = lowest;
  acc maximum = lowest;
  double sum = 0, weighted = 0;
  auto move_shift = [&](double to) {
    if (shift != lowest) {
      const double d = (shift - to) * shifted_exp.scale;
      weighted = std::exp(d) * (weighted + d * sum);
      sum *= std::exp(d);
    }
    shift = to;
  };
  // The vector code uses the rounded product of shift and factor: the actual shift is that over the factor.
  acc offset = 0;
  auto move_offset = [&](acc to) {
    offset = to * shifted_exp.factor;
    move_shift(static_cast<double>(offset) / shifted_exp.factor);
  };
  for (int64_t begin = 0; begin < rows.columns; begin += kBlock) {
    const int64_t n = std::min(kBlock, rows.columns - begin), end = padded<acc>(n);
    const acc* block = load_block<scalar_t>(row + begin, n, minimum, buffer);
    if (shift == lowest) {
      const acc first = block_max(block, end);
      if (first > lowest) move_offset(first);
    }
    double block_sum = 0, block_weighted = 0;
    const acc largest = block_sums(block, end, offset, shifted_exp, &block_sum, &block_weighted);
    maximum = std::max(maximum, largest);
    if (shift != lowest && (largest - shift) * shifted_exp.scale > kSlack) {
      move_offset(largest);
      block_sum = block_weighted = 0;
      block_sums(block, end, offset, shifted_exp, &block_sum, &block_weighted);
    }
    sum += block_sum;
    weighted += block_weighted;
  }
  if (minimum && lowest < target && target < *minimum) {  // in this shard, and sampled: part of the support
    maximum = std::max(maximum, target);
    if (shift == lowest || target > shift) move_shift(target);
    const double d = (target - shift) * shifted_exp.scale;
    sum += std::exp(d);
    weighted += d * std::exp(d);
  }
  move_shift(maximum);
  stats[0] = maximum;
  stats[1] = static_cast<acc>(sum);
  stats[2] = target;
  stats[3] = static_cast<acc>(weighted);
}

at::Tensor token_logprob_cpu(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                             int64_t vocab_start, const std::optional<at::Tensor>& row_index,
                             const std::optional<at::Tensor>& min_logit, bool /*inplace_backward*/) {
  const int64_t num_rows = check_arguments("token_logprob", logits, targets, temperature, row_index, min_logit);
  at::Tensor stats = at::empty({num_rows, kNumStats}, logits.options().dtype(stats_dtype(logits.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "token_logprob", [&] {
    const auto rows = rows_of<scalar_t>(logits, targets, temperature, vocab_start, row_index, min_logit);
    auto* out = stats.mutable_data_ptr<acc_t<scalar_t>>();
    for_rows(num_rows, rows.columns, [&](int64_t i) { row_stats(rows, i, out + i * kNumStats); });
  });
  return stats;
}

// d(stats)/dx_j with the maximum held fixed: e_j (g_sum + g_weighted (1 + d_j)) / temperature, and
// g_target at the target.
template <typename scalar_t>
void row_gradient(const Rows<scalar_t>& rows, int64_t i, acc_t<scalar_t> maximum, const acc_t<scalar_t>* grad) {
  using acc = acc_t<scalar_t>;
  using Vec = Vectorized<acc>;
  alignas(64) acc buffer[kBlock];
  alignas(64) acc result[kBlock];
  scalar_t* row = rows.row(i);
  const std::optional<acc> minimum = rows.minimum(i);
  const ShiftedExp<acc> shifted_exp(rows.inverse_temperature(i));
  const acc scale = shifted_exp.scale;
  const acc constant = (grad[1] + grad[3]) * scale;
  const acc slope = grad[3] * scale * scale;
  const int64_t target_column = rows.target_column(i);
  const acc target = target_column < 0 ? acc(0) : static_cast<acc>(row[target_column]);

  // A shard whose logits are all -inf contributes nothing: any finite shift gives exponentials of 0.
  const acc finite_max = maximum == -std::numeric_limits<acc>::infinity() ? acc(0) : maximum;
  const Vec shift(finite_max), clamp(shifted_exp.clamp), constants(constant), slopes(slope);
  for (int64_t begin = 0; begin < rows.columns; begin += kBlock) {
    const int64_t n = std::min(kBlock, rows.columns - begin);
    const acc* block = load_block<scalar_t>(row + begin, n, minimum, buffer);
    acc* out = result;
    if constexpr (std::is_same_v<scalar_t, acc>) {
      if (block != buffer) out = row + begin;
    }
    for (int64_t k = 0; k < padded<acc>(n); k += Vec::size()) {
      const Vec d = fast_max(clamp, Vec::loadu(block + k) - shift);
      (shifted_exp(d) * at::vec::fmadd(d, slopes, constants)).store(out + k);
    }
    if (out == result) store_block<scalar_t>(result, row + begin, n);
  }
  if (target_column >= 0) {
    acc gradient = grad[2];
    const acc d = target - finite_max;
    if (d * scale > acc(-100)) gradient += std::exp(d * scale) * (constant + slope * d);
    row[target_column] = static_cast<scalar_t>(gradient);
  }
}

void token_logprob_backward_cpu(at::Tensor& logits, const at::Tensor& targets, const at::Tensor& temperature,
                                int64_t vocab_start, const std::optional<at::Tensor>& row_index,
                                const std::optional<at::Tensor>& min_logit, const at::Tensor& row_max,
                                const at::Tensor& grad_stats) {
  constexpr const char* op = "token_logprob_backward_";
  const int64_t num_rows = check_arguments(op, logits, targets, temperature, row_index, min_logit);
  MEGARL_CHECK(op, logits.size(0) < 2 || logits.stride(0) >= logits.size(1),
               "logits whose rows overlap cannot be overwritten, got strides ", logits.strides());
  check_vector(op, "row_max", row_max, num_rows, stats_dtype(logits.scalar_type()));
  MEGARL_CHECK(op, grad_stats.dim() == 2 && grad_stats.size(0) == num_rows && grad_stats.size(1) == kNumStats,
               "grad_stats must have shape [", num_rows, ", ", kNumStats, "], got ", grad_stats.sizes());
  MEGARL_CHECK(op, grad_stats.scalar_type() == row_max.scalar_type(), "grad_stats must be ",
               row_max.scalar_type(), ", got ", grad_stats.scalar_type());
  const at::Tensor grads = grad_stats.contiguous(), maxima = row_max.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), op, [&] {
    using acc = acc_t<scalar_t>;
    const auto rows = rows_of<scalar_t>(logits, targets, temperature, vocab_start, row_index, min_logit);
    const acc* maximum = maxima.const_data_ptr<acc>();
    const acc* grad = grads.const_data_ptr<acc>();
    for_rows(num_rows, rows.columns,
             [&](int64_t i) { row_gradient(rows, i, maximum[i], grad + i * kNumStats); });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CPU, m) {
  m.impl("token_logprob", &token_logprob_cpu);
  m.impl("token_logprob_backward_", &token_logprob_backward_cpu);
}

}  // namespace megarl
