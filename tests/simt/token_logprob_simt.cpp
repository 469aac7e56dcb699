// Launches of csrc/token_logprob/token_logprob_kernels.cuh for test_token_logprob.py.
#include "token_logprob/token_logprob_kernels.cuh"

namespace K = megarl::token_logprob;
using megarl::acc_t;

namespace {

template <class T>
K::Rows<T> rows_of(void* logits, int64_t stride, int64_t num_logits, int64_t columns, int64_t num_rows,
                   const int64_t* targets, int64_t vocab_start, const float* temperature, int64_t num_temperatures,
                   const int64_t* row_index, const void* min_logit) {
  return {static_cast<T*>(logits), stride, num_logits, int(columns), num_rows, targets, vocab_start, temperature,
          num_temperatures == 1, row_index, static_cast<const acc_t<T>*>(min_logit)};
}

template <class T, bool kMasked>
int forward(K::Rows<T> rows, int num_splits, unsigned grid, void* stats_, void* partial_) {
  auto* stats = static_cast<acc_t<T>*>(stats_);
  auto* partial = static_cast<megarl::SoftmaxSums<acc_t<T>>*>(partial_);
  int failed = simt::launch("token_logprob::forward", grid, K::kThreads, 0,
                            [=] { K::forward<T, kMasked>(rows, num_splits, stats, partial); });
  if (!failed && num_splits > 1) {
    const unsigned blocks = unsigned((rows.num_rows + K::kThreads - 1) / K::kThreads);
    failed = simt::launch("token_logprob::combine_splits", blocks, K::kThreads, 0,
                          [=] { K::combine_splits<T>(rows, num_splits, partial, stats); });
  }
  return failed;
}

template <class T, bool kMasked>
int backward(K::Rows<T> rows, int num_splits, unsigned grid, const void* row_max_, const void* grad_stats_) {
  auto* row_max = static_cast<const acc_t<T>*>(row_max_);
  auto* grad_stats = static_cast<const acc_t<T>*>(grad_stats_);
  return simt::launch("token_logprob::backward", grid, K::kThreads, 0,
                      [=] { K::backward<T, kMasked>(rows, num_splits, row_max, grad_stats); });
}

}  // namespace

#define ROW_PARAMETERS                                                                                             \
  void *logits, int64_t stride, int64_t num_logits, int64_t columns, int64_t num_rows, const int64_t *targets,     \
      int64_t vocab_start, const float *temperature, int64_t num_temperatures, const int64_t *row_index,           \
      const void *min_logit, int64_t num_splits, int64_t grid
#define ROWS(T)                                                                                                    \
  rows_of<T>(logits, stride, num_logits, columns, num_rows, targets, vocab_start, temperature, num_temperatures,   \
             row_index, min_logit)
#define DEFINE(SUFFIX, T)                                                                                          \
  extern "C" int token_logprob_##SUFFIX(ROW_PARAMETERS, void* stats, void* partial) {                              \
    return min_logit ? forward<T, true>(ROWS(T), int(num_splits), unsigned(grid), stats, partial)                  \
                     : forward<T, false>(ROWS(T), int(num_splits), unsigned(grid), stats, partial);                \
  }                                                                                                                \
  extern "C" int token_logprob_backward_##SUFFIX(ROW_PARAMETERS, const void* row_max, const void* grad_stats) {    \
    return min_logit ? backward<T, true>(ROWS(T), int(num_splits), unsigned(grid), row_max, grad_stats)            \
                     : backward<T, false>(ROWS(T), int(num_splits), unsigned(grid), row_max, grad_stats);          \
  }
DEFINE(float32, float)
DEFINE(bfloat16, __nv_bfloat16)
DEFINE(float16, __half)
DEFINE(float64, double)

extern "C" int64_t token_logprob_plan_splits(int64_t rows, int64_t columns, int64_t slots, int64_t elements) {
  return megarl::plan_splits(rows, columns, slots, elements);
}
