// Policy loss, its gradient and its logged sums on CPUs. See csrc/bindings.cpp for the schemas.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "policy_loss/policy_options.h"

namespace megarl {
namespace {

// Tokens whose sums are taken in order by one thread. Fixed, so that the result does not depend on the
// number of threads.
constexpr int64_t kChunk = 512;

using Sums = std::array<double, kNumPolicySums>;

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
                           std::string_view objective, std::string_view level, double clip_low, double clip_high,
                           std::optional<double> dual_clip, std::string_view correction, double correction_low,
                           double correction_high, std::string_view kl, bool kl_score_gradient, double kl_coef,
                           double entropy_coef) {
  constexpr const char* op = "policy_loss";
  const PolicyOptions options =
      policy_options(op, objective, level, clip_low, clip_high, dual_clip, correction, correction_low,
                     correction_high, kl, kl_score_gradient, kl_coef, entropy_coef);
  const PolicyArguments arguments(op, options, logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs,
                                  rollout_logprobs, sequence_ids, sequence_sums);
  if (arguments.sequence_sums.defined()) {
    check_sequence_ids(op, arguments.sequence_ids, arguments.sequence_sums.size(0));
  }
  const int64_t num_tokens = logprobs.size(0);
  const int64_t num_chunks = (num_tokens + kChunk - 1) / kChunk;
  std::vector<Sums> partial(num_chunks, Sums{});
  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), op, [&] {
    const auto tokens = arguments.tokens<scalar_t>();
    at::parallel_for(0, num_chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        for (int64_t i = chunk * kChunk; i < std::min(num_tokens, (chunk + 1) * kChunk); ++i) {
          if (tokens.weights[i] != 0) add_policy_token(tokens.load(i), options, partial[chunk].data());
        }
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
    const OptionalTensor& sequence_sums, std::string_view objective, std::string_view level, double clip_low,
    double clip_high, std::optional<double> dual_clip, std::string_view correction, double correction_low,
    double correction_high, std::string_view kl, bool kl_score_gradient, double kl_coef, double entropy_coef) {
  constexpr const char* op = "policy_loss_backward";
  const PolicyOptions options =
      policy_options(op, objective, level, clip_low, clip_high, dual_clip, correction, correction_low,
                     correction_high, kl, kl_score_gradient, kl_coef, entropy_coef);
  const PolicyArguments arguments(op, options, logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs,
                                  rollout_logprobs, sequence_ids, sequence_sums);
  if (arguments.sequence_sums.defined()) {
    check_sequence_ids(op, arguments.sequence_ids, arguments.sequence_sums.size(0));
  }
  MEGARL_CHECK(op, grad_loss.numel() == 1, "grad_loss must hold one value, got ", grad_loss.sizes());
  const int64_t num_tokens = logprobs.size(0);
  at::Tensor grad_logprobs = at::zeros({num_tokens}, logprobs.options());
  at::Tensor grad_entropy = at::zeros({entropy ? num_tokens : 0}, logprobs.options());
  AT_DISPATCH_FLOATING_TYPES(logprobs.scalar_type(), op, [&] {
    const auto tokens = arguments.tokens<scalar_t>();
    const scalar_t scale = static_cast<scalar_t>(grad_loss.item<double>());
    scalar_t* by_logprob = grad_logprobs.mutable_data_ptr<scalar_t>();
    scalar_t* by_entropy = entropy ? grad_entropy.mutable_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, num_tokens, 4 * kChunk, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (tokens.weights[i] == 0) continue;
        scalar_t logprob, of_entropy;
        policy_token_gradient(tokens.load(i), options, &logprob, &of_entropy);
        by_logprob[i] = scale * logprob;
        if (by_entropy) by_entropy[i] = scale * of_entropy;
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
