// Small kernels, correct ones and ones with a planted bug, for test_executor.py.
#include "common/simt_portable.cuh"

namespace {

__global__ void block_sum(const float* x, float* sum, int64_t n) {
  MEGARL_SHARED(float, partial, [32]);
  float value = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) value += x[i];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(megarl::kFullWarp, value, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(megarl::kFullWarp, value, offset);
    if (threadIdx.x == 0) atomicAdd(sum, value);
  }
}

__global__ void warp_operations(int* out) {
  const int lane = threadIdx.x;
  int* row = out + lane;
  row[0 * 32] = __shfl_sync(megarl::kFullWarp, lane, lane + 3, 8);
  row[1 * 32] = __shfl_up_sync(megarl::kFullWarp, lane, 2, 16);
  row[2 * 32] = __shfl_down_sync(megarl::kFullWarp, lane, 5);
  row[3 * 32] = __shfl_xor_sync(megarl::kFullWarp, lane, 9);
  row[4 * 32] = int(__ballot_sync(megarl::kFullWarp, lane % 3 == 0));
  row[5 * 32] = __any_sync(megarl::kFullWarp, lane == 7) + 2 * __all_sync(megarl::kFullWarp, lane == 7);
  row[6 * 32] = __reduce_add_sync(megarl::kFullWarp, lane);
  row[7 * 32] = __reduce_min_sync(megarl::kFullWarp, -lane);
  row[8 * 32] = int(__reduce_max_sync(megarl::kFullWarp, unsigned(-lane)));
  row[9 * 32] = __syncthreads_count(lane < 5);
  if (lane < 16) row[10 * 32] = __shfl_xor_sync(0xffffu, lane, 1);  // half a warp, the other half elsewhere
  else row[10 * 32] = __shfl_xor_sync(0xffff0000u, lane, 2);
}

__global__ void vector_copy(const float* x, float* y, int64_t n) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (i < n) *reinterpret_cast<float4*>(y + i) = *reinterpret_cast<const float4*>(x + i);
}

__global__ void last_block(const float* x, float* partial, unsigned* counter, float* sum) {
  MEGARL_SHARED(bool, is_last, );
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    __threadfence();
    is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
    *sum = total;
  }
}

__global__ void order_of_threads(int* order, int* count) { order[atomicAdd(count, 1)] = int(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void dynamic_reverse(const float* x, float* y) {
  MEGARL_DYNAMIC_SHARED(float, buffer);
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

// ---- planted bugs; thread 5 of block 1 is to blame wherever one thread is ------------------------------------------------
__device__ bool culprit() { return blockIdx.x == 1 && threadIdx.x == 5; }

__global__ void bug_read_past_end(const float* x, float* y, int64_t n) { y[threadIdx.x] = x[culprit() ? n : 0]; }
__global__ void bug_write_before_start(float* y) { y[culprit() ? -1 : 0] = 1.0f; }
__global__ void bug_write_input(const float* x, float* y) {
  if (culprit()) const_cast<float*>(x)[0] = 2.0f;
  y[0] = 1.0f;
}
__global__ void bug_vector_past_end(const float* x, float* y, int64_t n) {
  y[threadIdx.x] = __ldg(reinterpret_cast<const float4*>(x + (culprit() ? n - 2 : 0))).x;
}
__global__ void bug_misaligned_load(const float* x, float* y) {
  *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x + (culprit() ? 1 : 0));
}
__global__ void bug_misaligned_ldg(const float* x, float* y) {
  y[0] = __ldg(reinterpret_cast<const float4*>(x + (culprit() ? 2 : 0))).y;
}
__global__ void bug_shared_out_of_bounds(float* y) {
  MEGARL_SHARED(float, buffer, [8]);
  MEGARL_SHARED(float, neighbour, [8]);
  if (threadIdx.x < 8) neighbour[threadIdx.x] = 0.0f;
  __syncthreads();
  float* p = buffer;
  if (culprit() || threadIdx.x == 0) p[culprit() ? 8 : 0] = 1.0f;
  y[threadIdx.x] = neighbour[threadIdx.x % 8];
}
__global__ void bug_dynamic_shared_out_of_bounds(float* y) {
  MEGARL_DYNAMIC_SHARED(float, buffer);
  buffer[threadIdx.x + (culprit() ? blockDim.x : 0)] = 1.0f;
  y[threadIdx.x] = buffer[threadIdx.x];
}
__global__ void bug_shared_unwritten(float* y) {
  MEGARL_SHARED(float, buffer, [64]);
  if (!culprit()) buffer[threadIdx.x] = 1.0f;
  y[threadIdx.x] = buffer[threadIdx.x];
}
__global__ void bug_missing_barrier(float* y) {
  MEGARL_SHARED(float, buffer, [64]);
  buffer[threadIdx.x] = float(threadIdx.x);
  y[threadIdx.x] = buffer[63 - threadIdx.x];
}
__global__ void bug_missing_second_barrier(float* y) {
  MEGARL_SHARED(float, buffer, [64]);
  for (int round = 0; round < 2; ++round) {
    buffer[threadIdx.x] = float(threadIdx.x);
    __syncthreads();
    y[threadIdx.x] = buffer[63 - threadIdx.x];
  }
}
__global__ void bug_warp_sync_across_warps(float* y) {
  MEGARL_SHARED(float, buffer, [64]);
  buffer[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  y[threadIdx.x] = buffer[63 - threadIdx.x];
}
__global__ void right_warp_sync(float* y) {
  MEGARL_SHARED(float, buffer, [64]);
  buffer[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  y[threadIdx.x] = buffer[threadIdx.x ^ 31];
  __syncwarp();
  buffer[threadIdx.x] = 0.0f;
}
__global__ void bug_barrier_in_branch(float* y) {
  if (!culprit()) __syncthreads();
  y[threadIdx.x] = 1.0f;
}
__global__ void bug_two_barriers(float* y) {
  if (culprit()) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1.0f;
}
__global__ void bug_shuffle_exited_lane(int* y) {
  if (culprit()) return;
  y[threadIdx.x] = __shfl_xor_sync(megarl::kFullWarp, 1, 1);
}
__global__ void bug_shuffle_absent_lane(int* y) { y[threadIdx.x] = __shfl_xor_sync(megarl::kFullWarp, 1, 1); }
__global__ void bug_mask_without_caller(int* y) { y[threadIdx.x] = __shfl_sync(culprit() ? ~(1u << 5) : ~0u, 1, 0); }
__global__ void bug_masks_differ(int* y) { y[threadIdx.x] = __shfl_sync(culprit() ? 0xffu : ~0u, 1, 0); }
__global__ void bug_shuffle_source_not_named(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, 1, culprit() ? 20 : 0);
}
__global__ void bug_shuffle_in_branch(int* y) {
  if (culprit()) __syncthreads();
  else y[threadIdx.x] = __any_sync(megarl::kFullWarp, 1);
}
__global__ void bug_local_array(float* y, int64_t n) {
  float values[4] = {1, 2, 3, 4};
  y[threadIdx.x] = values[culprit() ? n : threadIdx.x % 4];
}
__global__ void bug_int_overflow(float* y, int stride) { y[0] = float(int(blockIdx.x + 1) * stride > 7); }
__global__ void bug_other_threads_stack(float** mailbox, float* y) {
  float local = float(threadIdx.x);
  if (threadIdx.x == 4) *mailbox = &local;
  __syncthreads();
  if (culprit()) y[0] = **mailbox;
  __syncthreads();
}

}  // namespace

#define CASE(NAME, GRID, BLOCK, SHARED, PARAMETERS, ...) \
  extern "C" int NAME##_case PARAMETERS { return simt::launch(#NAME, GRID, BLOCK, SHARED, [=] { NAME(__VA_ARGS__); }); }
CASE(block_sum, unsigned(blocks), 128, 0, (const float* x, float* y, int64_t n, int64_t blocks), x, y, n)
CASE(warp_operations, 1, 32, 0, (int* out), out)
CASE(vector_copy, unsigned((n + 255) / 256), 64, 0, (const float* x, float* y, int64_t n), x, y, n)
CASE(last_block, 5, 32, 0, (const float* x, float* partial, unsigned* counter, float* y), x, partial, counter, y)
CASE(order_of_threads, 2, 40, 0, (int* order, int* count), order, count)
CASE(dynamic_reverse, 1, 64, 64 * sizeof(float), (const float* x, float* y), x, y)
CASE(bug_read_past_end, 2, 64, 0, (const float* x, float* y, int64_t n), x, y, n)
CASE(bug_write_before_start, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_write_input, 2, 64, 0, (const float* x, float* y, int64_t), x, y)
CASE(bug_vector_past_end, 2, 64, 0, (const float* x, float* y, int64_t n), x, y, n)
CASE(bug_misaligned_load, 2, 64, 0, (const float* x, float* y, int64_t), x, y)
CASE(bug_misaligned_ldg, 2, 64, 0, (const float* x, float* y, int64_t), x, y)
CASE(bug_shared_out_of_bounds, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_dynamic_shared_out_of_bounds, 2, 64, 64 * sizeof(float), (const float*, float* y, int64_t), y)
CASE(bug_shared_unwritten, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_missing_barrier, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_missing_second_barrier, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_warp_sync_across_warps, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(right_warp_sync, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_barrier_in_branch, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_two_barriers, 2, 64, 0, (const float*, float* y, int64_t), y)
CASE(bug_shuffle_exited_lane, 2, 64, 0, (const float*, int* y, int64_t), y)
CASE(bug_shuffle_absent_lane, 2, 40, 0, (const float*, int* y, int64_t), y)
CASE(bug_mask_without_caller, 2, 64, 0, (const float*, int* y, int64_t), y)
CASE(bug_masks_differ, 2, 64, 0, (const float*, int* y, int64_t), y)
CASE(bug_shuffle_source_not_named, 2, 64, 0, (const float*, int* y, int64_t), y)
CASE(bug_shuffle_in_branch, 2, 64, 0, (const float*, int* y, int64_t), y)
CASE(bug_local_array, 2, 64, 0, (const float*, float* y, int64_t), y, 4)
CASE(bug_int_overflow, 2, 64, 0, (const float*, float* y, int64_t), y, 0x7fffffff)
CASE(bug_other_threads_stack, 2, 64, 0, (const float*, float* y, int64_t), reinterpret_cast<float**>(y), y)

// Narrow types on the host, for comparison with numpy.
extern "C" int convert_half(const float* x, uint16_t* half, float* back, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    half[i] = __float2half_rn(x[i]).bits;
    back[i] = __half2float({half[i]});
  }
  return 0;
}
extern "C" int convert_bfloat16(const float* x, uint16_t* narrow, float* back, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    narrow[i] = __float2bfloat16_rn(x[i]).bits;
    back[i] = __bfloat162float({narrow[i]});
  }
  return 0;
}
