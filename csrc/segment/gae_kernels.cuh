// Generalised advantage estimation as a parallel suffix scan: one block per sequence, tiles from its end to its start.
#pragma once

#include "segment/gae_math.h"
#include "segment/segment_bounds.cuh"

namespace megarl::gae {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // consecutive positions of one thread
constexpr int kTile = kThreads * kPerThread;
constexpr int kWarps = kThreads / 32;

// A run of positions as a function of what comes after it: advantage = offset + by_value V' + by_advantage A', and the
// value of its first masked position. Affine in (V', A'), so runs compose in any grouping. Without masked positions a
// run is the identity (`empty`).
struct Run {
  double value, offset, by_value, by_advantage;
  bool empty;
};

__device__ __forceinline__ Run empty_run() { return {0, 0, 0, 1, true}; }

__device__ __forceinline__ Run position_run(double reward, double value, double gamma, double lambda) {
  const GaeCarry<double> alone = gae_step(reward, value, GaeCarry<double>{0, 0}, gamma, lambda);
  return {value, alone.advantage, gamma, gamma * lambda, false};
}

// `earlier` directly before `later`.
__device__ __forceinline__ Run join(const Run& earlier, const Run& later) {
  if (earlier.empty) return later;
  if (later.empty) return earlier;
  return {earlier.value, earlier.offset + earlier.by_value * later.value + earlier.by_advantage * later.offset,
          earlier.by_advantage * later.by_value, earlier.by_advantage * later.by_advantage, false};
}

__device__ __forceinline__ GaeCarry<double> apply(const Run& run, const GaeCarry<double>& next) {
  if (run.empty) return next;
  return {run.value, run.offset + run.by_value * next.value + run.by_advantage * next.advantage};
}

__device__ __forceinline__ Run shuffle_down(const Run& run, int lanes) {
  return {__shfl_down_sync(kFullWarp, run.value, lanes), __shfl_down_sync(kFullWarp, run.offset, lanes),
          __shfl_down_sync(kFullWarp, run.by_value, lanes), __shfl_down_sync(kFullWarp, run.by_advantage, lanes),
          __shfl_down_sync(kFullWarp, int(run.empty), lanes) != 0};
}

// Joins this lane's run with those of all later lanes of the warp.
__device__ __forceinline__ Run suffix_of_warp(Run run) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Run later = shuffle_down(run, distance);
    if (lane + distance < 32) run = join(run, later);
  }
  return run;
}

template <class T>
struct Tensors {
  const T* rewards;
  const T* values;
  const float* mask;
  T* advantages;
  T* returns;
};

// Positions [begin, begin + kPerThread) below `end`; those before it are not there.
template <class T>
struct Positions {
  T reward[kPerThread], value[kPerThread];
  bool used[kPerThread];

  __device__ __forceinline__ Positions(const Tensors<T>& t, int64_t begin, int64_t start, int64_t end) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t at = begin + k;
      used[k] = at >= start && at < end && t.mask[at] != 0.0f;
      reward[k] = used[k] ? t.rewards[at] : T(0);
      value[k] = used[k] ? t.values[at] : T(0);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward(const Tensors<T> tensors, const int32_t* __restrict__ cu, int64_t num_tokens, double gamma, double lambda) {
  MEGARL_SHARED(Run, of_warp, [kWarps]);
  const Segment segment = segment_at(cu, blockIdx.x, gridDim.x, num_tokens);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  GaeCarry<double> after_tile{0, 0};
  for (int64_t tile_end = segment.end; tile_end > segment.begin; tile_end -= kTile) {
    const int64_t begin = tile_end - kTile + int64_t(threadIdx.x) * kPerThread;
    const Positions<T> p(tensors, begin, segment.begin, tile_end);
    Run mine = empty_run();
#pragma unroll
    for (int k = kPerThread - 1; k >= 0; --k) {
      if (p.used[k]) mine = join(position_run(double(p.reward[k]), double(p.value[k]), gamma, lambda), mine);
    }
    const Run suffix = suffix_of_warp(mine);
    const Run later_lanes = shuffle_down(suffix, 1);
    if (lane == 0) of_warp[warp] = suffix;
    __syncthreads();
    GaeCarry<double> next = after_tile;
    for (int w = kWarps - 1; w > warp; --w) next = apply(of_warp[w], next);
    GaeCarry<double> before_tile = next;
    for (int w = warp; w >= 0; --w) before_tile = apply(of_warp[w], before_tile);
    if (lane < 31) next = apply(later_lanes, next);
#pragma unroll
    for (int k = kPerThread - 1; k >= 0; --k) {
      if (p.used[k]) next = gae_step(double(p.reward[k]), double(p.value[k]), next, gamma, lambda);
      if (begin + k >= segment.begin) {
        tensors.advantages[begin + k] = p.used[k] ? T(next.advantage) : T(0);
        tensors.returns[begin + k] = p.used[k] ? T(next.advantage + next.value) : T(0);
      }
    }
    after_tile = before_tile;
    __syncthreads();  // of_warp is written again
  }
}

}  // namespace megarl::gae
