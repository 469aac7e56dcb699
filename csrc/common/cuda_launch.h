// Helpers of the CUDA launchers: dispatch on the element type, grid sizes, and checks without a device sync.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "common/check.h"
#include "common/row_vectors.cuh"

namespace megarl {

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the device type of `dtype`.
template <class Body>
void dispatch_floating(const char* op, const char* name, at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat: return body(Type<float>{});
    case at::kDouble: return body(Type<double>{});
    case at::kBFloat16: return body(Type<__nv_bfloat16>{});
    case at::kHalf: return body(Type<__half>{});
    default: MEGARL_CHECK(op, false, name, " must be float32, bfloat16, float16 or float64, got ", dtype);
  }
}

template <class Body>
void dispatch_float_or_double(const char* op, const char* name, at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat: return body(Type<float>{});
    case at::kDouble: return body(Type<double>{});
    default: MEGARL_CHECK(op, false, name, " must be float32 or float64, got ", dtype);
  }
}

template <class Body>
void dispatch_bool(bool value, const Body& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

template <class T>
const T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline void check_contiguous(const char* op, const char* name, const at::Tensor& tensor) {
  MEGARL_CHECK(op, tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

// A contiguous vector of known size and type, on the device of `anchor`.
inline void check_input(const char* op, const char* name, const at::Tensor& tensor, int64_t size, at::ScalarType dtype,
                        const at::Tensor& anchor) {
  check_vector(op, name, tensor, size, dtype);
  check_contiguous(op, name, tensor);
  MEGARL_CHECK(op, tensor.device() == anchor.device(), name, " is on ", tensor.device(), ", expected ", anchor.device());
}

inline void check_writable(const char* op, const char* name, const at::Tensor& logits) {
  MEGARL_CHECK(op, logits.size(0) < 2 || logits.stride(0) >= logits.size(1), name,
               " whose rows overlap cannot be overwritten, got strides ", logits.strides());
}

inline int64_t num_sms(const at::Tensor& tensor) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device()));
  return count;
}

// A persistent grid over rows x splits: as many blocks as the device holds at once, or as there are items.
struct RowGrid {
  int num_splits;
  unsigned blocks;
};

inline RowGrid row_grid(const at::Tensor& logits, int64_t rows, int blocks_per_sm, int64_t elements_per_block) {
  const int64_t slots = num_sms(logits) * blocks_per_sm;
  const int splits = plan_splits(rows, logits.size(1), slots, elements_per_block);
  return {splits, static_cast<unsigned>(std::min(rows * splits, slots))};
}

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  return static_cast<unsigned>((items + items_per_block - 1) / items_per_block);
}

}  // namespace megarl
