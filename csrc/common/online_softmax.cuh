// The softmax sums of a row in one pass: running maximum, sum of exponentials, and their weighted sum for entropies.
#pragma once

#include "common/block_reduce.cuh"

namespace megarl {

// Sums over elements x relative to their maximum: of 2^d and of d * 2^d, d = (x - maximum) * scale; (-inf, 0, 0) if
// empty. NaN and +inf in x make the sums NaN.
template <class A>
struct SoftmaxSums {
  A maximum, sum, weighted;
};

// d below which 2^d is 0; d * 2^d is computed with d bounded by it, so that x = -inf adds 0, not NaN.
template <class A>
constexpr A kVanishing = sizeof(A) == 4 ? A(-200) : A(-2000);

// Rescales the sums to a larger maximum.
template <class A>
__device__ __forceinline__ SoftmaxSums<A> rescaled(const SoftmaxSums<A>& s, A maximum, A scale) {
  const A d = s.maximum == maximum ? A(0) : (s.maximum - maximum) * scale;
  const A factor = fast_exp2(d);
  return {maximum, s.sum * factor, (s.weighted + max(d, kVanishing<A>)*s.sum) * factor};
}

template <class A>
__device__ __forceinline__ SoftmaxSums<A> combine(const SoftmaxSums<A>& a, const SoftmaxSums<A>& b, A scale) {
  const A maximum = max(a.maximum, b.maximum);
  const SoftmaxSums<A> x = rescaled(a, maximum, scale), y = rescaled(b, maximum, scale);
  return {maximum, x.sum + y.sum, x.weighted + y.weighted};
}

template <class A>
__device__ __forceinline__ SoftmaxSums<A> warp_combine(const SoftmaxSums<A>& s, A scale) {
  const SoftmaxSums<A> r = rescaled(s, warp_max(s.maximum), scale);
  return {r.maximum, warp_sum(r.sum), warp_sum(r.weighted)};
}

// maximum * scale, rounded, so that d is one multiply-add; `lost` is the rounding error. 0 for an empty maximum.
template <class A>
struct Shift {
  A value, lost;
  __device__ __forceinline__ Shift(A maximum, A scale) : value(0), lost(0) {
    if (maximum != negative_infinity<A>()) {
      value = maximum * scale;
      lost = fma(maximum, scale, -value);
    }
  }
};

// A thread's state while it walks along a row.
template <class A>
class OnlineSoftmax {
 public:
  __device__ __forceinline__ explicit OnlineSoftmax(A scale) : scale_(scale) {}

  template <int N>
  __device__ __forceinline__ void add(const A (&x)[N]) {
    A larger = maximum_;
#pragma unroll
    for (int i = 0; i < N; ++i) larger = max(larger, x[i]);
    if (larger > maximum_) raise(larger);
    A sum = 0, weighted = 0;  // of this group: short chains of additions lose less to rounding
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = fma(x[i], scale_, -shift_);
      const A e = fast_exp2(d);
      sum += e;
      weighted = fma(max(d, kVanishing<A>), e, weighted);
    }
    sum_ += sum;
    weighted_ += weighted;
  }

  __device__ __forceinline__ SoftmaxSums<A> sums() const {
    const A lost = Shift<A>(maximum_, scale_).lost;
    const A factor = fast_exp2(-lost);
    return {maximum_, sum_ * factor, (weighted_ - lost * sum_) * factor};
  }

 private:
  __device__ __forceinline__ void raise(A maximum) {
    const A shift = Shift<A>(maximum, scale_).value;
    const A d = shift_ - shift;
    if (maximum_ != negative_infinity<A>()) {  // else there is nothing to rescale, and d may be positive
      const A factor = fast_exp2(d);
      weighted_ = (weighted_ + max(d, kVanishing<A>)*sum_) * factor;
      sum_ *= factor;
    }
    maximum_ = maximum;
    shift_ = shift;
  }

  A scale_;
  A maximum_ = negative_infinity<A>();
  A shift_ = 0, sum_ = 0, weighted_ = 0;
};

}  // namespace megarl
