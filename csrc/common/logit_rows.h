// Read and write rows of logits in blocks that stay in the L1 cache; CPU only.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>

namespace megarl {

using at::vec::Vectorized;

// 4 KiB of float32: two passes over a block (maximum, then exponentials) read memory once.
constexpr int64_t kBlock = 1024;

// The type of sums and statistics: float32, but float64 for float64 logits.
template <typename scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline at::ScalarType stats_dtype(at::ScalarType logits) {
  return logits == at::kDouble ? at::kDouble : at::kFloat;
}

// Size of a block of n values padded to whole vectors.
template <typename acc>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t size = Vectorized<acc>::size();
  return (n + size - 1) / size * size;
}

template <typename scalar_t>
inline void widen(const scalar_t* source, float* target, int64_t n) {
  constexpr int64_t size = Vectorized<float>::size();
  int64_t i = 0;
  Vectorized<float> values;
  for (; i + size <= n; i += size) {
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      at::vec::load_fp32_from_bf16(source + i, values);
    } else {
      at::vec::load_fp32_from_fp16(source + i, values);
    }
    values.store(target + i);
  }
  for (; i < n; ++i) target[i] = static_cast<float>(source[i]);
}

template <typename scalar_t>
inline void narrow(const float* source, scalar_t* target, int64_t n) {
  using Narrow = Vectorized<scalar_t>;
  constexpr int64_t size = Vectorized<float>::size();
  int64_t i = 0;
  for (; i + 2 * size <= n; i += 2 * size) {
    const auto low = Vectorized<float>::loadu(source + i);
    const auto high = Vectorized<float>::loadu(source + i + size);
    Narrow both = at::vec::convert_from_float<scalar_t>(low, high);
    both.store(target + i);
  }
  for (; i < n; ++i) target[i] = static_cast<scalar_t>(source[i]);
}

// n <= kBlock logits as whole vectors of accumulation type: the row itself if possible, else a copy in `buffer`.
// Padding, and logits below `minimum`, read as -inf.
template <typename scalar_t>
inline const acc_t<scalar_t>* load_block(
    const scalar_t* source, int64_t n, std::optional<acc_t<scalar_t>> minimum, acc_t<scalar_t>* buffer) {
  using acc = acc_t<scalar_t>;
  using Vec = Vectorized<acc>;
  constexpr acc lowest = -std::numeric_limits<acc>::infinity();
  const int64_t end = padded<acc>(n);
  if constexpr (std::is_same_v<scalar_t, acc>) {
    if (n == end && !minimum) return source;
    std::memcpy(buffer, source, n * sizeof(acc));
  } else {
    widen(source, buffer, n);
  }
  std::fill(buffer + n, buffer + end, lowest);
  if (minimum) {
    for (int64_t i = 0; i < end; i += Vec::size()) {
      const Vec values = Vec::loadu(buffer + i);
      Vec::blendv(values, Vec(lowest), values < Vec(*minimum)).store(buffer + i);
    }
  }
  return buffer;
}

template <typename scalar_t>
inline void store_block(const acc_t<scalar_t>* buffer, scalar_t* target, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, acc_t<scalar_t>>) {
    std::memcpy(target, buffer, n * sizeof(scalar_t));
  } else {
    narrow(buffer, target, n);
  }
}

// While it exists, this thread flushes denormal float results to 0: exponentials too small to matter then cost what
// others do, and 2^-127 is exactly 0.
class FlushDenormals {
 public:
#if defined(CPU_CAPABILITY_AVX512)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Each row is computed by one thread, in one order: results do not depend on the number of threads, nor on the
// assignment of rows. Threads take about 64 Ki logits at a time (some 10 us) rather than equal shares at once, so
// a thread that wakes late or is interrupted does not delay the others.
template <typename F>
inline void for_rows(int64_t rows, int64_t columns, const F& body) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, columns));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (rows + grain - 1) / grain);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const FlushDenormals flush;
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < rows;) {
      const int64_t end = std::min(rows, begin + grain);
      for (int64_t row = begin; row < end; ++row) body(row);
    }
  });
}

}  // namespace megarl
