// Divergences between two distributions over a vocabulary shard, and their gradient in place of the student's logits.
// No torch in here. Work items, loads and base-2 exponentials are as in token_logprob_kernels.cuh. Where a probability
// is 0 its term is 0; where only the other one is 0 the term is infinite, as the divergence is.
#pragma once

#include "common/logit_pairs.cuh"

namespace megarl::vocab_kl {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 1 : 3;  // 3 x 256 threads x 64 bytes = 48 KiB in flight per SM
constexpr int kNumStats = 6;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Both softmaxes, and with d in base 2 relative to each maximum: student_gap the sum of 2^ds (ds - dt), teacher_gap
// the sum of 2^dt (dt - ds).
template <class A>
struct PairSums {
  A student_max, student_sum, teacher_max, teacher_sum, student_gap, teacher_gap;
};

template <class A>
__device__ __forceinline__ PairSums<A> empty_sums() {
  return {negative_infinity<A>(), A(0), negative_infinity<A>(), A(0), A(0), A(0)};
}

// Sums after every ds grows by `student` and every dt by `teacher`.
template <class A>
__device__ __forceinline__ PairSums<A> moved(const PairSums<A>& s, A student, A teacher) {
  const A student_factor = fast_exp2(student), teacher_factor = fast_exp2(teacher);
  PairSums<A> result = s;
  result.student_gap = s.student_sum == A(0) ? A(0) : (s.student_gap + (student - teacher) * s.student_sum) * student_factor;
  result.teacher_gap = s.teacher_sum == A(0) ? A(0) : (s.teacher_gap + (teacher - student) * s.teacher_sum) * teacher_factor;
  result.student_sum = s.student_sum * student_factor;
  result.teacher_sum = s.teacher_sum * teacher_factor;
  return result;
}

// How much d changes when the maximum does. 0 before there is a maximum.
template <class A>
__device__ __forceinline__ A distance(A maximum, A larger, A scale) {
  return maximum == larger ? A(0) : (maximum - larger) * scale;
}

template <class A>
__device__ __forceinline__ PairSums<A> rescaled(const PairSums<A>& s, A student_max, A teacher_max, A scale) {
  PairSums<A> result =
      moved(s, distance(s.student_max, student_max, scale), distance(s.teacher_max, teacher_max, scale));
  result.student_max = student_max;
  result.teacher_max = teacher_max;
  return result;
}

template <class A>
__device__ __forceinline__ PairSums<A> combine(const PairSums<A>& a, const PairSums<A>& b, A scale) {
  const A student_max = max(a.student_max, b.student_max), teacher_max = max(a.teacher_max, b.teacher_max);
  const PairSums<A> x = rescaled(a, student_max, teacher_max, scale), y = rescaled(b, student_max, teacher_max, scale);
  return {student_max, x.student_sum + y.student_sum, teacher_max, x.teacher_sum + y.teacher_sum,
          x.student_gap + y.student_gap, x.teacher_gap + y.teacher_gap};
}

template <class A>
__device__ __forceinline__ PairSums<A> warp_combine(const PairSums<A>& s, A scale) {
  const PairSums<A> r = rescaled(s, warp_max(s.student_max), warp_max(s.teacher_max), scale);
  return {r.student_max, warp_sum(r.student_sum), r.teacher_max, warp_sum(r.teacher_sum), warp_sum(r.student_gap),
          warp_sum(r.teacher_gap)};
}

// A thread's state while it walks along two rows. Sums are relative to rounded shifts until sums() is called.
template <class A>
class OnlinePair {
 public:
  __device__ __forceinline__ explicit OnlinePair(A scale) : scale_(scale), sums_(empty_sums<A>()) {}

  template <int N>
  __device__ __forceinline__ void add(const A (&x)[N], const A (&y)[N]) {
    A student_max = sums_.student_max, teacher_max = sums_.teacher_max;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      student_max = max(student_max, x[i]);
      teacher_max = max(teacher_max, y[i]);
    }
    if (student_max > sums_.student_max || teacher_max > sums_.teacher_max) raise(student_max, teacher_max);
    A student_sum = 0, teacher_sum = 0, student_gap = 0, teacher_gap = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A ds = fma(x[i], scale_, -student_shift_), dt = fma(y[i], scale_, -teacher_shift_);
      const A p = fast_exp2(ds), q = fast_exp2(dt), gap = ds - dt;
      student_sum += p;
      teacher_sum += q;
      if (p != A(0)) student_gap = fma(p, gap, student_gap);
      if (q != A(0)) teacher_gap = fma(q, -gap, teacher_gap);
    }
    sums_.student_sum += student_sum;
    sums_.teacher_sum += teacher_sum;
    sums_.student_gap += student_gap;
    sums_.teacher_gap += teacher_gap;
  }

  __device__ __forceinline__ PairSums<A> sums() const {
    return moved(sums_, -Shift<A>(sums_.student_max, scale_).lost, -Shift<A>(sums_.teacher_max, scale_).lost);
  }

 private:
  __device__ __forceinline__ void raise(A student_max, A teacher_max) {
    const A student = Shift<A>(student_max, scale_).value, teacher = Shift<A>(teacher_max, scale_).value;
    // A shift of 0 stands for no maximum: all elements so far are -inf, for which any change is correct, also none.
    const A by_student = sums_.student_max == negative_infinity<A>() ? A(0) : student_shift_ - student;
    const A by_teacher = sums_.teacher_max == negative_infinity<A>() ? A(0) : teacher_shift_ - teacher;
    sums_ = moved(sums_, by_student, by_teacher);
    sums_.student_max = student_max;
    sums_.teacher_max = teacher_max;
    student_shift_ = student;
    teacher_shift_ = teacher;
  }

  A scale_;
  A student_shift_ = 0, teacher_shift_ = 0;
  PairSums<A> sums_;
};

template <class A>
__device__ __forceinline__ void store_stats(const PairSums<A>& sums, A* stats) {
  stats[0] = sums.student_max;
  stats[1] = sums.student_sum;
  stats[2] = sums.teacher_max;
  stats[3] = sums.teacher_sum;
  stats[4] = sums.student_gap * A(kLn2);
  stats[5] = sums.teacher_gap * A(kLn2);
}

// stats [R, 6]; with num_splits > 1 the parts' sums go to partial [R, num_splits] for combine_splits.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    forward(const LogitPairs<T> pairs, int num_splits, acc_t<T>* stats, PairSums<acc_t<T>>* partial) {
  using A = acc_t<T>;
  MEGARL_SHARED(PairSums<A>, of_warp, [2][kWarps]);  // double-buffered: one barrier per item is enough
  int parity = 0;
  for (int64_t item = blockIdx.x; item < pairs.num_rows * num_splits; item += gridDim.x, parity ^= 1) {
    const int64_t i = item / num_splits;
    const T *student = pairs.student_row(i), *teacher = pairs.teacher_row(i);
    const A scale = A(kLog2E) * pairs.inverse_temperature(i);
    OnlinePair<A> online(scale);
    for_pairs<T, kThreads>(student, teacher,
                           row_part(student, teacher, pairs.columns, int(item - i * num_splits), num_splits),
                           [&](const auto& x, const auto& y) { online.add(x, y); });
    PairSums<A> sums = warp_combine(online.sums(), scale);
    if (threadIdx.x % 32 == 0) of_warp[parity][threadIdx.x / 32] = sums;
    __syncthreads();
    if (threadIdx.x < 32) {
      sums = empty_sums<A>();
      if (threadIdx.x < kWarps) sums = of_warp[parity][threadIdx.x];
      sums = warp_combine(sums, scale);
      if (threadIdx.x == 0) {
        if (num_splits == 1) {
          store_stats(sums, stats + i * kNumStats);
        } else {
          partial[item] = sums;
        }
      }
    }
  }
}

// One thread per row: its parts in order.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    combine_splits(const LogitPairs<T> pairs, int num_splits, const PairSums<acc_t<T>>* partial, acc_t<T>* stats) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pairs.num_rows) return;
  const acc_t<T> scale = acc_t<T>(kLog2E) * pairs.inverse_temperature(i);
  PairSums<acc_t<T>> sums = partial[i * num_splits];
  for (int split = 1; split < num_splits; ++split) sums = combine(sums, partial[i * num_splits + split], scale);
  store_stats(sums, stats + i * kNumStats);
}

// d(stats)/d(student) with the maxima held fixed:
// (p (g1 + g4 (1 + ds - dt)) - g5 q) / temperature, p = exp(ds) and q = exp(dt) relative to the maxima.
template <class A>
struct KlGradient {
  A scale, student_shift, teacher_shift, constant, slope, of_teacher;

  template <class T>
  __device__ __forceinline__ KlGradient(const LogitPairs<T>& pairs, int64_t i, const A* row_max, const A* grad_stats) {
    const A per_logit = pairs.inverse_temperature(i);
    scale = A(kLog2E) * per_logit;
    const Shift<A> student(row_max[2 * i], scale), teacher(row_max[2 * i + 1], scale);
    const A* grad = grad_stats + i * kNumStats;
    const A factor = fast_exp2(-student.lost) * per_logit;
    student_shift = student.value;
    teacher_shift = teacher.value;
    slope = grad[4] * A(kLn2) * factor;
    constant = (grad[1] + grad[4]) * factor - slope * (student.lost - teacher.lost);
    of_teacher = grad[5] * fast_exp2(-teacher.lost) * per_logit;
  }
  __device__ __forceinline__ A operator()(A x, A y) const {
    const A ds = fma(x, scale, -student_shift), dt = fma(y, scale, -teacher_shift);
    const A p = fast_exp2(ds), q = fast_exp2(dt);
    const A weight = slope == A(0) ? constant : fma(ds - dt, slope, constant);  // avoids 0 * inf
    return (p == A(0) ? A(0) : p * weight) - q * of_teacher;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    backward(const LogitPairs<T> pairs, int num_splits, const acc_t<T>* row_max, const acc_t<T>* grad_stats) {
  for (int64_t item = blockIdx.x; item < pairs.num_rows * num_splits; item += gridDim.x) {
    const int64_t i = item / num_splits;
    T* student = pairs.student_row(i);
    const T* teacher = pairs.teacher_row(i);
    const KlGradient<acc_t<T>> gradient(pairs, i, row_max, grad_stats);
    overwrite_pairs<T, kThreads>(
        student, teacher, row_part<T>(student, teacher, pairs.columns, int(item - i * num_splits), num_splits), gradient);
  }
}

// log2 of p = softmax(student) and q = softmax(teacher), and of their mixture (1 - beta) p + beta q.
template <class A>
struct Mixture {
  A scale, student_lse, teacher_lse, beta;  // log-sum-exps in base 2

  template <class T>
  __device__ __forceinline__ Mixture(const LogitPairs<T>& pairs, int64_t i, const A* student, const A* teacher, A beta_)
      : scale(A(kLog2E) * pairs.inverse_temperature(i)), student_lse(student[i] * A(kLog2E)),
        teacher_lse(teacher[i] * A(kLog2E)), beta(beta_) {}
  __device__ __forceinline__ A student_log(A x) const { return fma(x, scale, -student_lse); }
  __device__ __forceinline__ A teacher_log(A y) const { return fma(y, scale, -teacher_lse); }
  __device__ __forceinline__ A mixture_log(A p, A q) const { return fast_log2(fma(beta, q, (A(1) - beta) * p)); }
};

// sums [R, 2] of p log(p / M) and q log(q / M); num_splits as above, partial [R, num_splits, 2] in base 2.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    js_forward(const LogitPairs<T> pairs, int num_splits, const acc_t<T>* student_lse, const acc_t<T>* teacher_lse,
               acc_t<T> beta, acc_t<T>* partial) {
  using A = acc_t<T>;
  MEGARL_SHARED(A, of_warp, [2][kWarps][2]);
  int parity = 0;
  for (int64_t item = blockIdx.x; item < pairs.num_rows * num_splits; item += gridDim.x, parity ^= 1) {
    const int64_t i = item / num_splits;
    const T *student = pairs.student_row(i), *teacher = pairs.teacher_row(i);
    const Mixture<A> mixture(pairs, i, student_lse, teacher_lse, beta);
    A of_student = 0, of_teacher = 0;
    for_pairs<T, kThreads>(student, teacher,
                           row_part(student, teacher, pairs.columns, int(item - i * num_splits), num_splits),
                           [&](const auto& x, const auto& y) {
                             A first = 0, second = 0;
#pragma unroll
                             for (int k = 0; k < int(sizeof(x) / sizeof(A)); ++k) {
                               const A ds = mixture.student_log(x[k]), dt = mixture.teacher_log(y[k]);
                               const A p = fast_exp2(ds), q = fast_exp2(dt), m = mixture.mixture_log(p, q);
                               if (p != A(0)) first = fma(p, ds - m, first);
                               if (q != A(0)) second = fma(q, dt - m, second);
                             }
                             of_student += first;
                             of_teacher += second;
                           });
    of_student = warp_sum(of_student);
    of_teacher = warp_sum(of_teacher);
    if (threadIdx.x % 32 == 0) {
      of_warp[parity][threadIdx.x / 32][0] = of_student;
      of_warp[parity][threadIdx.x / 32][1] = of_teacher;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      A sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += of_warp[parity][w][threadIdx.x];
      partial[item * 2 + threadIdx.x] = sum;
    }
  }
}

// One thread per row: its parts in order, in nats.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    js_combine_splits(int64_t num_rows, int num_splits, const acc_t<T>* partial, acc_t<T>* sums) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= num_rows) return;
  acc_t<T> student = 0, teacher = 0;
  for (int split = 0; split < num_splits; ++split) {
    student += partial[(i * num_splits + split) * 2];
    teacher += partial[(i * num_splits + split) * 2 + 1];
  }
  sums[i * 2] = student * acc_t<T>(kLn2);
  sums[i * 2 + 1] = teacher * acc_t<T>(kLn2);
}

// d/dx of (1 - beta) sum p log(p / M) + beta sum q log(q / M): (1 - beta) p (log(p / M) - student_sum) / temperature.
template <class A>
struct JsGradient {
  Mixture<A> mixture;
  A factor, student_sum;

  __device__ __forceinline__ A operator()(A x, A y) const {
    const A ds = mixture.student_log(x), p = fast_exp2(ds), q = fast_exp2(mixture.teacher_log(y));
    return p == A(0) ? A(0) : p * factor * ((ds - mixture.mixture_log(p, q)) * A(kLn2) - student_sum);
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    js_backward(const LogitPairs<T> pairs, int num_splits, const acc_t<T>* student_lse, const acc_t<T>* teacher_lse,
                acc_t<T> beta, const acc_t<T>* student_sum, const acc_t<T>* grad) {
  using A = acc_t<T>;
  for (int64_t item = blockIdx.x; item < pairs.num_rows * num_splits; item += gridDim.x) {
    const int64_t i = item / num_splits;
    T* student = pairs.student_row(i);
    const T* teacher = pairs.teacher_row(i);
    const JsGradient<A> gradient{Mixture<A>(pairs, i, student_lse, teacher_lse, beta),
                                 grad[i] * (A(1) - beta) * pairs.inverse_temperature(i), student_sum[i]};
    overwrite_pairs<T, kThreads>(
        student, teacher, row_part<T>(student, teacher, pairs.columns, int(item - i * num_splits), num_splits), gradient);
  }
}

}  // namespace megarl::vocab_kl
