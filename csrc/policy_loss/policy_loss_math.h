// The policy loss of one token and its gradient. Formulas and sources: megarl/ops/policy_loss.py. Written without
// branches over values, so that `real` may be a vector of tokens: policy_loss_cpu.cpp defines Lanes for those.
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

// Arithmetic on one value per token.
template <typename real>
struct Lanes {
  using scalar = real;
  static MEGARL_HD real exp(real x) { return std::exp(x); }
  static MEGARL_HD real expm1(real x) { return std::expm1(x); }
  static MEGARL_HD real abs(real x) { return std::abs(x); }
  static MEGARL_HD real where(bool condition, real yes, real no) { return condition ? yes : no; }
};

// The inputs of one token. Fields without a tensor are 0, and unused.
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

// The terms of the sums; `count` is 1, flags are 0 or 1.
template <typename real>
struct PolicyTerms {
  real count, policy, off_policy, kl, ratio, clipped_low, clipped_high, dual_clipped, old_kl, corrected, exp_error,
      rollout_kl, error;
};

template <typename real>
struct Surrogate {
  real value, gradient;  // gradient by logprob
  real clipped_low, clipped_high, dual_clipped;
};

template <typename real>
MEGARL_HD Surrogate<real> surrogate(const PolicyToken<real>& token, real ratio, const PolicyOptions& options) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  const real zero(T(0)), one(T(1)), low(T(1 - options.clip_low)), high(T(1 + options.clip_high));
  const real advantage = token.advantage, minus = zero - advantage;
  const auto counts = advantage != zero;  // 0 also if the ratio overflowed: 0 * inf would be NaN
  const auto below = ratio < low, above = ratio > high, bad = advantage < zero, good = advantage > zero;
  const real inside = L::where(below, low, L::where(above, high, ratio));
  Surrogate<real> result{zero, zero, zero, zero, zero};
  if (options.objective == Objective::cispo) {
    result.gradient = L::where(counts, minus * inside, zero);
    result.value = L::where(counts, result.gradient * token.logprob, zero);
    result.clipped_low = L::where(counts & below, one, zero);
    result.clipped_high = L::where(counts & above, one, zero);
    return result;
  }
  const auto too_low = bad & below, too_high = good & above;
  result.clipped_low = L::where(too_low, one, zero);
  result.clipped_high = L::where(too_high, one, zero);
  result.value = L::where(counts, minus * L::where(too_low | too_high, inside, ratio), zero);
  result.gradient = L::where(too_low | too_high, zero, result.value);
  if (options.dual_clip > 0) {
    const real bound(T(options.dual_clip));
    const auto bounded = bad & (ratio > bound);
    result.value = L::where(bounded, minus * bound, result.value);
    result.gradient = L::where(bounded, zero, result.gradient);
    result.dual_clipped = L::where(bounded, one, zero);
  }
  return result;
}

// Weight for sampling from the rollout policy instead of the old one; a constant to the gradient.
template <typename real>
MEGARL_HD real off_policy_weight(const PolicyToken<real>& token, const PolicyOptions& options, real* corrected) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  const real zero(T(0)), one(T(1)), low(T(options.correction_low)), high(T(options.correction_high));
  *corrected = zero;
  if (options.correction == Correction::none || !token.has_rollout) return one;
  const bool sequence =
      options.correction == Correction::sequence_mask || options.correction == Correction::sequence_tis;
  const real ratio = L::exp(sequence ? token.sequence_log_off_policy : token.old_logprob - token.rollout_logprob);
  if (options.correction == Correction::tis || options.correction == Correction::sequence_tis) {
    const auto above = ratio > high;
    *corrected = L::where(above, one, zero);
    return L::where(above, high, ratio);
  }
  const auto inside = (ratio >= low) & (ratio <= high);
  *corrected = L::where(inside, zero, one);
  return L::where(inside, options.correction == Correction::icepop ? ratio : one, zero);
}

// exp(d) - 1 - d, without cancellation near 0.
template <typename real>
MEGARL_HD real k3(real d) {
  return Lanes<real>::expm1(d) - d;
}

template <typename real>
MEGARL_HD void reference_kl(const PolicyToken<real>& token, const PolicyOptions& options, real* value,
                            real* gradient) {
  using T = typename Lanes<real>::scalar;
  *value = *gradient = real(T(0));
  if (options.kl == KlEstimator::none) return;
  const real d = token.ref_logprob - token.logprob, minus = token.logprob - token.ref_logprob;
  if (options.kl == KlEstimator::k1) {
    *value = minus;
    *gradient = real(T(1));
  } else if (options.kl == KlEstimator::k2) {
    *value = d * d * real(T(0.5));
    *gradient = minus;
  } else {
    const real growth = Lanes<real>::expm1(d);
    *value = growth - d;
    *gradient = real(T(0)) - growth;
  }
  if (options.kl_score_gradient) *gradient = minus;
}

template <typename real>
MEGARL_HD real policy_ratio(const PolicyToken<real>& token, const PolicyOptions& options) {
  return Lanes<real>::exp(options.sequence_level ? token.sequence_log_ratio : token.logprob - token.old_logprob);
}

// The maximum; NaN if either is.
template <typename sum_t>
MEGARL_HD sum_t larger_or_nan(sum_t a, sum_t b) {
  return a != a || b <= a ? a : b;
}

template <typename real>
MEGARL_HD PolicyTerms<real> policy_terms(const PolicyToken<real>& token, const PolicyOptions& options) {
  using T = typename Lanes<real>::scalar;
  const real zero(T(0)), ratio = policy_ratio(token, options);
  PolicyTerms<real> terms;
  const Surrogate<real> policy = surrogate(token, ratio, options);
  real kl_gradient;
  terms.count = real(T(1));
  terms.policy = policy.value;
  terms.off_policy = off_policy_weight(token, options, &terms.corrected);
  reference_kl(token, options, &terms.kl, &kl_gradient);
  terms.ratio = ratio;
  terms.clipped_low = policy.clipped_low;
  terms.clipped_high = policy.clipped_high;
  terms.dual_clipped = policy.dual_clipped;
  terms.old_kl = k3(token.logprob - token.old_logprob);
  terms.exp_error = terms.rollout_kl = terms.error = zero;
  if (token.has_rollout) {
    const real difference = token.old_logprob - token.rollout_logprob;
    terms.error = Lanes<real>::abs(difference);
    terms.exp_error = Lanes<real>::exp(terms.error);
    terms.rollout_kl = k3(difference);
  }
  return terms;
}

// Adds one token's terms, in the precision of the sums, to sums[k * stride].
template <int stride, typename real, typename sum_t>
MEGARL_HD void add_policy_terms(const PolicyTerms<real>& terms, sum_t weight, sum_t entropy,
                                const PolicyOptions& options, sum_t* sums) {
  // a masked token must not turn an infinite ratio into NaN
  const sum_t weighted = terms.off_policy == 0 ? sum_t(0) : static_cast<sum_t>(terms.policy) * terms.off_policy;
  const sum_t kl = terms.kl;
  sums[kLoss * stride] += weight * (weighted + static_cast<sum_t>(options.kl_coef) * kl -
                                    static_cast<sum_t>(options.entropy_coef) * entropy);
  sums[kPolicyLoss * stride] += weight * weighted;
  sums[kKlLoss * stride] += weight * kl;
  sums[kEntropyLoss * stride] += weight * entropy;
  sums[kTokens * stride] += terms.count;
  sums[kRatio * stride] += terms.ratio;
  sums[kClippedLow * stride] += terms.clipped_low;
  sums[kClippedHigh * stride] += terms.clipped_high;
  sums[kDualClipped * stride] += terms.dual_clipped;
  sums[kOldKl * stride] += terms.old_kl;
  sums[kRefKl * stride] += kl;
  sums[kEntropy * stride] += entropy;
  sums[kCorrectionWeight * stride] += terms.off_policy;
  sums[kCorrected * stride] += terms.corrected;
  sums[kRolloutExpError * stride] += terms.exp_error;
  sums[kRolloutKl * stride] += terms.rollout_kl;
  sums[kRolloutMaxError * stride] = larger_or_nan(sums[kRolloutMaxError * stride], static_cast<sum_t>(terms.error));
}

// Adds one token of weight != 0 to sums[kNumPolicySums].
template <typename real, typename sum_t>
MEGARL_HD void add_policy_token(const PolicyToken<real>& token, const PolicyOptions& options, sum_t* sums) {
  add_policy_terms<1>(policy_terms(token, options), static_cast<sum_t>(token.weight),
                      static_cast<sum_t>(token.entropy), options, sums);
}

// Gradients of the loss by the token's logprob and entropy.
template <typename real>
MEGARL_HD void policy_token_gradient(const PolicyToken<real>& token, const PolicyOptions& options, real* logprob,
                                     real* entropy) {
  using T = typename Lanes<real>::scalar;
  const real zero(T(0));
  real corrected, kl, kl_gradient;
  const real off_policy = off_policy_weight(token, options, &corrected);
  const Surrogate<real> policy = surrogate(token, policy_ratio(token, options), options);
  reference_kl(token, options, &kl, &kl_gradient);
  const real weighted = Lanes<real>::where(off_policy != zero, policy.gradient * off_policy, zero);
  *logprob = token.weight * (weighted + real(T(options.kl_coef)) * kl_gradient);
  *entropy = token.weight * real(T(-options.entropy_coef));
}

}  // namespace megarl
