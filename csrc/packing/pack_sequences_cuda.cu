// Launchers of the packing kernels on CUDA. See csrc/bindings.cpp for the schemas.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_launch.h"
#include "packing/pack_sequences_kernels.cuh"

namespace megarl {
namespace {

namespace kernels = pack_sequences;
using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The kernel checks the values of starts, lengths and cu_seqlens: checking them here would sync the device.
Fields pack_sequences_cuda(const at::Tensor& token_ids, const at::Tensor& loss_mask,
                           const std::optional<at::Tensor>& rollout_logprobs, const at::Tensor& starts,
                           const at::Tensor& lengths, const at::Tensor& rows, const at::Tensor& advantages,
                           const at::Tensor& cu_seqlens, int64_t num_tokens, int64_t cp_rank, int64_t cp_size) {
  constexpr const char* op = "pack_sequences";
  const int64_t num_values = token_ids.numel(), num_sequences = starts.numel();
  MEGARL_CHECK(op, cp_size >= 1 && cp_rank >= 0 && cp_rank < cp_size, "cp_rank ", cp_rank, " of cp_size ", cp_size);
  MEGARL_CHECK(op, num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  check_input(op, "token_ids", token_ids, num_values, at::kLong, token_ids);
  check_input(op, "loss_mask", loss_mask, num_values, at::kByte, token_ids);
  if (rollout_logprobs) check_input(op, "rollout_logprobs", *rollout_logprobs, num_values, at::kFloat, token_ids);
  check_input(op, "starts", starts, num_sequences, at::kLong, token_ids);
  check_input(op, "lengths", lengths, num_sequences, at::kInt, token_ids);
  check_input(op, "rows", rows, num_sequences, at::kLong, token_ids);
  check_input(op, "advantages", advantages, num_sequences, at::kFloat, token_ids);
  check_input(op, "cu_seqlens", cu_seqlens, num_sequences + 1, at::kInt, token_ids);

  const c10::cuda::CUDAGuard guard(token_ids.device());
  const auto longs = token_ids.options();
  const auto floats = longs.dtype(at::kFloat);
  auto long_field = [&] { return at::empty({num_tokens}, longs); };
  auto float_field = [&] { return at::empty({num_tokens}, floats); };
  Fields fields{long_field(), long_field(), float_field(), long_field(), long_field(), float_field(),
                at::empty({rollout_logprobs ? num_tokens : 0}, floats)};
  if (num_tokens == 0) return fields;
  const kernels::Ragged in{token_ids.const_data_ptr<int64_t>(), loss_mask.const_data_ptr<uint8_t>(),
                           data_or_null<float>(rollout_logprobs), num_values};
  const kernels::Packed out{
      std::get<0>(fields).data_ptr<int64_t>(), std::get<1>(fields).data_ptr<int64_t>(),
      std::get<2>(fields).data_ptr<float>(),   std::get<3>(fields).data_ptr<int64_t>(),
      std::get<4>(fields).data_ptr<int64_t>(), std::get<5>(fields).data_ptr<float>(),
      rollout_logprobs ? std::get<6>(fields).data_ptr<float>() : nullptr};
  const kernels::Plan plan{starts.const_data_ptr<int64_t>(), lengths.const_data_ptr<int32_t>(),
                           rows.const_data_ptr<int64_t>(), advantages.const_data_ptr<float>(),
                           cu_seqlens.const_data_ptr<int32_t>(), num_sequences, num_tokens, cp_rank, cp_size};
  const unsigned blocks = blocks_for(num_tokens, kernels::kThreads * kernels::kPerThread);
  kernels::pack<<<blocks, kernels::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(in, out, plan);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return fields;
}

template <class T>
void unpack(const at::Tensor& values, const at::Tensor& cu_seqlens, const at::Tensor& lengths, const at::Tensor& starts,
            at::Tensor& unpacked) {
  kernels::unpack<T><<<blocks_for(unpacked.numel(), kernels::kThreads), kernels::kThreads, 0,
                       c10::cuda::getCurrentCUDAStream()>>>(
      static_cast<const T*>(values.const_data_ptr()), values.numel(), cu_seqlens.const_data_ptr<int32_t>(),
      lengths.const_data_ptr<int32_t>(), starts.const_data_ptr<int64_t>(), lengths.numel(), unpacked.numel(),
      static_cast<T*>(unpacked.mutable_data_ptr()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor unpack_values_cuda(const at::Tensor& values, const at::Tensor& cu_seqlens, const at::Tensor& lengths,
                              const at::Tensor& starts, int64_t num_values) {
  constexpr const char* op = "unpack_values";
  MEGARL_CHECK(op, values.dim() == 1 && values.is_contiguous(), "values must be contiguous [T], got ", values.sizes());
  MEGARL_CHECK(op, num_values >= 0, "num_values must not be negative, got ", num_values);
  check_input(op, "cu_seqlens", cu_seqlens, lengths.numel() + 1, at::kInt, values);
  check_input(op, "lengths", lengths, lengths.numel(), at::kInt, values);
  check_input(op, "starts", starts, lengths.numel(), at::kLong, values);
  MEGARL_CHECK(op, lengths.numel() > 0 || num_values == 0, "num_values is ", num_values, " without sequences");
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor unpacked = at::empty({num_values}, values.options());
  if (num_values == 0) return unpacked;
  switch (values.element_size()) {
    case 2: unpack<uint16_t>(values, cu_seqlens, lengths, starts, unpacked); break;
    case 4: unpack<uint32_t>(values, cu_seqlens, lengths, starts, unpacked); break;
    case 8: unpack<uint64_t>(values, cu_seqlens, lengths, starts, unpacked); break;
    default: MEGARL_CHECK(op, false, "values must be of 2, 4 or 8 bytes each, got ", values.scalar_type());
  }
  return unpacked;
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CUDA, m) {
  m.impl("pack_sequences", &pack_sequences_cuda);
  m.impl("unpack_values", &unpack_values_cuda);
}

}  // namespace megarl
