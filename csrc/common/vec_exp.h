// exp for arguments <= 0, for a softmax shifted by its maximum; CPU vectors only.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>

namespace megarl {

using at::vec::Vectorized;

// Shifted and scaled exponential: exp(d * scale) for d = x - max <= 0.
//
// `clamp` is the d at which the result becomes exactly 0; callers clamp d to it first, so that d * exp(d) is 0, not
// NaN, for x = -inf. NaN in d gives NaN out.
//
// `power(y)` takes y = d * factor instead, whose base differs by type; kNatural converts it to natural units.
template <typename acc_t>
struct ShiftedExp;

template <>
struct ShiftedExp<float> {
  using Vec = Vectorized<float>;

  static constexpr float kSmallest = -127.0f;  // base-2 exponent whose exponential is 0
  static constexpr double kNatural = 0.693147180559945309;  // base-2 exponents to natural ones

  float clamp;
  float scale;
  float factor;  // natural to base 2, and 1 / temperature

  explicit ShiftedExp(float inverse_temperature)
      : clamp(kSmallest / (1.44269504f * inverse_temperature)),
        scale(inverse_temperature),
        factor(1.44269504f * inverse_temperature) {}

  Vec operator()(Vec d) const { return power(d * Vec(factor)); }

  // 2^y for y in [kSmallest, 0] (and a little above). y = n + f with |f| <= 1/2; the polynomial is the degree-5
  // minimax of 2^f there with p(0) = 1: 9.1e-8 relative error.
  static Vec power(Vec y) {
#if defined(CPU_CAPABILITY_AVX512)
    // One instruction each to split y and to put 2^n to p; denormal results are 0 under FlushDenormals.
    const Vec f = _mm512_reduce_ps(y, 0);
    return _mm512_scalef_ps(polynomial(f), y - f);
#else
    // Adding 1.5 * 2^23, whose last mantissa bit is worth 1, rounds to n. The 127 makes the low bits of
    // the sum the biased exponent of 2^n; y = -127 gives the bits of +0.
    const Vec shifter(12582912.0f + 127.0f);
    const Vec shifted = y + shifter;
    const Vec f = y - (shifted - shifter);
    const Vectorized<int32_t> exponent = at::vec::cast<int32_t>(shifted) << Vectorized<int32_t>(23);
    return polynomial(f) * at::vec::cast<float>(exponent);
#endif
  }

 private:
  static Vec polynomial(Vec f) {
    Vec p = at::vec::fmadd(f, Vec(1.32647272e-3f), Vec(9.67151269e-3f));
    p = at::vec::fmadd(p, f, Vec(5.55073374e-2f));
    p = at::vec::fmadd(p, f, Vec(2.40222421e-1f));
    p = at::vec::fmadd(p, f, Vec(6.93146978e-1f));
    return at::vec::fmadd(p, f, Vec(1.0f));
  }
};

template <>
struct ShiftedExp<double> {
  using Vec = Vectorized<double>;

  static constexpr double kSmallest = -750.0;
  static constexpr double kNatural = 1.0;

  double clamp;
  double scale;
  double factor;

  explicit ShiftedExp(double inverse_temperature)
      : clamp(kSmallest / inverse_temperature), scale(inverse_temperature), factor(inverse_temperature) {}

  Vec operator()(Vec d) const { return power(d * Vec(factor)); }
  static Vec power(Vec y) { return y.exp(); }
};

// max(a, b) in one instruction. A NaN in `b` is kept, one in `a` is not (at::vec::maximum would keep both, at
// three times the cost); callers detect NaN through the sums.
template <typename Vec>
inline Vec fast_max(Vec a, Vec b) {
  return at::vec::clamp_min(b, a);
}

}  // namespace megarl
