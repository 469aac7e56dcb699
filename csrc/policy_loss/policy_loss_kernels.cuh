// Policy loss, its logged sums and its gradient, one kernel each way; policy_loss_math.h has the math of a token.
// Sums are in double precision and in an order that depends on the number of tokens alone. No torch in here.
#pragma once

#include "common/block_reduce.cuh"
#include "policy_loss/policy_loss_math.h"

namespace megarl::policy_loss {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 4;
constexpr int64_t kTokensPerBlock = kThreads * kPerThread;
constexpr int kNumSequenceSums = 3;

// Reads tokens for the kernels; checks indices before use.
template <class T>
struct Arguments {
  PolicyTokens<T> tokens;
  PolicyOptions options;
  int64_t num_tokens;
  int64_t num_sequences;

  __device__ __forceinline__ PolicyToken<T> load(int64_t i) const {
    if (tokens.sequence_sums != nullptr) {
      const int64_t s = tokens.sequence_ids[i];
      MEGARL_DEVICE_CHECK(s >= 0 && s < num_sequences, "sequence_ids is outside the sequences");
    }
    return tokens.load(i);
  }
};

// Sums sums[kNumPolicySums] over the block; thread k < kNumPolicySums returns sum k. At most one call per kernel,
// unless a barrier separates them.
__device__ __forceinline__ double block_policy_sum(const double (&sums)[kNumPolicySums]) {
  MEGARL_SHARED(double, of_warp, [kWarps][kNumPolicySums]);
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kNumPolicySums; ++k) {
    double value = sums[k];
    if (k == kRolloutMaxError) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        value = larger_or_nan(value, __shfl_xor_sync(kFullWarp, value, offset));
      }
    } else {
      value = warp_sum(value);
    }
    if (threadIdx.x % 32 == 0) of_warp[warp][k] = value;
  }
  __syncthreads();
  double total = 0;
  if (threadIdx.x < kNumPolicySums) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const double value = of_warp[w][threadIdx.x];
      total = threadIdx.x == kRolloutMaxError ? larger_or_nan(total, value) : total + value;
    }
  }
  return total;
}

// Each block sums its own kTokensPerBlock tokens into partial [blocks, 17]; the last one to finish sums the blocks,
// in order, into sums [17]. counter is 0 before and after.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward(const Arguments<T> arguments, double* partial, unsigned* counter, double* sums) {
  MEGARL_SHARED(bool, is_last, );
  double mine[kNumPolicySums] = {};
  const int64_t begin = int64_t(blockIdx.x) * kTokensPerBlock + threadIdx.x;
#pragma unroll 1
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = begin + k * kThreads;
    if (i < arguments.num_tokens && arguments.tokens.weights[i] != T(0)) {
      add_policy_token(arguments.load(i), arguments.options, mine);
    }
  }
  const double total = block_policy_sum(mine);
  if (threadIdx.x < kNumPolicySums) {
    partial[int64_t(blockIdx.x) * kNumPolicySums + threadIdx.x] = total;
    __threadfence();  // before the counter says that it is there
  }
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (is_last && threadIdx.x < kNumPolicySums) {
    __threadfence();
    double all = 0;
    for (int64_t b = 0; b < gridDim.x; ++b) {
      const double value = __ldcg(partial + b * kNumPolicySums + threadIdx.x);
      all = threadIdx.x == kRolloutMaxError ? larger_or_nan(all, value) : all + value;
    }
    sums[threadIdx.x] = all;
  }
}

// grad_entropy may be null.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    backward(const Arguments<T> arguments, const T* __restrict__ grad_loss, T* __restrict__ grad_logprobs,
             T* __restrict__ grad_entropy) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= arguments.num_tokens) return;
  T by_logprob = 0, by_entropy = 0;
  if (arguments.tokens.weights[i] != T(0)) {
    policy_token_gradient(arguments.load(i), arguments.options, &by_logprob, &by_entropy);
    by_logprob *= *grad_loss;
    by_entropy *= *grad_loss;
  }
  grad_logprobs[i] = by_logprob;
  if (grad_entropy != nullptr) grad_entropy[i] = by_entropy;
}

// First index whose id is at least `id`.
__device__ __forceinline__ int64_t first_at_least(const int64_t* ids, int64_t count, int64_t id) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One block per sequence; sums [S, 3] as in csrc/bindings.cpp. rollout_logprobs may be null.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    sequence_sums(const T* __restrict__ logprobs, const T* __restrict__ old_logprobs,
                  const T* __restrict__ rollout_logprobs, const T* __restrict__ weights,
                  const int64_t* __restrict__ sequence_ids, int64_t num_tokens, double* __restrict__ sums) {
  MEGARL_SHARED(double, of_warp, [kWarps][kNumSequenceSums]);
  const int64_t s = blockIdx.x;
  const int64_t begin = first_at_least(sequence_ids, num_tokens, s), end = first_at_least(sequence_ids, num_tokens, s + 1);
  // Given these, ids ascend from 0 to S - 1 exactly if every block finds only its own.
  MEGARL_DEVICE_CHECK(s > 0 || begin == 0, "sequence_ids is outside the sequences, or does not ascend");
  MEGARL_DEVICE_CHECK(s + 1 < gridDim.x || end == num_tokens, "sequence_ids is outside the sequences, or does not ascend");
  double mine[kNumSequenceSums] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    MEGARL_DEVICE_CHECK(sequence_ids[i] == s, "sequence_ids is outside the sequences, or does not ascend");
    if (weights[i] == T(0)) continue;
    mine[0] += logprobs[i] - old_logprobs[i];
    mine[1] += rollout_logprobs == nullptr ? T(0) : old_logprobs[i] - rollout_logprobs[i];
    mine[2] += 1;
  }
#pragma unroll
  for (int k = 0; k < kNumSequenceSums; ++k) {
    const double value = warp_sum(mine[k]);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][k] = value;
  }
  __syncthreads();
  if (threadIdx.x < kNumSequenceSums) {
    double total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += of_warp[w][threadIdx.x];
    sums[s * kNumSequenceSums + threadIdx.x] = total;
  }
}

}  // namespace megarl::policy_loss
