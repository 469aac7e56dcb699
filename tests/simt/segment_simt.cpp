// Launches of the kernels in csrc/segment for test_segment.py.
#include "segment/segment_reduce_kernels.cuh"

namespace reduce = megarl::segment_reduce;

#define DEFINE_REDUCE(SUFFIX, T)                                                                                     \
  extern "C" int segment_reduce_##SUFFIX(const T* values, const int32_t* cu, int64_t segments, const float* mask,    \
                                         int64_t num_values, int64_t mean, T* reduced) {                             \
    return simt::launch("segment_reduce::forward", unsigned(segments), reduce::kThreads, 0,                          \
                        [=] { reduce::forward<T>(values, cu, mask, num_values, mean != 0, reduced); });              \
  }                                                                                                                  \
  extern "C" int segment_reduce_backward_##SUFFIX(const T* grad, int64_t stride, const int32_t* cu,                  \
                                                  int64_t segments, const float* mask, int64_t num_values,           \
                                                  int64_t mean, T* grad_values) {                                    \
    return simt::launch("segment_reduce::backward", unsigned(segments), reduce::kThreads, 0,                         \
                        [=] { reduce::backward<T>(grad, stride, cu, mask, num_values, mean != 0, grad_values); });   \
  }
DEFINE_REDUCE(float32, float)
DEFINE_REDUCE(bfloat16, __nv_bfloat16)
DEFINE_REDUCE(float16, __half)
DEFINE_REDUCE(float64, double)
