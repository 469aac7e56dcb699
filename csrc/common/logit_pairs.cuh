// Two distributions over one vocabulary, read together: the student's logits and the teacher's.
#pragma once

#include "common/online_softmax.cuh"
#include "common/row_vectors.cuh"

namespace megarl {

constexpr int kPairsInFlight = 2;  // vectors of each row a thread loads before it uses the first: 4 loads in all

template <class T>
struct LogitPairs {
  T* student;
  const T* teacher;
  int64_t student_stride, teacher_stride;  // elements from row to row
  int columns;
  int64_t num_rows;
  const float* temperature;  // [1] or [R]
  bool one_temperature;

  __device__ __forceinline__ T* student_row(int64_t i) const { return student + i * student_stride; }
  __device__ __forceinline__ const T* teacher_row(int64_t i) const { return teacher + i * teacher_stride; }
  __device__ __forceinline__ acc_t<T> inverse_temperature(int64_t i) const {
    return acc_t<T>(1) / acc_t<T>(temperature[one_temperature ? 0 : i]);
  }
};

template <class T, class Add>
__device__ __forceinline__ void add_pairs(const Vector<T> (&student)[kPairsInFlight],
                                          const Vector<T> (&teacher)[kPairsInFlight], const Add& add) {
  constexpr int size = kVectorSize<T>, group = size * kPairsInFlight;
  acc_t<T> x[group], y[group];
#pragma unroll
  for (int i = 0; i < group; ++i) {
    x[i] = widen(student[i / size].values[i % size]);
    y[i] = widen(teacher[i / size].values[i % size]);
  }
  add(x, y);
}

// Calls add(student's elements, teacher's elements) with arrays of the same, constant length until this thread's share
// of the part is done. Missing elements are -inf in both.
template <class T, int kThreads, class Add>
__device__ __forceinline__ void for_pairs(const T* student, const T* teacher, const RowPart& part, const Add& add) {
  using A = acc_t<T>;
  constexpr int size = kVectorSize<T>, step = kThreads * size;
  int column = part.begin + int(threadIdx.x) * size;
  for (; column + (kPairsInFlight - 1) * step < part.end; column += kPairsInFlight * step) {
    Vector<T> s[kPairsInFlight], t[kPairsInFlight];
#pragma unroll
    for (int k = 0; k < kPairsInFlight; ++k) {
      s[k] = load_vector_readonly(student + column + k * step);
      t[k] = load_vector_readonly(teacher + column + k * step);
    }
    add_pairs(s, t, add);
  }
  if (column < part.end) {
    Vector<T> s[kPairsInFlight], t[kPairsInFlight];
#pragma unroll
    for (int k = 0; k < kPairsInFlight; ++k) {
      if (column + k * step < part.end) {
        s[k] = load_vector_readonly(student + column + k * step);
        t[k] = load_vector_readonly(teacher + column + k * step);
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i) s[k].values[i] = t[k].values[i] = narrow<T>(negative_infinity<A>());
      }
    }
    add_pairs(s, t, add);
  }
  auto add_single = [&](int column) {
    const A x[1] = {A(widen(student[column]))}, y[1] = {A(widen(teacher[column]))};
    add(x, y);
  };
  for (int column = part.head_begin + int(threadIdx.x); column < part.head_end; column += kThreads) add_single(column);
  for (int column = part.tail_begin + int(threadIdx.x); column < part.tail_end; column += kThreads) add_single(column);
}

// student[j] = gradient(student[j], teacher[j]) over this thread's share of the part.
template <class T, int kThreads, class Gradient>
__device__ __forceinline__ void overwrite_pairs(T* student, const T* teacher, const RowPart& part,
                                                const Gradient& gradient) {
  constexpr int size = kVectorSize<T>, step = kThreads * size;
  for (int column = part.begin + int(threadIdx.x) * size; column < part.end; column += kPairsInFlight * step) {
    Vector<T> s[kPairsInFlight], t[kPairsInFlight];
#pragma unroll
    for (int k = 0; k < kPairsInFlight; ++k) {
      if (column + k * step < part.end) {
        s[k] = load_vector(student + column + k * step);
        t[k] = load_vector_readonly(teacher + column + k * step);
      }
    }
#pragma unroll
    for (int k = 0; k < kPairsInFlight; ++k) {
      if (column + k * step < part.end) {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          s[k].values[i] = narrow<T>(gradient(widen(s[k].values[i]), widen(t[k].values[i])));
        }
        store_vector(student + column + k * step, s[k]);
      }
    }
  }
  auto overwrite_single = [&](int column) {
    student[column] = narrow<T>(gradient(widen(student[column]), widen(teacher[column])));
  };
  for (int column = part.head_begin + int(threadIdx.x); column < part.head_end; column += kThreads) overwrite_single(column);
  for (int column = part.tail_begin + int(threadIdx.x); column < part.tail_end; column += kThreads) overwrite_single(column);
}

}  // namespace megarl
