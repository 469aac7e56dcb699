// Ragged sequences to THD tensors and back, all fields in one launch. See csrc/bindings.cpp for the layout.
#pragma once

#include "packing/pack_sequences_math.h"
#include "segment/segment_bounds.cuh"

namespace megarl::pack_sequences {

constexpr int kThreads = 256;
constexpr int kPerThread = 2;  // neighbouring positions, so that int64 fields are written 16 bytes at a time

struct Ragged {
  const int64_t* token_ids;   // [num_values], as the two below
  const uint8_t* loss_mask;
  const float* logprobs;  // or null
  int64_t num_values;
};

// [T] each, 16-byte aligned.
struct Packed {
  int64_t* token_ids;
  int64_t* labels;
  float* loss_mask;
  int64_t* position_ids;
  int64_t* sequence_ids;
  float* advantages;
  float* logprobs;  // or null
};

// Sequence s: `lengths` tokens from `starts` on, and the values that all its positions share.
struct Plan {
  const int64_t* starts;      // [S]
  const int32_t* lengths;     // [S], 0 for a dummy
  const int64_t* rows;        // [S]
  const float* advantages;    // [S]
  const int32_t* cu_seqlens;  // [S + 1]
  int64_t num_sequences;
  int64_t num_tokens;  // T
  int64_t cp_rank, cp_size;
};

struct PackedSequence {
  int64_t source, length, row;
  float advantage;
  int64_t begin, end, chunk;  // in this rank's share
};

__device__ __forceinline__ PackedSequence sequence_of(const Ragged& in, const Plan& plan, int64_t s) {
  MEGARL_DEVICE_CHECK(s < plan.num_sequences, "num_tokens exceeds cu_seqlens");
  const int64_t begin = plan.cu_seqlens[s], padded = plan.cu_seqlens[s + 1] - begin;
  PackedSequence sequence{plan.starts[s], plan.lengths[s], plan.rows[s], plan.advantages[s], 0, 0, 0};
  MEGARL_DEVICE_CHECK(sequence.source >= 0 && sequence.length >= 0 &&
                          sequence.source <= in.num_values - sequence.length, "a sequence is outside token_ids");
  MEGARL_DEVICE_CHECK(padded >= sequence.length, "cu_seqlens gives a sequence fewer positions than it has tokens");
  MEGARL_DEVICE_CHECK(plan.cp_size == 1 || padded % (2 * plan.cp_size) == 0,
                      "a padded length is no multiple of 2 * cp_size");
  sequence.begin = begin / plan.cp_size;
  sequence.end = sequence.begin + padded / plan.cp_size;
  sequence.chunk = plan.cp_size == 1 ? padded : padded / (2 * plan.cp_size);
  return sequence;
}

struct Position {
  int64_t token_id, label, position_id, sequence_id;
  float loss_mask, advantage, logprob;
};

__device__ __forceinline__ Position position_at(const Ragged& in, const Plan& plan, const PackedSequence& sequence,
                                                int64_t to) {
  const int64_t position = zigzag_position(to - sequence.begin, sequence.chunk, plan.cp_rank, plan.cp_size);
  const PackedPosition holds = packed_position(position, sequence.length);
  const int64_t from = sequence.source + position;
  Position p{0, 0, position, sequence.row, 0.0f, 0.0f, 0.0f};
  if (holds.has_token) p.token_id = in.token_ids[from];
  if (holds.has_target) {
    p.label = in.token_ids[from + 1];
    const bool learned = in.loss_mask[from + 1] != 0;
    const float logprob = in.logprobs == nullptr ? 0.0f : in.logprobs[from + 1];
    p.loss_mask = learned ? 1.0f : 0.0f;
    p.advantage = learned ? sequence.advantage : 0.0f;
    p.logprob = learned ? logprob : 0.0f;
  }
  return p;
}

// Writes positions `at` and `at + 1` of a field, the second only if `both`. `at` is even.
__device__ __forceinline__ void store_pair(int64_t* field, int64_t at, int64_t first, int64_t second, bool both) {
  if (both) {
    *reinterpret_cast<longlong2*>(field + at) = {first, second};
  } else {
    field[at] = first;
  }
}
__device__ __forceinline__ void store_pair(float* field, int64_t at, float first, float second, bool both) {
  if (both) {
    *reinterpret_cast<float2*>(field + at) = {first, second};
  } else {
    field[at] = first;
  }
}

__global__ void __launch_bounds__(kThreads, 2) pack(const Ragged in, const Packed out, const Plan plan) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  if (at >= plan.num_tokens) return;
  int64_t s = last_at_most(plan.cu_seqlens, plan.num_sequences + 1, at * plan.cp_size);
  PackedSequence sequence = sequence_of(in, plan, s);
  MEGARL_DEVICE_CHECK(sequence.begin <= at, "cu_seqlens does not begin with 0");
  const Position first = position_at(in, plan, sequence, at);
  const bool both = at + 1 < plan.num_tokens;
  Position second = first;
  if (both) {
    while (at + 1 >= sequence.end) sequence = sequence_of(in, plan, ++s);  // also past sequences without positions
    second = position_at(in, plan, sequence, at + 1);
  }
  store_pair(out.token_ids, at, first.token_id, second.token_id, both);
  store_pair(out.labels, at, first.label, second.label, both);
  store_pair(out.position_ids, at, first.position_id, second.position_id, both);
  store_pair(out.sequence_ids, at, first.sequence_id, second.sequence_id, both);
  store_pair(out.loss_mask, at, first.loss_mask, second.loss_mask, both);
  store_pair(out.advantages, at, first.advantage, second.advantage, both);
  if (out.logprobs != nullptr) store_pair(out.logprobs, at, first.logprob, second.logprob, both);
}

// Unpacks one field to ragged order, shifted one to the right: element 0 of a sequence is 0. T is any type of 2, 4
// or 8 bytes.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    unpack(const T* __restrict__ values, int64_t num_packed, const int32_t* __restrict__ cu_seqlens,
           const int32_t* __restrict__ lengths, const int64_t* __restrict__ starts, int64_t num_sequences,
           int64_t num_values, T* __restrict__ unpacked) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= num_values) return;
  MEGARL_DEVICE_CHECK(num_sequences > 0 && starts[0] == 0, "starts do not begin with 0");
  const int64_t s = last_at_most(starts, num_sequences, i);
  const int64_t local = i - starts[s], begin = cu_seqlens[s];
  MEGARL_DEVICE_CHECK(local < lengths[s], "lengths and starts leave a gap");
  MEGARL_DEVICE_CHECK(begin >= 0 && lengths[s] <= cu_seqlens[s + 1] - begin && cu_seqlens[s + 1] <= num_packed,
                      "lengths do not fit cu_seqlens");
  unpacked[i] = local == 0 ? T{} : values[begin + local - 1];
}

}  // namespace megarl::pack_sequences
