// The policy loss of one token and its gradient. Formulas and sources: megarl/ops/policy_loss.py. Written without
// branches over values, so that `real` may be a vector of tokens: policy_loss_cpu.cpp defines Lanes for those.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/host_device.h"

namespace megarl {

constexpr double kNoBound = std::numeric_limits<double>::infinity();

enum class Objective { clip, cispo, sapo, dppo, vespo };
enum class Correction { none, tis, icepop, sequence_mask, sequence_tis, sequence_mask_tis, sequence_icepop };
enum class KlEstimator { none, k1, k2, k3 };
enum class KlGradient { plain, score, unbiased, unbiased_old, unbiased_rollout };

// Bounds that are off are infinite.
struct PolicyOptions {
  Objective objective;
  bool sequence_level;
  Correction correction;
  bool sequence_product;  // of the correction: the product over a sequence, not the geometric mean
  KlEstimator kl;
  KlGradient kl_gradient;
  double clip_low, clip_high, dual_clip;
  double correction_low, correction_high, correction_token_high;
  double log_ratio_clamp;
  double kl_coef, kl_input_clamp, kl_output_clamp, entropy_coef;
  double positive[2], negative[2];  // of A > 0 and others. sapo: temperature; vespo: k, lambda
};

constexpr int kNumPolicyNumbers = 15;

// `numbers` in the order of PolicyLossOptions.numbers (megarl/ops/policy_loss.py).
inline PolicyOptions make_policy_options(Objective objective, bool sequence_level, Correction correction,
                                         bool sequence_product, KlEstimator kl, KlGradient kl_gradient,
                                         const double* numbers) {
  const double* n = numbers;
  return {objective, sequence_level, correction, sequence_product, kl,    kl_gradient,    n[0],           n[1],
          n[2],      n[3],           n[4],       n[5],             n[6],  n[7],           n[8],           n[9],
          n[10],     {n[11], n[12]}, {n[13], n[14]}};
}

MEGARL_HD constexpr bool by_sequence(Correction correction) {
  return correction >= Correction::sequence_mask;
}

MEGARL_HD constexpr bool by_sequence(const PolicyOptions& options) {
  return options.sequence_level || options.objective == Objective::vespo || by_sequence(options.correction);
}

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
  real sequence_log_ratio;       // of logprob - old_logprob over the sequence: the mean, or for vespo the sum
  real sequence_log_off_policy;  // of old_logprob - rollout_logprob: the mean or, for a product, the sum
};

// Contiguous pointers to the per-token tensors; nullptr for those not given.
template <typename real>
struct PolicyTokens {
  const real *logprobs, *entropy, *old_logprobs, *advantages, *weights, *ref_logprobs, *rollout_logprobs;
  const int64_t* sequence_ids;
  const double* sequence_sums;
  bool sum_of_ratios, sum_of_off_policy;  // what PolicyToken has of a sequence; else the mean

  MEGARL_HD real sequence_log_ratio(int64_t sequence) const {
    const double* sums = sequence_sums + 3 * sequence;
    return static_cast<real>(sum_of_ratios ? sums[0] : sums[0] / sums[2]);
  }
  MEGARL_HD real sequence_log_off_policy(int64_t sequence) const {
    const double* sums = sequence_sums + 3 * sequence;
    return static_cast<real>(sum_of_off_policy ? sums[1] : sums[1] / sums[2]);
  }

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
      token.sequence_log_ratio = sequence_log_ratio(sequence_ids[i]);
      token.sequence_log_off_policy = sequence_log_off_policy(sequence_ids[i]);
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

// x within [low, high]; NaN stays NaN.
template <typename real>
MEGARL_HD real bounded(real x, real low, real high) {
  return Lanes<real>::where(x < low, low, Lanes<real>::where(x > high, high, x));
}

template <typename real>
MEGARL_HD real bounded(real x, double bound) {
  using T = typename Lanes<real>::scalar;
  return bounded(x, real(T(-bound)), real(T(bound)));
}

// Sequences' ratios of vespo stay within these, so that their logarithm and exponential are numbers.
constexpr double kVespoLeastLog = -18.420680743952367, kVespoGreatestLog = 20;  // from log 1e-8

template <typename real>
MEGARL_HD real policy_log_ratio(const PolicyToken<real>& token, const PolicyOptions& options) {
  using T = typename Lanes<real>::scalar;
  if (options.objective == Objective::vespo) {
    const real log_ratio = bounded(token.sequence_log_ratio, real(T(kVespoLeastLog)), real(T(kVespoGreatestLog)));
    return bounded(log_ratio, options.log_ratio_clamp);
  }
  return options.sequence_level ? token.sequence_log_ratio : token.logprob - token.old_logprob;
}

// The ratio of the clipped objective, its log within the clamp.
template <typename real>
MEGARL_HD real policy_ratio(const PolicyToken<real>& token, const PolicyOptions& options) {
  return Lanes<real>::exp(bounded(policy_log_ratio(token, options), options.log_ratio_clamp));
}

// A smooth gate in place of the clip.
template <typename real>
MEGARL_HD Surrogate<real> sapo(const PolicyToken<real>& token, real ratio, const PolicyOptions& options) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  const real zero(T(0)), one(T(1)), four(T(4)), minus = zero - token.advantage;
  const real heat =
      L::where(token.advantage > zero, real(T(options.positive[0])), real(T(options.negative[0])));
  const real falling = L::exp(heat * (one - ratio)), gate = one / (one + falling);
  Surrogate<real> result{zero, zero, zero, zero, zero};
  result.value = minus * gate * four / heat;
  // falling is 0 long before ratio is infinite
  result.gradient = L::where(falling > zero, minus * four * gate * gate * falling * ratio, zero);
  return result;
}

// No token of an advantage whose probability has moved too far the advantage's way.
template <typename real>
MEGARL_HD Surrogate<real> dppo(const PolicyToken<real>& token, real ratio, const PolicyOptions& options) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  const real zero(T(0)), one(T(1)), minus = zero - token.advantage;
  const real moved = L::exp(token.logprob) - L::exp(token.old_logprob);
  const auto too_low = (token.advantage < zero) & (moved < real(T(-options.clip_low)));
  const auto too_high = (token.advantage > zero) & (moved > real(T(options.clip_high)));
  Surrogate<real> result{zero, zero, zero, zero, zero};
  result.value = L::where(too_low | too_high, zero, L::where(token.advantage != zero, minus * ratio, zero));
  result.gradient = result.value;
  result.clipped_low = L::where(too_low, one, zero);
  result.clipped_high = L::where(too_high, one, zero);
  return result;
}

// The sequence's ratio w through e^lambda w^k e^(-lambda w), a constant to the gradient, times the logprob.
template <typename real>
MEGARL_HD Surrogate<real> vespo(const PolicyToken<real>& token, real ratio, const PolicyOptions& options) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  const real zero(T(0));
  const auto bad = token.advantage < zero;
  const real k = L::where(bad, real(T(options.negative[0])), real(T(options.positive[0])));
  const real lambda = L::where(bad, real(T(options.negative[1])), real(T(options.positive[1])));
  const real log_weight = lambda + k * policy_log_ratio(token, options) - lambda * ratio;
  Surrogate<real> result{zero, zero, zero, zero, zero};
  result.gradient = (zero - token.advantage) * L::exp(log_weight);
  result.value = L::where(token.advantage != zero, result.gradient * token.logprob, zero);
  return result;
}

template <typename real>
MEGARL_HD Surrogate<real> surrogate_of_ratio(const PolicyToken<real>& token, real ratio,
                                             const PolicyOptions& options) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  if (options.objective == Objective::sapo) return sapo(token, ratio, options);
  if (options.objective == Objective::dppo) return dppo(token, ratio, options);
  if (options.objective == Objective::vespo) return vespo(token, ratio, options);
  const real zero(T(0)), one(T(1)), low(T(1 - options.clip_low)), high(T(1 + options.clip_high));
  const real advantage = token.advantage, minus = zero - advantage;
  const auto counts = advantage != zero;  // 0 also if the ratio overflowed: 0 * inf would be NaN
  const auto below = ratio < low, above = ratio > high, bad = advantage < zero, good = advantage > zero;
  const real inside = bounded(ratio, low, high);
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
  if (options.dual_clip < kNoBound) {
    const real bound(T(options.dual_clip));
    const auto bounded = bad & (ratio > bound);
    result.value = L::where(bounded, minus * bound, result.value);
    result.gradient = L::where(bounded, zero, result.gradient);
    result.dual_clipped = L::where(bounded, one, zero);
  }
  return result;
}

template <typename real>
MEGARL_HD Surrogate<real> surrogate(const PolicyToken<real>& token, real ratio, const PolicyOptions& options) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  Surrogate<real> result = surrogate_of_ratio(token, ratio, options);
  const bool through_ratio = options.objective != Objective::cispo && options.objective != Objective::vespo;
  if (through_ratio && options.log_ratio_clamp < kNoBound) {  // a clamped ratio has no gradient
    const real clamp(T(options.log_ratio_clamp)), zero(T(0));
    const auto inside = L::abs(policy_log_ratio(token, options)) <= clamp;
    result.gradient = L::where(inside, result.gradient, zero);
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
  const real of_token = token.old_logprob - token.rollout_logprob;
  const real log_ratio = by_sequence(options.correction) ? token.sequence_log_off_policy : of_token;
  const real ratio = L::exp(bounded(log_ratio, options.log_ratio_clamp));
  const auto inside = (ratio >= low) & (ratio <= high);
  *corrected = L::where(inside, zero, one);
  if (options.correction == Correction::tis || options.correction == Correction::sequence_tis) {
    return bounded(ratio, low, high);
  }
  real kept = ratio;
  if (options.correction == Correction::sequence_mask) {
    kept = one;
  } else if (options.correction == Correction::sequence_mask_tis) {
    const real weight = L::exp(bounded(of_token, options.log_ratio_clamp)), most(T(options.correction_token_high));
    kept = L::where(weight > most, most, weight);
    *corrected = L::where(weight > most, one, *corrected);
  }
  return L::where(inside, kept, zero);
}

// exp(d) - 1 - d, without cancellation near 0.
template <typename real>
MEGARL_HD real k3(real d) {
  return Lanes<real>::expm1(d) - d;
}

// What the estimate is weighed with, 0 where that is no number; and its derivative.
template <typename real>
MEGARL_HD real kl_weight(const PolicyToken<real>& token, const PolicyOptions& options, real* derivative) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  const real zero(T(0)), one(T(1));
  if (options.kl_gradient == KlGradient::unbiased) return *derivative = one;
  const real from = options.kl_gradient == KlGradient::unbiased_old ? token.old_logprob : token.rollout_logprob;
  const real moved = token.logprob - from, within = bounded(moved, options.log_ratio_clamp);
  real weight = L::exp(within);
  weight = L::where(weight < real(T(kNoBound)), weight, zero);
  *derivative = L::where(within == moved, weight, zero);
  return weight;
}

template <typename real>
MEGARL_HD void reference_kl(const PolicyToken<real>& token, const PolicyOptions& options, real* value,
                            real* gradient) {
  using L = Lanes<real>;
  using T = typename L::scalar;
  const real zero(T(0)), one(T(1)), minus = token.logprob - token.ref_logprob;
  *value = *gradient = zero;
  if (options.kl == KlEstimator::none) return;
  const real difference = token.ref_logprob - token.logprob, d = bounded(difference, options.kl_input_clamp);
  if (options.kl == KlEstimator::k1) {
    *value = zero - d;
    *gradient = one;
  } else if (options.kl == KlEstimator::k2) {
    *value = d * d * real(T(0.5));
    *gradient = zero - d;
  } else {
    const real growth = L::expm1(d);
    *value = growth - d;
    *gradient = zero - growth;
  }
  if (options.kl_gradient >= KlGradient::unbiased) {
    real by_logprob;
    const real weight = kl_weight(token, options, &by_logprob);
    *gradient = by_logprob * *value + weight * *gradient;
    *value = weight * *value;
  }
  *gradient = L::where(d == difference, *gradient, zero);
  const real clamped = bounded(*value, options.kl_output_clamp);
  *gradient = L::where(clamped == *value, *gradient, zero);
  *value = clamped;
  if (options.kl_gradient == KlGradient::score) *gradient = minus;
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
