// Launches of the kernels in csrc/segment for test_segment.py.
#include "segment/gae_kernels.cuh"
#include "segment/group_advantage_kernels.cuh"
#include "segment/segment_reduce_kernels.cuh"

namespace reduce = megarl::segment_reduce;
namespace advantage = megarl::group_advantage;
namespace gae = megarl::gae;

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

#define DEFINE_ADVANTAGES(SUFFIX, T)                                                                                 \
  extern "C" int gae_##SUFFIX(const T* rewards, const T* values, const float* mask, const int32_t* cu,               \
                              int64_t segments, int64_t num_tokens, double gamma, double lambda, T* advantages,      \
                              T* returns) {                                                                          \
    const gae::Tensors<T> tensors{rewards, values, mask, advantages, returns};                                       \
    return simt::launch("gae::forward", unsigned(segments), gae::kThreads, 0,                                        \
                        [=] { gae::forward<T>(tensors, cu, num_tokens, gamma, lambda); });                           \
  }                                                                                                                  \
  extern "C" int group_advantage_##SUFFIX(const T* rewards, const int32_t* cu, int64_t groups, int64_t num_rewards,  \
                                          int64_t leave_one_out, int64_t normalize_std, double epsilon, T* out) {    \
    const unsigned blocks = unsigned((groups + advantage::kWarps - 1) / advantage::kWarps);                          \
    return simt::launch("group_advantage::forward", blocks, advantage::kThreads, 0, [=] {                            \
      advantage::forward<T>(rewards, cu, groups, num_rewards, leave_one_out != 0, normalize_std != 0, epsilon, out); \
    });                                                                                                              \
  }
DEFINE_ADVANTAGES(float32, float)
DEFINE_ADVANTAGES(float64, double)
