// Launches of csrc/policy_loss/policy_loss_kernels.cuh for test_policy_loss.py.
#include "policy_loss/policy_loss_kernels.cuh"

namespace K = megarl::policy_loss;

namespace {

template <class T>
K::Arguments<T> arguments_of(const T* const* fields, int64_t num_tokens, const int64_t* ids, const double* sums,
                             int64_t num_sequences, const double* options) {
  K::Arguments<T> arguments{};
  arguments.options = megarl::make_policy_options(
      megarl::Objective(int(options[0])), options[1] != 0, megarl::Correction(int(options[2])), options[3] != 0,
      megarl::KlEstimator(int(options[4])), megarl::KlGradient(int(options[5])), options + 6);
  const bool sum_of_ratios = arguments.options.objective == megarl::Objective::vespo;
  arguments.tokens = {fields[0], fields[1], fields[2], fields[3],     fields[4], fields[5],
                      fields[6], ids,       sums,      sum_of_ratios, arguments.options.sequence_product};
  arguments.num_tokens = num_tokens;
  arguments.num_sequences = num_sequences;
  return arguments;
}

}  // namespace

#define FIELD_PARAMETERS(T)                                                                                          \
  const T *logprobs, const T *entropy, const T *old_logprobs, const T *advantages, const T *weights,                 \
      const T *ref_logprobs, const T *rollout_logprobs, int64_t num_tokens, const int64_t *ids, const double *sums,  \
      int64_t num_sequences, const double *options
#define ARGUMENTS(T)                                                                                                 \
  const T* fields[] = {logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs};        \
  const auto arguments = arguments_of<T>(fields, num_tokens, ids, sums, num_sequences, options)
#define DEFINE(SUFFIX, T)                                                                                            \
  extern "C" int policy_loss_##SUFFIX(FIELD_PARAMETERS(T), double* partial, unsigned* counter, double* out) {        \
    ARGUMENTS(T);                                                                                                    \
    const unsigned blocks = unsigned((num_tokens + K::kTokensPerBlock - 1) / K::kTokensPerBlock);                    \
    return simt::launch("policy_loss::forward", blocks, K::kThreads, 0,                                              \
                        [=] { K::forward<T>(arguments, partial, counter, out); });                                   \
  }                                                                                                                  \
  extern "C" int policy_loss_backward_##SUFFIX(FIELD_PARAMETERS(T), const T* grad_loss, T* grad, T* grad_entropy) {  \
    ARGUMENTS(T);                                                                                                    \
    return simt::launch("policy_loss::backward", unsigned((num_tokens + K::kThreads - 1) / K::kThreads), K::kThreads, \
                        0, [=] { K::backward<T>(arguments, grad_loss, grad, grad_entropy); });                       \
  }                                                                                                                  \
  extern "C" int sequence_sums_##SUFFIX(const T* logprobs, const T* old_logprobs, const T* rollout_logprobs,         \
                                        const T* weights, const int64_t* ids, int64_t num_tokens,                    \
                                        int64_t num_sequences, double* out) {                                        \
    return simt::launch("policy_loss::sequence_sums", unsigned(num_sequences), K::kThreads, 0, [=] {                 \
      K::sequence_sums<T>(logprobs, old_logprobs, rollout_logprobs, weights, ids, num_tokens, out);                  \
    });                                                                                                              \
  }
DEFINE(float32, float)
DEFINE(float64, double)
