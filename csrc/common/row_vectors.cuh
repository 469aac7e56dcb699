// Walk along rows of logits with 128-bit accesses, whatever their alignment and length.
#pragma once

#include "common/simt_portable.cuh"

namespace megarl {

constexpr int kVectorBytes = 16;
constexpr int kVectorsInFlight = 4;  // independent loads a thread issues before it uses the first

// Elements of T that one 128-bit access moves.
template <class T>
constexpr int kVectorSize = kVectorBytes / int(sizeof(T));
// Elements one thread holds at a time.
template <class T>
constexpr int kThreadElements = kVectorSize<T> * kVectorsInFlight;

template <class T>
struct alignas(kVectorBytes) Vector {
  T values[kVectorSize<T>];
};

// Through the read-only path; not for memory this kernel writes.
template <class T>
__device__ __forceinline__ Vector<T> load_vector_readonly(const T* address) {
  union {
    uint4 bits;
    Vector<T> vector;
  } loaded;
  loaded.bits = __ldg(reinterpret_cast<const uint4*>(address));
  return loaded.vector;
}

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T>*>(address);
}

template <class T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& vector) {
  *reinterpret_cast<Vector<T>*>(address) = vector;
}

// Part `split` of `num_splits` of a row: [begin, end) in whole aligned vectors, and single elements: up to
// 2 * (vector size - 1) that alignment leaves over at the row's ends. Each column belongs to exactly one part.
struct RowPart {
  int begin, end;            // columns, covered by whole vectors
  int head_begin, head_end;  // singles
  int tail_begin, tail_end;
};

template <class T>
__device__ __forceinline__ int misalignment(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T));
}

template <class T>
__device__ __forceinline__ RowPart row_part(const T* row, int columns, int split, int num_splits) {
  constexpr int size = kVectorSize<T>;
  const int misaligned = misalignment(row);
  const int head = min(columns, misaligned == 0 ? 0 : size - misaligned);
  const int vectors = (columns - head) / size;
  const int per_split = (vectors + num_splits - 1) / num_splits;
  const int first = min(vectors, split * per_split), last = min(vectors, first + per_split);
  RowPart part;
  part.begin = head + first * size;
  part.end = head + last * size;
  part.head_begin = 0;
  part.head_end = split == 0 ? head : 0;
  part.tail_begin = head + vectors * size;
  part.tail_end = split == num_splits - 1 ? columns : part.tail_begin;
  return part;
}

// The same for two rows read together. If their misalignments differ, all elements are singles: correct, but far
// slower; this never happens for rows of whole vectors (every model's padded vocabulary).
template <class T>
__device__ __forceinline__ RowPart row_part(const T* row, const T* other, int columns, int split, int num_splits) {
  if (misalignment(row) == misalignment(other)) return row_part(row, columns, split, num_splits);
  const int per_split = (columns + num_splits - 1) / num_splits;
  const int first = min(columns, split * per_split), last = min(columns, first + per_split);
  return {0, 0, first, last, columns, columns};
}

// Number of parts per row so that `slots` blocks (those resident at once) are evenly busy: the fewest parts whose
// last wave wastes at most 1/16 of the device, else the best found. Short rows are not cut.
inline int plan_splits(int64_t rows, int64_t columns, int64_t slots, int64_t elements_per_block) {
  const int64_t most = columns / (2 * elements_per_block) < 1 ? 1 : columns / (2 * elements_per_block);
  int best = 1;
  double best_efficiency = 0;
  for (int64_t splits = 1; splits <= most && splits <= 1024; ++splits) {
    const int64_t items = rows * splits, waves = (items + slots - 1) / slots;
    const double efficiency = double(items) / double(waves * slots);
    if (efficiency > best_efficiency + 1e-9) {
      best = int(splits);
      best_efficiency = efficiency;
    }
    if (efficiency >= 0.9375) break;
  }
  return best;
}

}  // namespace megarl
