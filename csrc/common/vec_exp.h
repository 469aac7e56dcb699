// exp for arguments <= 0, as a softmax shifted by its maximum needs it; CPU vectors only.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>

namespace megarl {

using at::vec::Vectorized;

// Shifted and scaled exponential: exp(d * scale) for d = x - max <= 0.
//
// `clamp` is the d at which the result becomes exactly 0; callers clamp d there before they use it, so
// that d * exp(d) is 0, not NaN, for x = -inf. NaN in d gives NaN out.
template <typename acc_t>
struct ShiftedExp;

template <>
struct ShiftedExp<float> {
  using Vec = Vectorized<float>;

  float clamp;
  float scale;
  Vec factor;  // natural to base 2, and 1 / temperature

  explicit ShiftedExp(float inverse_temperature)
      : clamp(-127.0f / (1.44269504f * inverse_temperature)),
        scale(inverse_temperature),
        factor(1.44269504f * inverse_temperature) {}

  // Splits y = n + f with |f| <= 1/2 by adding 1.5 * 2^23, whose last mantissa bit is worth 1. The 127
  // makes the low bits of the sum the biased exponent of 2^n; y = -127 gives the bits of +0.
  // The polynomial is the degree-5 minimax of 2^f on [-1/2, 1/2] with p(0) = 1: 9.1e-8 relative error.
  Vec operator()(Vec d) const {
    const Vec shifter(12582912.0f + 127.0f);
    const Vec y = d * factor;
    const Vec shifted = y + shifter;
    const Vec f = y - (shifted - shifter);
    Vec p = at::vec::fmadd(f, Vec(1.32647272e-3f), Vec(9.67151269e-3f));
    p = at::vec::fmadd(p, f, Vec(5.55073374e-2f));
    p = at::vec::fmadd(p, f, Vec(2.40222421e-1f));
    p = at::vec::fmadd(p, f, Vec(6.93146978e-1f));
    p = at::vec::fmadd(p, f, Vec(1.0f));
    const Vectorized<int32_t> exponent = at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23);
    return p * at::vec::cast<float>(exponent);
  }
};

template <>
struct ShiftedExp<double> {
  using Vec = Vectorized<double>;

  double clamp;
  double scale;
  Vec factor;

  explicit ShiftedExp(double inverse_temperature)
      : clamp(-750.0 / inverse_temperature), scale(inverse_temperature), factor(inverse_temperature) {}

  Vec operator()(Vec d) const { return (d * factor).exp(); }
};

// max(a, b) in one instruction. A NaN in `b` survives, one in `a` does not (at::vec::maximum would
// keep both, at three times the cost); callers find NaN through the sums.
template <typename Vec>
inline Vec fast_max(Vec a, Vec b) {
  return at::vec::clamp_min(b, a);
}

}  // namespace megarl
