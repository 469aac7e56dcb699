// Argument checks: every message names the op, the argument and the offending value.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace megarl {

#define MEGARL_CHECK(op, condition, ...) TORCH_CHECK_VALUE(condition, "megarl::", op, ": ", __VA_ARGS__)

inline void check_vector(
    const char* op, const char* name, const at::Tensor& tensor, int64_t size, at::ScalarType dtype) {
  MEGARL_CHECK(op, tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape [", size, "], got ",
               tensor.sizes());
  MEGARL_CHECK(op, tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& logits) {
  MEGARL_CHECK(op, tensor.device() == logits.device(), name, " is on ", tensor.device(), ", logits on ",
               logits.device());
}

inline void check_logits(const char* op, const char* name, const at::Tensor& logits) {
  MEGARL_CHECK(op, logits.dim() == 2, name, " must have shape [T, V], got ", logits.sizes());
  MEGARL_CHECK(op, logits.size(1) > 0, name, " has an empty vocabulary: ", logits.sizes());
  const auto dtype = logits.scalar_type();
  MEGARL_CHECK(op,
               dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
               name, " must be float32, bfloat16, float16 or float64, got ", dtype);
  MEGARL_CHECK(op, logits.stride(1) == 1 || logits.size(1) == 1, name,
               " must be contiguous along the vocabulary, got strides ", logits.strides());
}

}  // namespace megarl
