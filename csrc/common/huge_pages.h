// Large results on CPUs, in pages of 2 MiB. Any device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace megarl {

// An empty tensor that is about to be written in full. Where it is large, the system is asked for huge
// pages: the 85,000 page faults of a 350 MB weight gradient took as long as a tenth of the GEMM writing it.
// From 32 MiB on malloc gives every block a mapping of its own, so no other data is concerned.
inline at::Tensor empty_for_writing(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20, kFewestBytes = 32 << 20;
  if (result.is_cpu() && result.nbytes() >= kFewestBytes) {
    const auto begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + result.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
  }
#endif
  return result;
}

}  // namespace megarl
