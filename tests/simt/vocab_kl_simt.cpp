// Launches of csrc/vocab_kl/vocab_kl_kernels.cuh for test_vocab_kl.py.
#include "vocab_kl/vocab_kl_kernels.cuh"

namespace K = megarl::vocab_kl;
using megarl::acc_t;
using megarl::LogitPairs;

namespace {

unsigned row_blocks(int64_t rows) { return unsigned((rows + K::kThreads - 1) / K::kThreads); }

template <class T>
LogitPairs<T> pairs_of(void* student, int64_t student_stride, const void* teacher, int64_t teacher_stride,
                       int64_t columns, int64_t rows, const float* temperature, int64_t num_temperatures) {
  return {static_cast<T*>(student), static_cast<const T*>(teacher), student_stride, teacher_stride, int(columns), rows,
          temperature, num_temperatures == 1};
}

template <class T>
int kl(LogitPairs<T> pairs, int splits, unsigned grid, void* stats_, void* partial_) {
  auto* stats = static_cast<acc_t<T>*>(stats_);
  auto* partial = static_cast<K::PairSums<acc_t<T>>*>(partial_);
  const int failed = simt::launch("vocab_kl::forward", grid, K::kThreads, 0,
                                  [=] { K::forward<T>(pairs, splits, stats, partial); });
  if (failed || splits == 1) return failed;
  return simt::launch("vocab_kl::combine_splits", row_blocks(pairs.num_rows), K::kThreads, 0,
                      [=] { K::combine_splits<T>(pairs, splits, partial, stats); });
}

template <class T>
int js(LogitPairs<T> pairs, int splits, unsigned grid, const void* student_lse_, const void* teacher_lse_, double beta,
       void* sums_, void* partial_) {
  auto *student_lse = static_cast<const acc_t<T>*>(student_lse_), *teacher_lse = static_cast<const acc_t<T>*>(teacher_lse_);
  auto *sums = static_cast<acc_t<T>*>(sums_), *partial = static_cast<acc_t<T>*>(partial_);
  const int failed = simt::launch("vocab_kl::js_forward", grid, K::kThreads, 0, [=] {
    K::js_forward<T>(pairs, splits, student_lse, teacher_lse, acc_t<T>(beta), partial);
  });
  if (failed) return failed;
  return simt::launch("vocab_kl::js_combine_splits", row_blocks(pairs.num_rows), K::kThreads, 0,
                      [=] { K::js_combine_splits<T>(pairs.num_rows, splits, partial, sums); });
}

}  // namespace

#define PAIR_PARAMETERS                                                                                           \
  void *student, int64_t student_stride, const void *teacher, int64_t teacher_stride, int64_t columns,            \
      int64_t rows, const float *temperature, int64_t num_temperatures, int64_t splits, int64_t grid
#define PAIRS(T) \
  pairs_of<T>(student, student_stride, teacher, teacher_stride, columns, rows, temperature, num_temperatures)
#define DEFINE(SUFFIX, T)                                                                                         \
  extern "C" int vocab_kl_##SUFFIX(PAIR_PARAMETERS, void* stats, void* partial) {                                 \
    return kl<T>(PAIRS(T), int(splits), unsigned(grid), stats, partial);                                          \
  }                                                                                                               \
  extern "C" int vocab_kl_backward_##SUFFIX(PAIR_PARAMETERS, const acc_t<T>* row_max, const acc_t<T>* grads) {    \
    const auto pairs = PAIRS(T);                                                                                  \
    return simt::launch("vocab_kl::backward", unsigned(grid), K::kThreads, 0,                                     \
                        [=] { K::backward<T>(pairs, int(splits), row_max, grads); });                             \
  }                                                                                                               \
  extern "C" int vocab_js_##SUFFIX(PAIR_PARAMETERS, const void* student_lse, const void* teacher_lse,             \
                                   double beta, void* sums, void* partial) {                                      \
    return js<T>(PAIRS(T), int(splits), unsigned(grid), student_lse, teacher_lse, beta, sums, partial);           \
  }                                                                                                               \
  extern "C" int vocab_js_backward_##SUFFIX(PAIR_PARAMETERS, const acc_t<T>* student_lse,                         \
                                            const acc_t<T>* teacher_lse, double beta, const acc_t<T>* student_sum, \
                                            const acc_t<T>* grad) {                                               \
    const auto pairs = PAIRS(T);                                                                                  \
    return simt::launch("vocab_kl::js_backward", unsigned(grid), K::kThreads, 0, [=] {                            \
      K::js_backward<T>(pairs, int(splits), student_lse, teacher_lse, acc_t<T>(beta), student_sum, grad);         \
    });                                                                                                           \
  }
DEFINE(float32, float)
DEFINE(bfloat16, __nv_bfloat16)
DEFINE(float16, __half)
DEFINE(float64, double)
