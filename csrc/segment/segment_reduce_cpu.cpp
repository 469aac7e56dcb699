// Sums and means per segment on CPUs, accumulated in double precision. See csrc/bindings.cpp for the schemas.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "segment/segment_reduce_math.h"
#include "segment/segments.h"

namespace megarl {
namespace {

constexpr int kLanes = 8;  // independent sums, so that additions overlap; always combined in the same order

struct SegmentSum {
  double sum;
  double count;
};

template <typename scalar_t>
SegmentSum sum_segment(const scalar_t* values, const float* mask, int64_t size) {
  double sums[kLanes] = {};
  double counts[kLanes] = {};
  int64_t i = 0;
  auto add = [&](int lane, int64_t at) {
    const bool kept = mask == nullptr || mask[at] != 0.0f;
    sums[lane] += kept ? static_cast<double>(values[at]) : 0.0;
    counts[lane] += kept ? 1.0 : 0.0;
  };
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      add(lane, i + lane);
    }
  }
  for (; i < size; ++i) {
    add(0, i);
  }
  SegmentSum total{0.0, 0.0};
  for (int lane = 0; lane < kLanes; ++lane) {
    total.sum += sums[lane];
    total.count += counts[lane];
  }
  return total;
}

const float* check_mask(const char* op, const std::optional<at::Tensor>& mask, int64_t num_values) {
  if (!mask) {
    return nullptr;
  }
  check_vector(op, "mask", *mask, num_values, at::kFloat);
  MEGARL_CHECK(op, mask->is_contiguous(), "mask must be contiguous, got strides ", mask->strides());
  return mask->const_data_ptr<float>();
}

at::Tensor segment_reduce(const at::Tensor& values, const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& mask,
                          bool mean) {
  const char* op = "segment_reduce";
  MEGARL_CHECK(op, values.dim() == 1 && values.is_contiguous(), "values must be contiguous [T], got ", values.sizes());
  const int32_t* cu = check_segments(op, "cu_seqlens", cu_seqlens, values.size(0));
  const float* kept = check_mask(op, mask, values.size(0));
  const int64_t num_segments = cu_seqlens.numel() - 1;
  at::Tensor reduced = at::empty({num_segments}, values.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, values.scalar_type(), "megarl::segment_reduce", [&] {
    const scalar_t* source = values.const_data_ptr<scalar_t>();
    scalar_t* target = reduced.data_ptr<scalar_t>();
    for_segments(cu, num_segments, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        const auto total = sum_segment(source + cu[s], kept == nullptr ? nullptr : kept + cu[s], cu[s + 1] - cu[s]);
        target[s] = static_cast<scalar_t>(total.sum * segment_scale(total.count, mean));
      }
    });
  });
  return reduced;
}

at::Tensor segment_reduce_backward(const at::Tensor& grad, const at::Tensor& cu_seqlens,
                                   const std::optional<at::Tensor>& mask, int64_t num_values, bool mean) {
  const char* op = "segment_reduce_backward";
  const int32_t* cu = check_segments(op, "cu_seqlens", cu_seqlens, num_values);
  const float* kept = check_mask(op, mask, num_values);
  const int64_t num_segments = cu_seqlens.numel() - 1;
  check_vector(op, "grad", grad, num_segments, grad.scalar_type());
  const int64_t stride = grad.stride(0);  // 0 where it was expanded from a scalar
  at::Tensor grad_values = at::empty({num_values}, grad.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, grad.scalar_type(), "megarl::segment_reduce", [&] {
    const scalar_t* source = grad.const_data_ptr<scalar_t>();
    scalar_t* target = grad_values.data_ptr<scalar_t>();
    for_segments(cu, num_segments, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        double count = cu[s + 1] - cu[s];
        if (kept != nullptr) {
          count = static_cast<double>(
              std::count_if(kept + cu[s], kept + cu[s + 1], [](float value) { return value != 0.0f; }));
        }
        const auto each =
            static_cast<scalar_t>(static_cast<double>(source[s * stride]) * segment_scale(count, mean));
        for (int64_t i = cu[s]; i < cu[s + 1]; ++i) {
          target[i] = kept == nullptr || kept[i] != 0.0f ? each : scalar_t(0);
        }
      }
    });
  });
  return grad_values;
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CPU, m) {
  m.impl("segment_reduce", &segment_reduce);
  m.impl("segment_reduce_backward", &segment_reduce_backward);
}

}  // namespace megarl
