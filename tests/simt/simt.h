// SIMT executor: compiles CUDA kernel source as host code and runs it block by block, each thread a fibre.
//
// The kernel source is unchanged; it reaches this header through csrc/common/simt_portable.cuh. A file that has
// kernels is compiled with the flags of tests/simt/executor.py: -fsanitize=thread makes the compiler call
// __tsan_read*/__tsan_write* before every access to memory, and -fsanitize=alignment,bounds,signed-integer-overflow
// adds its own calls; simt_memory.cpp implements them (no sanitizer library is linked) and checks every access against
// the registered global buffers, the block's shared memory and the thread's own stack. simt_runtime.cpp schedules.
//
// A launch reports, each with kernel, block and thread: out-of-bounds and misaligned access, a write to a
// read-only buffer, a read of unwritten shared memory, a data race in shared memory, a barrier or warp intrinsic that
// not all its threads reach, a mask that names an exited or absent lane or leaves out the caller, int overflow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};

namespace simt {

enum class WarpOp { kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kSync, kAdd, kMin, kMax, kAnd, kOr, kXor };
enum class BlockOp { kBarrier, kCount, kAnd, kOr };
enum class Access { kRead, kWrite, kAtomic };

// Defined in simt_runtime.cpp. The first four never change within one thread, hence `const`.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_extent();
__attribute__((const)) uint3 grid_extent();
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t bits, int argument, int width, bool is_signed, const char* file,
                         int line);
int block_collective(BlockOp op, int predicate, const char* file, int line);
// Memory of one __shared__ variable of the current block; `site` identifies the declaration.
void* shared_variable(const void* site, const char* name, size_t bytes, size_t alignment);
void* dynamic_shared();
// Checks an access of `bytes` at `address` as one transaction; returns only if it is valid.
void check_access(const void* address, size_t bytes, size_t alignment, Access access);
[[noreturn]] void device_check_failed(const char* message);
int run(const char* kernel, uint3 grid, uint3 block, size_t dynamic_shared_bytes, void (*body)(const void*),
        const void* parameters, size_t parameter_bytes);

// Runs `body` once per thread; returns 0, or 1 if a check failed (see simt_error in simt_runtime.cpp). The closure
// must capture by value: it is copied to a read-only region, as kernel parameters are on a device.
template <class Body>
int launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const Body& body) {
  static_assert(std::is_trivially_copyable_v<Body>, "kernel parameters must be trivially copyable");
  auto call = [](const void* parameters) { (*static_cast<const Body*>(parameters))(); };
  return run(kernel, grid, block, dynamic_shared_bytes, call, &body, sizeof(Body));
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T, class Update>
__attribute__((no_sanitize_thread)) T atomic_update(T* address, Update update) {
  check_access(address, sizeof(T), sizeof(T), Access::kAtomic);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_extent())
#define gridDim (simt::grid_extent())
constexpr int warpSize = 32;

// ---- barriers and warp intrinsics; __builtin_FILE/LINE as default arguments name the caller -------------------------
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::block_collective(simt::BlockOp::kBarrier, 0, file, line); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::block_collective(simt::BlockOp::kCount, p, file, line); }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::block_collective(simt::BlockOp::kAnd, p, file, line); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::block_collective(simt::BlockOp::kOr, p, file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::warp_collective(simt::WarpOp::kSync, mask, 0, 0, 32, false, file, line);
}

#define SIMT_SHUFFLE(NAME, OP, ARGUMENT)                                                                           \
  template <class T>                                                                                               \
  T NAME(unsigned mask, T value, ARGUMENT argument, int width = 32, SIMT_SITE) {                                   \
    return simt::from_bits<T>(simt::warp_collective(simt::WarpOp::OP, mask, simt::to_bits(value), int(argument),   \
                                                    width, false, file, line));                                    \
  }
SIMT_SHUFFLE(__shfl_sync, kShuffle, int)
SIMT_SHUFFLE(__shfl_up_sync, kShuffleUp, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, kShuffleDown, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, kShuffleXor, int)

#define SIMT_REDUCE(NAME, OP)                                                                                      \
  template <class T>                                                                                               \
  T NAME(unsigned mask, T value, SIMT_SITE) {                                                                      \
    static_assert(sizeof(T) == 4 && std::is_integral_v<T>, #NAME " takes int or unsigned");                        \
    return simt::from_bits<T>(simt::warp_collective(simt::WarpOp::OP, mask, simt::to_bits(value), 0, 32,           \
                                                    std::is_signed_v<T>, file, line));                             \
  }
SIMT_REDUCE(__reduce_add_sync, kAdd)
SIMT_REDUCE(__reduce_min_sync, kMin)
SIMT_REDUCE(__reduce_max_sync, kMax)
SIMT_REDUCE(__reduce_and_sync, kAnd)
SIMT_REDUCE(__reduce_or_sync, kOr)
SIMT_REDUCE(__reduce_xor_sync, kXor)

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return unsigned(simt::warp_collective(simt::WarpOp::kBallot, mask, predicate != 0, 0, 32, false, file, line));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) { return __ballot_sync(mask, predicate, file, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- memory ----------------------------------------------------------------------------------------------------------
#define SIMT_LOAD(NAME)                                                            \
  template <class T>                                                               \
  __attribute__((no_sanitize_thread)) T NAME(const T* address) {                   \
    simt::check_access(address, sizeof(T), sizeof(T), simt::Access::kRead);        \
    return *address;                                                               \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
#define SIMT_STORE(NAME)                                                           \
  template <class T>                                                               \
  __attribute__((no_sanitize_thread)) void NAME(T* address, T value) {             \
    simt::check_access(address, sizeof(T), sizeof(T), simt::Access::kWrite);       \
    *address = value;                                                              \
  }
SIMT_STORE(__stcs)
SIMT_STORE(__stcg)

template <class T>
using SimtSame = std::common_type_t<T>;  // blocks deduction, so that atomicAdd(&int64, 1) finds one T
template <class T>
T atomicAdd(T* p, SimtSame<T> v) {
  return simt::atomic_update(p, [v](T old) { return T(old + v); });
}
template <class T>
T atomicMax(T* p, SimtSame<T> v) {
  return simt::atomic_update(p, [v](T old) { return std::max(old, v); });
}
template <class T>
T atomicMin(T* p, SimtSame<T> v) {
  return simt::atomic_update(p, [v](T old) { return std::min(old, v); });
}
template <class T>
T atomicOr(T* p, SimtSame<T> v) {
  return simt::atomic_update(p, [v](T old) { return T(old | v); });
}
template <class T>
T atomicExch(T* p, SimtSame<T> v) {
  return simt::atomic_update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, SimtSame<T> expected, SimtSame<T> v) {
  return simt::atomic_update(p, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1u; });
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return simt::from_bits<unsigned>(simt::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_bits<float>(simt::to_bits(x)); }
inline int __float_as_int(float x) { return simt::from_bits<int>(simt::to_bits(x)); }
inline float __int_as_float(int x) { return simt::from_bits<float>(simt::to_bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
using std::max;
using std::min;
// As on a device, the other operand where one is NaN.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(unsigned(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
inline float __half2float(__half v) {
  const unsigned sign = unsigned(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // 2^112 shifts the exponent bias from 15 to 127 and makes subnormals normal on the way.
  const float value = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(__float_as_uint(value) | sign);
}
inline __half __float2half_rn(float x) {
  const unsigned u = __float_as_uint(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 leaves the rounded mantissa in the low bits
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return {uint16_t(sign | (__float_as_uint(shifted) - 0x3f000000u))};
  }
  const unsigned rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | (rounded >> 13))};
}
