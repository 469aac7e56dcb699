// Included by CUDA kernel headers instead of the CUDA runtime, so that the same source compiles with nvcc and, for
// tests, with g++ (tests/simt/simt.h runs it thread by thread on a CPU). No torch in here.
#pragma once

#if defined(MEGARL_SIMT)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <type_traits>
#endif

// Shared memory. MEGARL_SHARED(type, name, [n]) declares `__shared__ type name[n]`; MEGARL_DYNAMIC_SHARED(type, name)
// points `name` at the launch's dynamic shared memory. Macros, because the executor must know each variable's bounds.
#if defined(MEGARL_SIMT)
#define MEGARL_SHARED(TYPE, NAME, EXTENT)                                                               \
  static const char NAME##_site = 0;                                                                    \
  using NAME##_type = TYPE EXTENT;                                                                      \
  NAME##_type& NAME = *static_cast<NAME##_type*>(                                                       \
      simt::shared_variable(&NAME##_site, #NAME, sizeof(NAME##_type), alignof(NAME##_type)))
#define MEGARL_DYNAMIC_SHARED(TYPE, NAME) TYPE* const NAME = static_cast<TYPE*>(simt::dynamic_shared())
#else
#define MEGARL_SHARED(TYPE, NAME, EXTENT) __shared__ TYPE NAME EXTENT
#define MEGARL_DYNAMIC_SHARED(TYPE, NAME)                     \
  extern __shared__ __align__(16) unsigned char NAME##_bytes[]; \
  TYPE* const NAME = reinterpret_cast<TYPE*>(NAME##_bytes)
#endif

// Stops the kernel with a message if the caller's tensors are invalid, before an illegal index is used.
#if defined(MEGARL_SIMT)
#define MEGARL_DEVICE_CHECK(CONDITION, MESSAGE) ((CONDITION) ? void(0) : simt::device_check_failed(MESSAGE))
#else
#define MEGARL_DEVICE_CHECK(CONDITION, MESSAGE) \
  ((CONDITION) ? void(0) : __assert_fail("megarl: " MESSAGE, __FILE__, __LINE__, __func__))
#endif

namespace megarl {

constexpr unsigned kFullWarp = 0xffffffffu;

// 2^x: one MUFU instruction (ex2.approx: 2 ulp, 2^-inf = 0, NaN stays NaN, results below 2^-126 become 0).
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ double fast_exp2(double x) { return exp2(x); }

// log2(x), one MUFU instruction: absolute error 2^-22 near 1, 2 ulp elsewhere; log2(0) = -inf.
__device__ __forceinline__ float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}
__device__ __forceinline__ double fast_log2(double x) { return log2(x); }

// Arithmetic is in float, for double inputs in double.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulatorOf<T>::type;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(acc_t<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <class A>
__device__ __forceinline__ A negative_infinity() {
  return -A(INFINITY);
}

}  // namespace megarl
