// The policy loss of one token and its gradient. Formulas and sources: megarl/ops/policy_loss.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace megarl {

enum class Objective { clip, cispo };
enum class Correction { none, tis, icepop, sequence_mask, sequence_tis };
enum class KlEstimator { none, k1, k2, k3 };

struct PolicyOptions {
  Objective objective;
  bool sequence_level;
  double clip_low, clip_high;
  double dual_clip;  // 0: off
  Correction correction;
  double correction_low, correction_high;
  KlEstimator kl;
  bool kl_score_gradient;
  double kl_coef, entropy_coef;
};

// What one token brings in. Fields without a tensor behind them are 0, and unused.
template <typename real>
struct PolicyToken {
  real logprob, old_logprob, advantage, weight, entropy, ref_logprob, rollout_logprob;
  bool has_rollout;
  real sequence_log_ratio;    // mean of logprob - old_logprob over the sequence
  real sequence_log_off_policy;  // mean of old_logprob - rollout_logprob
};

// Contiguous pointers to the per-token tensors; nullptr for those not given.
template <typename real>
struct PolicyTokens {
  const real *logprobs, *entropy, *old_logprobs, *advantages, *weights, *ref_logprobs, *rollout_logprobs;
  const int64_t* sequence_ids;
  const double* sequence_sums;

  MEGARL_HD PolicyToken<real> load(int64_t i) const {
    PolicyToken<real> token{
        logprobs[i],
        old_logprobs[i],
        advantages[i],
        weights[i],
        entropy ? entropy[i] : real(0),
        ref_logprobs ? ref_logprobs[i] : real(0),
        rollout_logprobs ? rollout_logprobs[i] : real(0),
        rollout_logprobs != nullptr,
        real(0),
        real(0),
    };
    if (sequence_sums) {
      const double* sums = sequence_sums + 3 * sequence_ids[i];
      token.sequence_log_ratio = static_cast<real>(sums[0] / sums[2]);
      token.sequence_log_off_policy = static_cast<real>(sums[1] / sums[2]);
    }
    return token;
  }
};

// Order of the sums, as in megarl/ops/policy_loss.py. The last is a maximum.
enum PolicySum {
  kLoss,
  kPolicyLoss,
  kKlLoss,
  kEntropyLoss,
  kTokens,
  kRatio,
  kClippedLow,
  kClippedHigh,
  kDualClipped,
  kOldKl,
  kRefKl,
  kEntropy,
  kCorrectionWeight,
  kCorrected,
  kRolloutExpError,
  kRolloutKl,
  kRolloutMaxError,
  kNumPolicySums,
};

template <typename real>
struct Surrogate {
  real value, gradient;  // gradient by logprob
  bool clipped_low, clipped_high, dual_clipped;
};

template <typename real>
MEGARL_HD Surrogate<real> surrogate(const PolicyToken<real>& token, real ratio, const PolicyOptions& options) {
  const real advantage = token.advantage;
  Surrogate<real> result{0, 0, false, false, false};
  if (advantage == 0) return result;  // also where the ratio overflowed: 0 * inf has no meaning here
  const real low = static_cast<real>(1 - options.clip_low), high = static_cast<real>(1 + options.clip_high);
  const real inside = ratio < low ? low : (ratio > high ? high : ratio);
  if (options.objective == Objective::cispo) {
    result.clipped_low = ratio < low;
    result.clipped_high = ratio > high;
    result.gradient = -advantage * inside;
    result.value = result.gradient * token.logprob;
    return result;
  }
  result.clipped_low = advantage < 0 && ratio < low;
  result.clipped_high = advantage > 0 && ratio > high;
  const bool clipped = result.clipped_low || result.clipped_high;
  result.value = -advantage * (clipped ? inside : ratio);
  result.gradient = clipped ? real(0) : result.value;
  if (advantage < 0 && options.dual_clip > 0 && ratio > static_cast<real>(options.dual_clip)) {
    result.dual_clipped = true;
    result.value = -advantage * static_cast<real>(options.dual_clip);
    result.gradient = 0;
  }
  return result;
}

// Weight for sampling from the rollout policy instead of the old one; a constant to the gradient.
template <typename real>
MEGARL_HD real off_policy_weight(const PolicyToken<real>& token, const PolicyOptions& options, bool* corrected) {
  *corrected = false;
  if (options.correction == Correction::none || !token.has_rollout) return 1;
  const bool sequence =
      options.correction == Correction::sequence_mask || options.correction == Correction::sequence_tis;
  const real ratio =
      std::exp(sequence ? token.sequence_log_off_policy : token.old_logprob - token.rollout_logprob);
  const real low = static_cast<real>(options.correction_low), high = static_cast<real>(options.correction_high);
  if (options.correction == Correction::tis || options.correction == Correction::sequence_tis) {
    *corrected = ratio > high;
    return *corrected ? high : ratio;
  }
  *corrected = !(ratio >= low && ratio <= high);
  if (*corrected) return 0;
  return options.correction == Correction::icepop ? ratio : real(1);
}

// exp(d) - 1 - d, without cancellation near 0.
template <typename real>
MEGARL_HD real k3(real d) {
  return std::expm1(d) - d;
}

template <typename real>
MEGARL_HD void reference_kl(const PolicyToken<real>& token, const PolicyOptions& options, real* value,
                            real* gradient) {
  *value = 0;
  *gradient = 0;
  if (options.kl == KlEstimator::none) return;
  const real d = token.ref_logprob - token.logprob;
  if (options.kl == KlEstimator::k1) {
    *value = -d;
    *gradient = 1;
  } else if (options.kl == KlEstimator::k2) {
    *value = d * d / 2;
    *gradient = -d;
  } else {
    *value = k3(d);
    *gradient = -std::expm1(d);
  }
  if (options.kl_score_gradient) *gradient = -d;
}

template <typename real>
MEGARL_HD real policy_ratio(const PolicyToken<real>& token, const PolicyOptions& options) {
  return std::exp(options.sequence_level ? token.sequence_log_ratio : token.logprob - token.old_logprob);
}

// The larger one; NaN where either is.
template <typename sum_t>
MEGARL_HD sum_t larger_or_nan(sum_t a, sum_t b) {
  return a != a || b <= a ? a : b;
}

// Adds one token of weight != 0 to sums[kNumPolicySums].
template <typename real, typename sum_t>
MEGARL_HD void add_policy_token(const PolicyToken<real>& token, const PolicyOptions& options, sum_t* sums) {
  bool corrected;
  const real ratio = policy_ratio(token, options);
  const real off_policy = off_policy_weight(token, options, &corrected);
  const Surrogate<real> policy = surrogate(token, ratio, options);
  real kl, kl_gradient;
  reference_kl(token, options, &kl, &kl_gradient);
  // a masked token must not turn an infinite ratio into NaN
  const sum_t weighted = off_policy == 0 ? sum_t(0) : static_cast<sum_t>(policy.value) * off_policy;
  const sum_t weight = token.weight, entropy = token.entropy;
  sums[kLoss] += weight * (weighted + static_cast<sum_t>(options.kl_coef) * kl -
                           static_cast<sum_t>(options.entropy_coef) * entropy);
  sums[kPolicyLoss] += weight * weighted;
  sums[kKlLoss] += weight * kl;
  sums[kEntropyLoss] += weight * entropy;
  sums[kTokens] += 1;
  sums[kRatio] += ratio;
  sums[kClippedLow] += policy.clipped_low;
  sums[kClippedHigh] += policy.clipped_high;
  sums[kDualClipped] += policy.dual_clipped;
  sums[kOldKl] += k3(token.logprob - token.old_logprob);
  sums[kRefKl] += kl;
  sums[kEntropy] += entropy;
  sums[kCorrectionWeight] += off_policy;
  sums[kCorrected] += corrected;
  if (token.has_rollout) {
    const real difference = token.old_logprob - token.rollout_logprob;
    const sum_t error = std::abs(difference);
    sums[kRolloutExpError] += std::exp(error);
    sums[kRolloutKl] += k3(difference);
    sums[kRolloutMaxError] = larger_or_nan(sums[kRolloutMaxError], error);
  }
}

// Gradients of the loss by the token's logprob and entropy.
template <typename real>
MEGARL_HD void policy_token_gradient(const PolicyToken<real>& token, const PolicyOptions& options, real* logprob,
                                     real* entropy) {
  bool corrected;
  const real off_policy = off_policy_weight(token, options, &corrected);
  const Surrogate<real> policy = surrogate(token, policy_ratio(token, options), options);
  real kl, kl_gradient;
  reference_kl(token, options, &kl, &kl_gradient);
  const real weighted = off_policy == 0 ? real(0) : policy.gradient * off_policy;
  *logprob = token.weight * (weighted + static_cast<real>(options.kl_coef) * kl_gradient);
  *entropy = -token.weight * static_cast<real>(options.entropy_coef);
}

}  // namespace megarl
