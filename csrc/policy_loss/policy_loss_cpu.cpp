// Policy loss, its gradient and its logged sums on CPUs. See csrc/bindings.cpp for the schemas.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <type_traits>
#include <vector>

#include "policy_loss/policy_options.h"

namespace megarl {

// A vector of tokens; conditions are masks.
template <typename T>
struct Lanes<at::vec::Vectorized<T>> {
  using scalar = T;
  using Vec = at::vec::Vectorized<T>;
  static Vec exp(Vec x) { return x.exp(); }
  static Vec expm1(Vec x) {
    if constexpr (std::is_same_v<T, double>) return x.expm1();
    // Six times as fast as at::vec's: exp(x) - 1, and where that cancels, |x| < 1/2, the series, whose first
    // term left out is 1e-8 of x.
    Vec series(T(1.0 / 40320));
    for (const double c : {1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2, 1.0}) {
      series = at::vec::fmadd(series, x, Vec(T(c)));
    }
    return where(x.abs() < Vec(T(0.5)), series * x, x.exp() - Vec(T(1)));
  }
  static Vec abs(Vec x) { return x.abs(); }
  static Vec where(Vec condition, Vec yes, Vec no) { return Vec::blendv(no, yes, condition); }
};

namespace {

using at::vec::Vectorized;

// Tokens that one thread sums in order. Fixed, so that the result does not depend on the number of threads.
constexpr int64_t kChunk = 512;

using Sums = std::array<double, kNumPolicySums>;

// Tokens, one vector at a time. Those of weight 0, and lanes after the last token, read as zeros.
template <typename T>
class TokenVectors {
 public:
  using Vec = Vectorized<T>;
  static constexpr int kSize = Vec::size();

  TokenVectors(const PolicyTokens<T>& tokens, int64_t num_sequences) : tokens_(tokens) {
    for (int64_t s = 0; tokens.sequence_sums && s < num_sequences; ++s) {
      log_ratio_.push_back(tokens.sequence_log_ratio(s));
      log_off_policy_.push_back(tokens.sequence_log_off_policy(s));
    }
  }

  // Tokens [i, i + n), n <= kSize; `mask` selects those with weight.
  PolicyToken<Vec> load(int64_t i, int n, Vec* mask) const {
    const Vec zero(T(0)), weight = Vec::loadu(tokens_.weights + i, n);
    *mask = weight != zero;
    auto take = [&](const T* values) {
      return values ? Vec::blendv(zero, Vec::loadu(values + i, n), *mask) : zero;
    };
    PolicyToken<Vec> token{take(tokens_.logprobs),        take(tokens_.old_logprobs), take(tokens_.advantages),
                           weight,                        take(tokens_.entropy),      take(tokens_.ref_logprobs),
                           take(tokens_.rollout_logprobs), tokens_.rollout_logprobs != nullptr, zero, zero};
    if (tokens_.sequence_sums) {
      T of_ratio[kSize] = {}, of_off_policy[kSize] = {};
      for (int l = 0; l < n; ++l) {
        of_ratio[l] = log_ratio_[tokens_.sequence_ids[i + l]];
        of_off_policy[l] = log_off_policy_[tokens_.sequence_ids[i + l]];
      }
      token.sequence_log_ratio = Vec::blendv(zero, Vec::loadu(of_ratio), *mask);
      token.sequence_log_off_policy = Vec::blendv(zero, Vec::loadu(of_off_policy), *mask);
    }
    return token;
  }

 private:
  PolicyTokens<T> tokens_;
  std::vector<T> log_ratio_, log_off_policy_;  // of each sequence
};

// Sums of tokens [begin, end): each lane of the vectors has its own, added up in order at the end.
template <typename T>
Sums sum_tokens(const TokenVectors<T>& tokens, const PolicyOptions& options, int64_t begin, int64_t end) {
  using Vec = Vectorized<T>;
  constexpr int kSize = TokenVectors<T>::kSize, kTerms = sizeof(PolicyTerms<T>) / sizeof(T);
  double lanes[kNumPolicySums * kSize] = {};
  for (int64_t i = begin; i < end; i += kSize) {
    Vec mask;
    const PolicyToken<Vec> token = tokens.load(i, static_cast<int>(std::min<int64_t>(kSize, end - i)), &mask);
    const PolicyTerms<Vec> terms = policy_terms(token, options);
    T of_term[kTerms][kSize], weight[kSize], entropy[kSize];
    for (int k = 0; k < kTerms; ++k) {
      Vec::blendv(Vec(T(0)), reinterpret_cast<const Vec*>(&terms)[k], mask).store(of_term[k]);
    }
    token.weight.store(weight);
    token.entropy.store(entropy);
#pragma GCC ivdep
    for (int l = 0; l < kSize; ++l) {
      PolicyTerms<T> lane;
      for (int k = 0; k < kTerms; ++k) reinterpret_cast<T*>(&lane)[k] = of_term[k][l];
      add_policy_terms<kSize>(lane, double(weight[l]), double(entropy[l]), options, lanes + l);
    }
  }
  Sums sums{};
  for (int k = 0; k < kNumPolicySums; ++k) {
    for (int l = 0; l < kSize; ++l) {
      const double value = lanes[k * kSize + l];
      sums[k] = k == kRolloutMaxError ? larger_or_nan(sums[k], value) : sums[k] + value;
    }
  }
  return sums;
}

void check_sequence_ids(const char* op, const at::Tensor& sequence_ids, int64_t num_sequences) {
  const int64_t* ids = sequence_ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < sequence_ids.numel(); ++i) {
    MEGARL_CHECK(op, ids[i] >= 0 && ids[i] < num_sequences, "sequence_ids[", i, "] = ", ids[i],
                 " is outside the ", num_sequences, " sequences");
    MEGARL_CHECK(op, i == 0 || ids[i - 1] <= ids[i], "sequence_ids must ascend; sequence_ids[", i, "] = ", ids[i],
                 " follows ", ids[i - 1]);
  }
}

at::Tensor policy_sequence_sums_cpu(const at::Tensor& logprobs, const at::Tensor& old_logprobs,
                                    const OptionalTensor& rollout_logprobs, const at::Tensor& weights,
                                    const at::Tensor& sequence_ids, int64_t num_sequences) {
  constexpr const char* op = "policy_sequence_sums";
  const PolicyOptions options{};
  const PolicyArguments arguments(op, options, logprobs, std::nullopt, old_logprobs, weights, weights, std::nullopt,
                                  rollout_logprobs, sequence_ids, std::nullopt);
  check_sequence_ids(op, arguments.sequence_ids, num_sequences);
  at::Tensor sums = at::zeros({num_sequences, 3}, logprobs.options().dtype(at::kDouble));
  const int64_t* ids = arguments.sequence_ids.const_data_ptr<int64_t>();
  double* out = sums.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), op, [&] {
    const auto tokens = arguments.tokens<scalar_t>();
    for (int64_t i = 0; i < logprobs.size(0); ++i) {
      const auto token = tokens.load(i);
      if (token.weight == 0) continue;
      double* of_sequence = out + 3 * ids[i];
      of_sequence[0] += token.logprob - token.old_logprob;
      of_sequence[1] += token.has_rollout ? token.old_logprob - token.rollout_logprob : 0;
      of_sequence[2] += 1;
    }
  });
  return sums;
}

at::Tensor policy_loss_cpu(const at::Tensor& logprobs, const OptionalTensor& entropy,
                           const at::Tensor& old_logprobs, const at::Tensor& advantages, const at::Tensor& weights,
                           const OptionalTensor& ref_logprobs, const OptionalTensor& rollout_logprobs,
                           const OptionalTensor& sequence_ids, const OptionalTensor& sequence_sums,
                           std::string_view objective, std::string_view level, std::string_view correction,
                           std::string_view sequence_weight, std::string_view kl, std::string_view kl_gradient,
                           at::ArrayRef<double> numbers) {
  constexpr const char* op = "policy_loss";
  const PolicyOptions options =
      policy_options(op, objective, level, correction, sequence_weight, kl, kl_gradient, numbers);
  const PolicyArguments arguments(op, options, logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs,
                                  rollout_logprobs, sequence_ids, sequence_sums);
  const int64_t num_sequences = arguments.sequence_sums.defined() ? arguments.sequence_sums.size(0) : 0;
  if (arguments.sequence_sums.defined()) check_sequence_ids(op, arguments.sequence_ids, num_sequences);
  const int64_t num_tokens = logprobs.size(0);
  const int64_t num_chunks = (num_tokens + kChunk - 1) / kChunk;
  std::vector<Sums> partial(num_chunks, Sums{});
  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), op, [&] {
    const TokenVectors<scalar_t> tokens(arguments.tokens<scalar_t>(), num_sequences);
    at::parallel_for(0, num_chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        partial[chunk] = sum_tokens(tokens, options, chunk * kChunk, std::min(num_tokens, (chunk + 1) * kChunk));
      }
    });
  });
  at::Tensor sums = at::zeros({kNumPolicySums}, logprobs.options().dtype(at::kDouble));
  double* out = sums.mutable_data_ptr<double>();
  for (const Sums& chunk : partial) {
    for (int k = 0; k < kRolloutMaxError; ++k) out[k] += chunk[k];
    out[kRolloutMaxError] = larger_or_nan(out[kRolloutMaxError], chunk[kRolloutMaxError]);
  }
  return sums;
}

std::tuple<at::Tensor, at::Tensor> policy_loss_backward_cpu(
    const at::Tensor& grad_loss, const at::Tensor& logprobs, const OptionalTensor& entropy,
    const at::Tensor& old_logprobs, const at::Tensor& advantages, const at::Tensor& weights,
    const OptionalTensor& ref_logprobs, const OptionalTensor& rollout_logprobs, const OptionalTensor& sequence_ids,
    const OptionalTensor& sequence_sums, std::string_view objective, std::string_view level,
    std::string_view correction, std::string_view sequence_weight, std::string_view kl, std::string_view kl_gradient,
    at::ArrayRef<double> numbers) {
  constexpr const char* op = "policy_loss_backward";
  const PolicyOptions options =
      policy_options(op, objective, level, correction, sequence_weight, kl, kl_gradient, numbers);
  const PolicyArguments arguments(op, options, logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs,
                                  rollout_logprobs, sequence_ids, sequence_sums);
  const int64_t num_sequences = arguments.sequence_sums.defined() ? arguments.sequence_sums.size(0) : 0;
  if (arguments.sequence_sums.defined()) check_sequence_ids(op, arguments.sequence_ids, num_sequences);
  MEGARL_CHECK(op, grad_loss.numel() == 1, "grad_loss must hold one value, got ", grad_loss.sizes());
  const int64_t num_tokens = logprobs.size(0);
  at::Tensor grad_logprobs = at::empty({num_tokens}, logprobs.options());
  at::Tensor grad_entropy = at::empty({entropy ? num_tokens : 0}, logprobs.options());
  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), op, [&] {
    using Vec = Vectorized<scalar_t>;
    const TokenVectors<scalar_t> tokens(arguments.tokens<scalar_t>(), num_sequences);
    const Vec zero(scalar_t(0)), scale(static_cast<scalar_t>(grad_loss.item<double>()));
    scalar_t* by_logprob = grad_logprobs.mutable_data_ptr<scalar_t>();
    scalar_t* by_entropy = entropy ? grad_entropy.mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, num_tokens, 4 * kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += Vec::size()) {
        const int n = static_cast<int>(std::min<int64_t>(Vec::size(), end - i));
        Vec mask, logprob, of_entropy;
        policy_token_gradient(tokens.load(i, n, &mask), options, &logprob, &of_entropy);
        Vec::blendv(zero, scale * logprob, mask).store(by_logprob + i, n);
        if (by_entropy) Vec::blendv(zero, scale * of_entropy, mask).store(by_entropy + i, n);
      }
    });
  });
  return {grad_logprobs, grad_entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CPU, m) {
  m.impl("policy_sequence_sums", &policy_sequence_sums_cpu);
  m.impl("policy_loss", &policy_loss_cpu);
  m.impl("policy_loss_backward", &policy_loss_backward_cpu);
}

}  // namespace megarl
