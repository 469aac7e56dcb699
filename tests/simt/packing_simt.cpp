// Launches of csrc/packing/pack_sequences_kernels.cuh for test_packing.py.
#include "packing/pack_sequences_kernels.cuh"

namespace K = megarl::pack_sequences;

extern "C" int pack(const int64_t* token_ids, const uint8_t* loss_mask, const float* logprobs, int64_t num_values,
                    const int64_t* starts, const int32_t* lengths, const int64_t* rows, const float* advantages,
                    const int32_t* cu, int64_t num_sequences, int64_t num_tokens, int64_t cp_rank, int64_t cp_size,
                    int64_t* out_ids, int64_t* labels, float* out_mask, int64_t* position_ids, int64_t* sequence_ids,
                    float* out_advantages, float* out_logprobs) {
  const K::Ragged in{token_ids, loss_mask, logprobs, num_values};
  const K::Packed out{out_ids, labels, out_mask, position_ids, sequence_ids, out_advantages, out_logprobs};
  const K::Plan plan{starts, lengths, rows, advantages, cu, num_sequences, num_tokens, cp_rank, cp_size};
  constexpr int64_t per_block = K::kThreads * K::kPerThread;
  return simt::launch("pack_sequences::pack", unsigned((num_tokens + per_block - 1) / per_block), K::kThreads, 0,
                      [=] { K::pack(in, out, plan); });
}

#define DEFINE_UNPACK(BITS)                                                                                           \
  extern "C" int unpack_##BITS(const uint##BITS##_t* values, int64_t num_packed, const int32_t* cu,                   \
                               const int32_t* lengths, const int64_t* starts, int64_t num_sequences,                  \
                               int64_t num_values, uint##BITS##_t* unpacked) {                                        \
    return simt::launch("pack_sequences::unpack", unsigned((num_values + K::kThreads - 1) / K::kThreads), K::kThreads, \
                        0, [=] {                                                                                      \
                          K::unpack(values, num_packed, cu, lengths, starts, num_sequences, num_values, unpacked);    \
                        });                                                                                           \
  }
DEFINE_UNPACK(16)
DEFINE_UNPACK(32)
DEFINE_UNPACK(64)
