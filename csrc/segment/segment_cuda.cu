// Launchers of the segment kernels on CUDA. See csrc/bindings.cpp for the schemas. The kernels check the bounds of
// segments: checking them here would sync the device.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/cuda_launch.h"
#include "segment/segment_reduce_kernels.cuh"

namespace megarl {
namespace {

// Returns S.
int64_t check_bounds(const char* op, const char* name, const at::Tensor& cu, int64_t num_values,
                     const at::Tensor& anchor) {
  MEGARL_CHECK(op, cu.dim() == 1 && cu.numel() > 0, name, " must have shape [S + 1], got ", cu.sizes());
  check_input(op, name, cu, cu.numel(), at::kInt, anchor);
  const int64_t segments = cu.numel() - 1;
  MEGARL_CHECK(op, segments > 0 || num_values == 0, name, " bounds no segment, but there are ", num_values, " values");
  return segments;
}

const float* check_mask(const char* op, const std::optional<at::Tensor>& mask, int64_t size, const at::Tensor& anchor) {
  if (mask) check_input(op, "mask", *mask, size, at::kFloat, anchor);
  return data_or_null<float>(mask);
}

at::Tensor segment_reduce_cuda(const at::Tensor& values, const at::Tensor& cu_seqlens,
                               const std::optional<at::Tensor>& mask, bool mean) {
  constexpr const char* op = "segment_reduce";
  MEGARL_CHECK(op, values.dim() == 1 && values.is_contiguous(), "values must be contiguous [T], got ", values.sizes());
  const int64_t segments = check_bounds(op, "cu_seqlens", cu_seqlens, values.size(0), values);
  const float* kept = check_mask(op, mask, values.size(0), values);
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor reduced = at::empty({segments}, values.options());
  if (segments == 0) return reduced;
  dispatch_floating(op, "values", values.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    segment_reduce::forward<T>
        <<<static_cast<unsigned>(segments), segment_reduce::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            static_cast<const T*>(values.const_data_ptr()), cu_seqlens.const_data_ptr<int32_t>(), kept, values.size(0),
            mean, static_cast<T*>(reduced.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return reduced;
}

at::Tensor segment_reduce_backward_cuda(const at::Tensor& grad, const at::Tensor& cu_seqlens,
                                        const std::optional<at::Tensor>& mask, int64_t num_values, bool mean) {
  constexpr const char* op = "segment_reduce_backward";
  const int64_t segments = check_bounds(op, "cu_seqlens", cu_seqlens, num_values, grad);
  const float* kept = check_mask(op, mask, num_values, grad);
  check_vector(op, "grad", grad, segments, grad.scalar_type());
  const c10::cuda::CUDAGuard guard(grad.device());
  at::Tensor grad_values = at::empty({num_values}, grad.options());
  if (num_values == 0) return grad_values;
  dispatch_floating(op, "grad", grad.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    segment_reduce::backward<T>
        <<<static_cast<unsigned>(segments), segment_reduce::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            static_cast<const T*>(grad.const_data_ptr()), grad.stride(0), cu_seqlens.const_data_ptr<int32_t>(), kept,
            num_values, mean, static_cast<T*>(grad_values.mutable_data_ptr()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_values;
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CUDA, m) {
  m.impl("segment_reduce", &segment_reduce_cuda);
  m.impl("segment_reduce_backward", &segment_reduce_backward_cuda);
}

}  // namespace megarl
