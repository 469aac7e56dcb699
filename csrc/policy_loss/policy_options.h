// The arguments of the policy_loss ops, checked once for both devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "common/check.h"
#include "policy_loss/policy_loss_math.h"

namespace megarl {

using OptionalTensor = std::optional<at::Tensor>;

template <typename Enum>
struct Named {
  const char* name;
  Enum value;
};

template <typename Enum, size_t N>
Enum parse(const char* op, const char* argument, std::string_view text, const Named<Enum> (&choices)[N]) {
  std::string names;
  for (const auto& choice : choices) {
    if (text == choice.name) return choice.value;
    names += std::string(names.empty() ? "" : ", ") + choice.name;
  }
  MEGARL_CHECK(op, false, argument, " must be one of ", names, "; got '", text, "'");
}

inline PolicyOptions policy_options(const char* op, std::string_view objective, std::string_view level,
                                    std::string_view correction, std::string_view sequence_weight,
                                    std::string_view kl, std::string_view kl_gradient,
                                    at::ArrayRef<double> numbers) {
  constexpr Named<Objective> objectives[] = {{"clip", Objective::clip},
                                             {"cispo", Objective::cispo},
                                             {"sapo", Objective::sapo},
                                             {"dppo", Objective::dppo},
                                             {"vespo", Objective::vespo}};
  constexpr Named<bool> levels[] = {{"token", false}, {"sequence", true}};
  constexpr Named<Correction> corrections[] = {{"none", Correction::none},
                                               {"tis", Correction::tis},
                                               {"icepop", Correction::icepop},
                                               {"sequence_mask", Correction::sequence_mask},
                                               {"sequence_tis", Correction::sequence_tis},
                                               {"sequence_mask_tis", Correction::sequence_mask_tis},
                                               {"sequence_icepop", Correction::sequence_icepop}};
  constexpr Named<bool> weights[] = {{"geometric_mean", false}, {"product", true}};
  constexpr Named<KlEstimator> estimators[] = {
      {"none", KlEstimator::none}, {"k1", KlEstimator::k1}, {"k2", KlEstimator::k2}, {"k3", KlEstimator::k3}};
  constexpr Named<KlGradient> gradients[] = {{"plain", KlGradient::plain},
                                             {"score", KlGradient::score},
                                             {"unbiased", KlGradient::unbiased},
                                             {"unbiased_old", KlGradient::unbiased_old},
                                             {"unbiased_rollout", KlGradient::unbiased_rollout}};
  MEGARL_CHECK(op, numbers.size() == kNumPolicyNumbers, "numbers must be ", kNumPolicyNumbers, ", got ",
               numbers.size());
  const PolicyOptions options = make_policy_options(
      parse(op, "objective", objective, objectives), parse(op, "level", level, levels),
      parse(op, "correction", correction, corrections), parse(op, "sequence_weight", sequence_weight, weights),
      parse(op, "kl", kl, estimators), parse(op, "kl_gradient", kl_gradient, gradients), numbers.data());
  MEGARL_CHECK(op, options.clip_low >= 0, "clip_low must not be negative, got ", options.clip_low);
  MEGARL_CHECK(op, options.clip_high >= 0, "clip_high must not be negative, got ", options.clip_high);
  MEGARL_CHECK(op, options.dual_clip > 1, "dual_clip must be above 1, got ", options.dual_clip);
  MEGARL_CHECK(op, options.correction_low >= 0 && options.correction_low <= options.correction_high,
               "correction_low must lie in [0, ", options.correction_high, "], got ", options.correction_low);
  for (const double bound : {options.correction_token_high, options.log_ratio_clamp, options.kl_input_clamp,
                             options.kl_output_clamp}) {
    MEGARL_CHECK(op, bound > 0, "bounds must be above 0, got ", bound);
  }
  MEGARL_CHECK(op, !options.sequence_level || options.objective == Objective::clip ||
                       options.objective == Objective::cispo || options.objective == Objective::sapo,
               "objective ", objective, " has no level sequence");
  return options;
}

// The tensors as given, made contiguous and kept alive, and checked against logprobs [R].
struct PolicyArguments {
  at::Tensor logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs, sequence_ids,
      sequence_sums;
  bool sum_of_ratios, sum_of_off_policy;

  PolicyArguments(const char* op, const PolicyOptions& options, const at::Tensor& logprobs_,
                  const OptionalTensor& entropy_, const at::Tensor& old_logprobs_, const at::Tensor& advantages_,
                  const at::Tensor& weights_, const OptionalTensor& ref_logprobs_,
                  const OptionalTensor& rollout_logprobs_, const OptionalTensor& sequence_ids_,
                  const OptionalTensor& sequence_sums_) {
    MEGARL_CHECK(op, logprobs_.dim() == 1, "logprobs must have shape [R], got ", logprobs_.sizes());
    const auto dtype = logprobs_.scalar_type();
    MEGARL_CHECK(op, dtype == at::kFloat || dtype == at::kDouble, "logprobs must be float32 or float64, got ",
                 dtype);
    auto take = [&](const char* name, const OptionalTensor& tensor, at::ScalarType type) {
      if (!tensor) return at::Tensor();
      check_vector(op, name, *tensor, logprobs_.size(0), type);
      check_device(op, name, *tensor, logprobs_);
      return tensor->contiguous();
    };
    logprobs = logprobs_.contiguous();
    entropy = take("entropy", entropy_, dtype);
    old_logprobs = take("old_logprobs", old_logprobs_, dtype);
    advantages = take("advantages", advantages_, dtype);
    weights = take("weights", weights_, dtype);
    ref_logprobs = take("ref_logprobs", ref_logprobs_, dtype);
    rollout_logprobs = take("rollout_logprobs", rollout_logprobs_, dtype);
    sequence_ids = take("sequence_ids", sequence_ids_, at::kLong);
    MEGARL_CHECK(op, options.kl == KlEstimator::none || ref_logprobs.defined(), "kl needs ref_logprobs");
    MEGARL_CHECK(op, options.entropy_coef == 0 || entropy.defined(), "entropy_coef = ", options.entropy_coef,
                 " needs entropy");
    MEGARL_CHECK(op, options.correction == Correction::none || rollout_logprobs.defined(),
                 "correction needs rollout_logprobs");
    MEGARL_CHECK(op, options.kl == KlEstimator::none || options.kl_gradient != KlGradient::unbiased_rollout ||
                         rollout_logprobs.defined(),
                 "kl_gradient unbiased_rollout needs rollout_logprobs");
    sum_of_ratios = options.objective == Objective::vespo;
    sum_of_off_policy = options.sequence_product;
    if (by_sequence(options)) {
      MEGARL_CHECK(op, sequence_ids.defined() && sequence_sums_,
                   "objective, level or correction by sequence need sequence_ids and sequence_sums");
      MEGARL_CHECK(op, sequence_sums_->dim() == 2 && sequence_sums_->size(1) == 3 &&
                           sequence_sums_->scalar_type() == at::kDouble,
                   "sequence_sums must be float64 [S, 3], got ", sequence_sums_->scalar_type(), " ",
                   sequence_sums_->sizes());
      check_device(op, "sequence_sums", *sequence_sums_, logprobs_);
      sequence_sums = sequence_sums_->contiguous();
    }
  }

  template <typename real>
  PolicyTokens<real> tokens() const {
    auto pointer = [](const at::Tensor& tensor) -> const real* {
      return tensor.defined() ? tensor.const_data_ptr<real>() : nullptr;
    };
    return {
        pointer(logprobs),
        pointer(entropy),
        pointer(old_logprobs),
        pointer(advantages),
        pointer(weights),
        pointer(ref_logprobs),
        pointer(rollout_logprobs),
        sequence_sums.defined() ? sequence_ids.const_data_ptr<int64_t>() : nullptr,
        sequence_sums.defined() ? sequence_sums.const_data_ptr<double>() : nullptr,
        sum_of_ratios,
        sum_of_off_policy,
    };
  }
};

}  // namespace megarl
