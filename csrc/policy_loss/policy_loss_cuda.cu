// Launchers of policy_loss on CUDA. See csrc/bindings.cpp for the schemas.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_launch.h"
#include "policy_loss/policy_loss_kernels.cuh"
#include "policy_loss/policy_options.h"

namespace megarl {
namespace {

namespace kernels = policy_loss;

template <class T>
kernels::Arguments<T> kernel_arguments(const PolicyArguments& arguments, const PolicyOptions& options) {
  const bool sequences = arguments.sequence_sums.defined();
  return {arguments.tokens<T>(), options, arguments.logprobs.size(0), sequences ? arguments.sequence_sums.size(0) : 0};
}

// The kernels check the values of sequence_ids: checking them here would sync the device.
at::Tensor policy_sequence_sums_cuda(const at::Tensor& logprobs, const at::Tensor& old_logprobs,
                                     const OptionalTensor& rollout_logprobs, const at::Tensor& weights,
                                     const at::Tensor& sequence_ids, int64_t num_sequences) {
  constexpr const char* op = "policy_sequence_sums";
  const PolicyArguments arguments(op, PolicyOptions{}, logprobs, std::nullopt, old_logprobs, weights, weights,
                                  std::nullopt, rollout_logprobs, sequence_ids, std::nullopt);
  const int64_t num_tokens = logprobs.size(0);
  MEGARL_CHECK(op, num_sequences > 0 || (num_sequences == 0 && num_tokens == 0), "num_sequences is ", num_sequences,
               " for ", num_tokens, " tokens");
  const c10::cuda::CUDAGuard guard(logprobs.device());
  at::Tensor sums = at::empty({num_sequences, kernels::kNumSequenceSums}, logprobs.options().dtype(at::kDouble));
  if (num_sequences == 0) return sums;
  dispatch_float_or_double(op, "logprobs", logprobs.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto tokens = arguments.tokens<T>();
    kernels::sequence_sums<T>
        <<<static_cast<unsigned>(num_sequences), kernels::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            tokens.logprobs, tokens.old_logprobs, tokens.rollout_logprobs, tokens.weights,
            arguments.sequence_ids.const_data_ptr<int64_t>(), num_tokens, sums.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return sums;
}

at::Tensor policy_loss_cuda(const at::Tensor& logprobs, const OptionalTensor& entropy, const at::Tensor& old_logprobs,
                            const at::Tensor& advantages, const at::Tensor& weights, const OptionalTensor& ref_logprobs,
                            const OptionalTensor& rollout_logprobs, const OptionalTensor& sequence_ids,
                            const OptionalTensor& sequence_sums, std::string_view objective, std::string_view level,
                            std::string_view correction, std::string_view sequence_weight, std::string_view kl,
                            std::string_view kl_gradient, at::ArrayRef<double> numbers) {
  constexpr const char* op = "policy_loss";
  const PolicyOptions options =
      policy_options(op, objective, level, correction, sequence_weight, kl, kl_gradient, numbers);
  const PolicyArguments arguments(op, options, logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs,
                                  rollout_logprobs, sequence_ids, sequence_sums);
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const auto doubles = logprobs.options().dtype(at::kDouble);
  at::Tensor sums = at::zeros({kNumPolicySums}, doubles);
  if (logprobs.size(0) == 0) return sums;
  const unsigned blocks = blocks_for(logprobs.size(0), kernels::kTokensPerBlock);
  at::Tensor partial = at::empty({blocks, kNumPolicySums}, doubles);
  at::Tensor counter = at::zeros({1}, logprobs.options().dtype(at::kInt));
  dispatch_float_or_double(op, "logprobs", logprobs.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    kernels::forward<T><<<blocks, kernels::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        kernel_arguments<T>(arguments, options), partial.mutable_data_ptr<double>(),
        reinterpret_cast<unsigned*>(counter.mutable_data_ptr<int>()), sums.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return sums;
}

std::tuple<at::Tensor, at::Tensor> policy_loss_backward_cuda(
    const at::Tensor& grad_loss, const at::Tensor& logprobs, const OptionalTensor& entropy,
    const at::Tensor& old_logprobs, const at::Tensor& advantages, const at::Tensor& weights,
    const OptionalTensor& ref_logprobs, const OptionalTensor& rollout_logprobs, const OptionalTensor& sequence_ids,
    const OptionalTensor& sequence_sums, std::string_view objective, std::string_view level,
    std::string_view correction, std::string_view sequence_weight, std::string_view kl, std::string_view kl_gradient,
    at::ArrayRef<double> numbers) {
  constexpr const char* op = "policy_loss_backward";
  const PolicyOptions options =
      policy_options(op, objective, level, correction, sequence_weight, kl, kl_gradient, numbers);
  const PolicyArguments arguments(op, options, logprobs, entropy, old_logprobs, advantages, weights, ref_logprobs,
                                  rollout_logprobs, sequence_ids, sequence_sums);
  MEGARL_CHECK(op, grad_loss.numel() == 1, "grad_loss must hold one value, got ", grad_loss.sizes());
  check_device(op, "grad_loss", grad_loss, logprobs);
  const c10::cuda::CUDAGuard guard(logprobs.device());
  const int64_t num_tokens = logprobs.size(0);
  const at::Tensor scale = grad_loss.to(logprobs.scalar_type());
  at::Tensor grad_logprobs = at::empty({num_tokens}, logprobs.options());
  at::Tensor grad_entropy = at::empty({entropy ? num_tokens : 0}, logprobs.options());
  if (num_tokens == 0) return {grad_logprobs, grad_entropy};
  dispatch_float_or_double(op, "logprobs", logprobs.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    kernels::backward<T><<<blocks_for(num_tokens, kernels::kThreads), kernels::kThreads, 0,
                           c10::cuda::getCurrentCUDAStream()>>>(
        kernel_arguments<T>(arguments, options), scale.const_data_ptr<T>(), grad_logprobs.mutable_data_ptr<T>(),
        entropy ? grad_entropy.mutable_data_ptr<T>() : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_logprobs, grad_entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CUDA, m) {
  m.impl("policy_sequence_sums", &policy_sequence_sums_cuda);
  m.impl("policy_loss", &policy_loss_cuda);
  m.impl("policy_loss_backward", &policy_loss_backward_cuda);
}

}  // namespace megarl
