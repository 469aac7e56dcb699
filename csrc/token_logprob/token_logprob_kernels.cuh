// Per-token softmax statistics over a vocabulary shard, and their gradient in place. No torch in here.
//
// A work item is one part of one row; each block takes items at a stride of the grid. Every element is read once
// (forward), or read and written once (backward), 128 bits at a time with kVectorsInFlight loads before the first use.
// exp is taken in base 2, log2(e) / temperature folded into one multiply-add per element.
#pragma once

#include "common/online_softmax.cuh"
#include "common/row_vectors.cuh"

namespace megarl::token_logprob {

constexpr int kThreads = 256;
// Blocks resident on an SM, which bounds the registers; n x 256 threads x 64 bytes are in flight (docs/kernels.md).
template <class T>
constexpr int kForwardBlocksPerSm = sizeof(T) == 8 ? 2 : 4;
template <class T>
constexpr int kBackwardBlocksPerSm = sizeof(T) == 8 ? 2 : 3;
constexpr int kNumStats = 4;     // maximum, sum of exp, target's logit, sum of d * exp(d)
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
struct Rows {
  T* logits;
  int64_t stride;      // elements from row to row
  int64_t num_logits;  // rows of logits
  int columns;
  int64_t num_rows;           // R, rows evaluated
  const int64_t* targets;     // [R], global ids
  int64_t vocab_start;
  const float* temperature;   // [1] or [R]
  bool one_temperature;
  const int64_t* row_index;   // [R] or null
  const acc_t<T>* min_logit;  // [R] or null

  __device__ __forceinline__ T* row(int64_t i) const {
    const int64_t r = row_index ? row_index[i] : i;
    MEGARL_DEVICE_CHECK(r >= 0 && r < num_logits, "row_index is outside the rows of logits");
    return logits + r * stride;
  }
  // Column of the target in this shard, or -1.
  __device__ __forceinline__ int target_column(int64_t i) const {
    const int64_t column = targets[i] - vocab_start;
    return column >= 0 && column < columns ? int(column) : -1;
  }
  // exp(d / temperature) = 2^(d * scale).
  __device__ __forceinline__ acc_t<T> base2_scale(int64_t i) const {
    return acc_t<T>(kLog2E) / acc_t<T>(temperature[one_temperature ? 0 : i]);
  }
};

template <class T, bool kMasked>
__device__ __forceinline__ acc_t<T> element(T x, acc_t<T> minimum) {
  const acc_t<T> value = widen(x);
  return kMasked && value < minimum ? negative_infinity<acc_t<T>>() : value;
}

template <class T, bool kMasked>
__device__ __forceinline__ void add_group(const Vector<T> (&group)[kVectorsInFlight], acc_t<T> minimum,
                                          OnlineSoftmax<acc_t<T>>& softmax) {
  acc_t<T> x[kThreadElements<T>];
#pragma unroll
  for (int i = 0; i < kThreadElements<T>; ++i) {
    x[i] = element<T, kMasked>(group[i / kVectorSize<T>].values[i % kVectorSize<T>], minimum);
  }
  softmax.add(x);
}

// This thread's share of one part of a row.
template <class T, bool kMasked>
__device__ __forceinline__ SoftmaxSums<acc_t<T>> thread_sums(const T* row, const RowPart& part, acc_t<T> minimum,
                                                             acc_t<T> scale) {
  constexpr int size = kVectorSize<T>, step = kThreads * size;
  OnlineSoftmax<acc_t<T>> softmax(scale);
  int column = part.begin + int(threadIdx.x) * size;
  for (; column + (kVectorsInFlight - 1) * step < part.end; column += kVectorsInFlight * step) {
    Vector<T> group[kVectorsInFlight];
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) group[k] = load_vector_readonly(row + column + k * step);
    add_group<T, kMasked>(group, minimum, softmax);
  }
  if (column < part.end) {  // fewer vectors than a group: the missing ones are -inf
    Vector<T> group[kVectorsInFlight];
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) {
      if (column + k * step < part.end) {
        group[k] = load_vector_readonly(row + column + k * step);
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i) group[k].values[i] = narrow<T>(negative_infinity<acc_t<T>>());
      }
    }
    add_group<T, kMasked>(group, minimum, softmax);
  }
  const int head = int(threadIdx.x), tail = part.tail_begin + int(threadIdx.x);
  if (head < part.head_end) {
    const acc_t<T> x[1] = {element<T, kMasked>(row[head], minimum)};
    softmax.add(x);
  }
  if (tail < part.tail_end) {
    const acc_t<T> x[1] = {element<T, kMasked>(row[tail], minimum)};
    softmax.add(x);
  }
  return softmax.sums();
}

// stats[R, 4] from sums; `sums.weighted` is in base 2. The target belongs to the support even if it is masked.
template <class T>
__device__ __forceinline__ void store_stats(const Rows<T>& rows, int64_t i, SoftmaxSums<acc_t<T>> sums, acc_t<T> scale,
                                            acc_t<T>* stats) {
  using A = acc_t<T>;
  const int column = rows.target_column(i);
  const A target = column < 0 ? negative_infinity<A>() : A(widen(rows.row(i)[column]));
  // A target of -inf adds nothing; combine accepts parts with a finite maximum, or with sums of 0.
  if (rows.min_logit && target > negative_infinity<A>() && target < rows.min_logit[i]) {
    sums = combine(sums, {target, A(1), A(0)}, scale);
  }
  stats[i * kNumStats + 0] = sums.maximum;
  stats[i * kNumStats + 1] = sums.sum;
  stats[i * kNumStats + 2] = target;
  stats[i * kNumStats + 3] = sums.weighted * A(kLn2);
}

// Statistics of all rows; with num_splits > 1 the sums of each part go to partial [R, num_splits] instead, for
// combine_splits.
template <class T, bool kMasked>
__global__ void __launch_bounds__(kThreads, kForwardBlocksPerSm<T>)
    forward(const Rows<T> rows, int num_splits, acc_t<T>* stats, SoftmaxSums<acc_t<T>>* partial) {
  using A = acc_t<T>;
  constexpr int kWarps = kThreads / 32;
  MEGARL_SHARED(SoftmaxSums<A>, of_warp, [2][kWarps]);  // double-buffered: one barrier per item is enough
  int parity = 0;
  for (int64_t item = blockIdx.x; item < rows.num_rows * num_splits; item += gridDim.x, parity ^= 1) {
    const int64_t i = item / num_splits;
    const int split = int(item - i * num_splits);
    const T* row = rows.row(i);
    const A scale = rows.base2_scale(i);
    const A minimum = kMasked ? rows.min_logit[i] : A(0);
    const RowPart part = row_part(row, rows.columns, split, num_splits);
    SoftmaxSums<A> sums = warp_combine(thread_sums<T, kMasked>(row, part, minimum, scale), scale);
    if (threadIdx.x % 32 == 0) of_warp[parity][threadIdx.x / 32] = sums;
    __syncthreads();
    if (threadIdx.x < 32) {
      sums = {negative_infinity<A>(), A(0), A(0)};
      if (threadIdx.x < kWarps) sums = of_warp[parity][threadIdx.x];
      sums = warp_combine(sums, scale);
      if (threadIdx.x == 0) {
        if (num_splits == 1) {
          store_stats(rows, i, sums, scale, stats);
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
    combine_splits(const Rows<T> rows, int num_splits, const SoftmaxSums<acc_t<T>>* partial, acc_t<T>* stats) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows.num_rows) return;
  const acc_t<T> scale = rows.base2_scale(i);
  SoftmaxSums<acc_t<T>> sums = partial[i * num_splits];
  for (int split = 1; split < num_splits; ++split) sums = combine(sums, partial[i * num_splits + split], scale);
  store_stats(rows, i, sums, scale, stats);
}

// d(stats)/dx with the maximum held fixed: 2^d (constant + slope d) with d in base 2, and on_target at the target.
template <class A>
struct RowGradient {
  A scale, shift, constant, slope, on_target, minimum;

  // Any maximum works as a shift as long as exp does not overflow; an empty one (-inf) has gradient 0 everywhere.
  template <class T>
  __device__ __forceinline__ RowGradient(const Rows<T>& rows, int64_t i, const A* row_max, const A* grad_stats)
      : scale(rows.base2_scale(i)), on_target(grad_stats[i * kNumStats + 2]) {
    const A of_sum = grad_stats[i * kNumStats + 1], of_weighted = grad_stats[i * kNumStats + 3];
    const Shift<A> rounded(row_max[i], scale);
    const A per_logit = scale * A(kLn2);  // 1 / temperature
    const A factor = fast_exp2(-rounded.lost) * per_logit;
    shift = rounded.value;
    slope = of_weighted * A(kLn2) * factor;
    constant = (of_sum + of_weighted) * factor - slope * rounded.lost;
    minimum = rows.min_logit ? rows.min_logit[i] : A(0);
  }
  __device__ __forceinline__ A at(A x) const {
    const A d = fma(x, scale, -shift);
    return fast_exp2(d) * fma(max(d, kVanishing<A>), slope, constant);
  }
};

template <class T, bool kMasked>
__device__ __forceinline__ T gradient(const RowGradient<acc_t<T>>& row, T logit, bool is_target) {
  const acc_t<T> x = widen(logit);
  if (is_target) return narrow<T>(row.at(x) + row.on_target);
  return kMasked && x < row.minimum ? narrow<T>(0) : narrow<T>(row.at(x));
}

template <class T, bool kMasked>
__device__ __forceinline__ void overwrite_vector(const RowGradient<acc_t<T>>& row_gradient, T* row,
                                                 const Vector<T>& x, int column, int target_column) {
  Vector<T> result;
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) result.values[i] = gradient<T, kMasked>(row_gradient, x.values[i], false);
  const bool has_target = target_column >= column && target_column < column + kVectorSize<T>;
  T target_logit{};
  if (has_target) target_logit = row[target_column];  // read again: picking it out of x would cost every vector
  store_vector(row + column, result);
  if (has_target) row[target_column] = gradient<T, kMasked>(row_gradient, target_logit, true);
}

template <class T, bool kMasked>
__device__ __forceinline__ void overwrite_part(const RowGradient<acc_t<T>>& row_gradient, T* row, const RowPart& part,
                                               int target_column) {
  constexpr int size = kVectorSize<T>, step = kThreads * size;
  for (int column = part.begin + int(threadIdx.x) * size; column < part.end; column += kVectorsInFlight * step) {
    Vector<T> group[kVectorsInFlight];
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) {
      if (column + k * step < part.end) group[k] = load_vector(row + column + k * step);
    }
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) {
      const int at = column + k * step;
      if (at < part.end) overwrite_vector<T, kMasked>(row_gradient, row, group[k], at, target_column);
    }
  }
  const int head = int(threadIdx.x), tail = part.tail_begin + int(threadIdx.x);
  if (head < part.head_end) row[head] = gradient<T, kMasked>(row_gradient, row[head], head == target_column);
  if (tail < part.tail_end) row[tail] = gradient<T, kMasked>(row_gradient, row[tail], tail == target_column);
}

template <class T, bool kMasked>
__global__ void __launch_bounds__(kThreads, kBackwardBlocksPerSm<T>)
    backward(const Rows<T> rows, int num_splits, const acc_t<T>* row_max, const acc_t<T>* grad_stats) {
  for (int64_t item = blockIdx.x; item < rows.num_rows * num_splits; item += gridDim.x) {
    const int64_t i = item / num_splits;
    T* row = rows.row(i);
    const RowPart part = row_part(row, rows.columns, int(item - i * num_splits), num_splits);
    const RowGradient<acc_t<T>> row_gradient(rows, i, row_max, grad_stats);
    overwrite_part<T, kMasked>(row_gradient, row, part, rows.target_column(i));
  }
}

}  // namespace megarl::token_logprob
