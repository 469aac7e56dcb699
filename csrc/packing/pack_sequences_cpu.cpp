// Packing on CPUs: all fields of a sequence in one visit, in runs that copy like memcpy.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/check.h"
#include "packing/pack_sequences_math.h"

namespace megarl {
namespace {

constexpr int64_t kTokensPerThread = 4096;

struct Ragged {
  const int64_t* token_ids;
  const uint8_t* loss_mask;
  const float* logprobs;  // or nullptr
};

// One sequence: its range in Ragged, and the values that all its tokens share.
struct Row {
  int64_t start;
  int64_t length;
  int64_t id;
  float advantage;
};

struct Packed {
  int64_t* token_ids;
  int64_t* labels;
  float* loss_mask;
  int64_t* position_ids;
  int64_t* sequence_ids;
  float* advantages;
  float* logprobs;  // or nullptr
};

// Writes positions [begin, end) of one padded sequence, the first of them at `to`.
void write_run(const Ragged& in, const Packed& out, const Row& row, int64_t begin, int64_t end, int64_t to) {
  const int64_t tokens = std::clamp<int64_t>(row.length - begin, 0, end - begin);
  const int64_t targets = std::clamp<int64_t>(row.length - 1 - begin, 0, end - begin);
  const int64_t from = row.start + begin;
  const int64_t size = end - begin;

  std::copy_n(in.token_ids + from, tokens, out.token_ids + to);
  std::fill_n(out.token_ids + to + tokens, size - tokens, 0);
  std::copy_n(in.token_ids + from + 1, targets, out.labels + to);
  std::fill_n(out.labels + to + targets, size - targets, 0);
  for (int64_t i = 0; i < size; ++i) {
    out.position_ids[to + i] = begin + i;
    out.sequence_ids[to + i] = row.id;
  }
  const uint8_t* mask = in.loss_mask + from + 1;
  for (int64_t i = 0; i < targets; ++i) {
    out.loss_mask[to + i] = mask[i] ? 1.0f : 0.0f;
    out.advantages[to + i] = mask[i] ? row.advantage : 0.0f;
  }
  std::fill_n(out.loss_mask + to + targets, size - targets, 0.0f);
  std::fill_n(out.advantages + to + targets, size - targets, 0.0f);
  if (out.logprobs != nullptr) {
    const float* logprobs = in.logprobs + from + 1;
    for (int64_t i = 0; i < targets; ++i) {
      out.logprobs[to + i] = mask[i] ? logprobs[i] : 0.0f;
    }
    std::fill_n(out.logprobs + to + targets, size - targets, 0.0f);
  }
}

void check_flat(const char* name, const at::Tensor& tensor, int64_t size, at::ScalarType dtype) {
  check_vector("pack_sequences", name, tensor, size, dtype);
  MEGARL_CHECK("pack_sequences", tensor.is_contiguous(), name, " must be contiguous");
}

void check_rows(const at::Tensor& starts, const at::Tensor& lengths, const at::Tensor& cu_seqlens, int64_t num_flat,
                int64_t num_tokens, int64_t cp_size) {
  const char* op = "pack_sequences";
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int32_t* length = lengths.const_data_ptr<int32_t>();
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t num_sequences = starts.numel();
  MEGARL_CHECK(op, cu[0] == 0, "cu_seqlens must begin with 0, found ", cu[0]);
  for (int64_t s = 0; s < num_sequences; ++s) {
    MEGARL_CHECK(op, length[s] >= 0 && start[s] >= 0 && start[s] <= num_flat - length[s], "sequence ", s, " of ",
                 length[s], " tokens from ", start[s], " on is outside the ", num_flat, " tokens given");
    const int64_t padded = cu[s + 1] - cu[s];
    MEGARL_CHECK(op, padded >= length[s], "sequence ", s, " has ", length[s], " tokens, cu_seqlens gives it ", padded);
    MEGARL_CHECK(op, cp_size == 1 || padded % (2 * cp_size) == 0, "padded length ", padded, " of sequence ", s,
                 " is no multiple of 2 * cp_size = ", 2 * cp_size);
  }
  const int64_t total = cu[num_sequences];
  MEGARL_CHECK(op, num_tokens == total / cp_size, "num_tokens must be ", total / cp_size, ", got ", num_tokens);
}

using Fields = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Fields pack_sequences(const at::Tensor& token_ids, const at::Tensor& loss_mask,
                      const std::optional<at::Tensor>& rollout_logprobs, const at::Tensor& starts,
                      const at::Tensor& lengths, const at::Tensor& rows, const at::Tensor& advantages,
                      const at::Tensor& cu_seqlens, int64_t num_tokens, int64_t cp_rank, int64_t cp_size) {
  const char* op = "pack_sequences";
  MEGARL_CHECK(op, cp_size >= 1 && cp_rank >= 0 && cp_rank < cp_size, "cp_rank ", cp_rank, " of cp_size ", cp_size);
  const int64_t num_flat = token_ids.numel();
  const int64_t num_sequences = starts.numel();
  check_flat("token_ids", token_ids, num_flat, at::kLong);
  check_flat("loss_mask", loss_mask, num_flat, at::kByte);
  if (rollout_logprobs) {
    check_flat("rollout_logprobs", *rollout_logprobs, num_flat, at::kFloat);
  }
  check_flat("starts", starts, num_sequences, at::kLong);
  check_flat("lengths", lengths, num_sequences, at::kInt);
  check_flat("rows", rows, num_sequences, at::kLong);
  check_flat("advantages", advantages, num_sequences, at::kFloat);
  check_flat("cu_seqlens", cu_seqlens, num_sequences + 1, at::kInt);
  check_rows(starts, lengths, cu_seqlens, num_flat, num_tokens, cp_size);

  const auto longs = token_ids.options();
  const auto floats = longs.dtype(at::kFloat);
  Fields fields{at::empty({num_tokens}, longs),  at::empty({num_tokens}, longs),  at::empty({num_tokens}, floats),
                at::empty({num_tokens}, longs),  at::empty({num_tokens}, longs),  at::empty({num_tokens}, floats),
                at::empty({rollout_logprobs ? num_tokens : 0}, floats)};
  const Ragged in{token_ids.const_data_ptr<int64_t>(), loss_mask.const_data_ptr<uint8_t>(),
                  rollout_logprobs ? rollout_logprobs->const_data_ptr<float>() : nullptr};
  const Packed out{std::get<0>(fields).data_ptr<int64_t>(), std::get<1>(fields).data_ptr<int64_t>(),
                   std::get<2>(fields).data_ptr<float>(),   std::get<3>(fields).data_ptr<int64_t>(),
                   std::get<4>(fields).data_ptr<int64_t>(), std::get<5>(fields).data_ptr<float>(),
                   rollout_logprobs ? std::get<6>(fields).data_ptr<float>() : nullptr};
  const int64_t* first_token = starts.const_data_ptr<int64_t>();
  const int32_t* length = lengths.const_data_ptr<int32_t>();
  const int64_t* id = rows.const_data_ptr<int64_t>();
  const float* advantage = advantages.const_data_ptr<float>();
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();

  // Threads share tokens, not sequences: one long sequence is cut, many short ones are batched.
  at::parallel_for(0, num_tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
    const int64_t first = std::upper_bound(cu, cu + num_sequences + 1, begin * cp_size) - cu - 1;
    for (int64_t s = first; s < num_sequences && cu[s] / cp_size < end; ++s) {
      const Row row{first_token[s], length[s], id[s], advantage[s]};
      const int64_t start = cu[s] / cp_size;
      const int64_t stop = cu[s + 1] / cp_size;
      const int64_t chunk = cp_size == 1 ? stop - start : (stop - start) / 2;
      const int64_t limit = std::min(end, stop);
      for (int64_t to = std::max(begin, start); to < limit;) {
        const int64_t local = to - start;
        const int64_t run_end = std::min(limit, start + (local < chunk ? chunk : stop - start));
        const int64_t position = zigzag_position(local, chunk, cp_rank, cp_size);
        write_run(in, out, row, position, position + (run_end - to), to);
        to = run_end;
      }
    }
  });
  return fields;
}

template <typename T>
void unpack_rows(const at::Tensor& values, const int32_t* cu, const int32_t* lengths, const int64_t* starts,
                 int64_t num_sequences, at::Tensor& unpacked) {
  const T* source = static_cast<const T*>(values.const_data_ptr());
  T* target = static_cast<T*>(unpacked.mutable_data_ptr());
  const int64_t per_sequence = std::max<int64_t>(1, unpacked.numel() / std::max<int64_t>(1, num_sequences));
  at::parallel_for(0, num_sequences, std::max<int64_t>(1, kTokensPerThread / per_sequence),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t s = begin; s < end; ++s) {
                       if (lengths[s] > 0) {
                         target[starts[s]] = T{};
                         std::copy_n(source + cu[s], lengths[s] - 1, target + starts[s] + 1);
                       }
                     }
                   });
}

at::Tensor unpack_values(const at::Tensor& values, const at::Tensor& cu_seqlens, const at::Tensor& lengths,
                         const at::Tensor& starts, int64_t num_values) {
  const char* op = "unpack_values";
  const int64_t num_sequences = lengths.numel();
  MEGARL_CHECK(op, values.dim() == 1 && values.is_contiguous(), "values must be contiguous [T], got ", values.sizes());
  check_vector(op, "cu_seqlens", cu_seqlens, num_sequences + 1, at::kInt);
  check_vector(op, "lengths", lengths, num_sequences, at::kInt);
  check_vector(op, "starts", starts, num_sequences, at::kLong);
  const at::Tensor bounds = cu_seqlens.contiguous();
  const at::Tensor sizes = lengths.contiguous();
  const at::Tensor targets = starts.contiguous();
  const int32_t* cu = bounds.const_data_ptr<int32_t>();
  const int32_t* n = sizes.const_data_ptr<int32_t>();
  const int64_t* start = targets.const_data_ptr<int64_t>();
  int64_t expected = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    MEGARL_CHECK(op, cu[s] >= 0 && n[s] >= 0 && n[s] <= cu[s + 1] - cu[s], "lengths[", s, "] = ", n[s],
                 " does not fit cu_seqlens ", cu[s], " to ", cu[s + 1]);
    MEGARL_CHECK(op, start[s] == expected, "starts[", s, "] must be ", expected, ", got ", start[s]);
    expected += n[s];
  }
  MEGARL_CHECK(op, expected == num_values, "lengths add up to ", expected, ", num_values is ", num_values);
  MEGARL_CHECK(op, cu[num_sequences] == values.size(0), "cu_seqlens end at ", cu[num_sequences], ", values at ",
               values.size(0));
  at::Tensor unpacked = at::empty({num_values}, values.options());
  switch (values.element_size()) {
    case 2: unpack_rows<uint16_t>(values, cu, n, start, num_sequences, unpacked); break;
    case 4: unpack_rows<uint32_t>(values, cu, n, start, num_sequences, unpacked); break;
    case 8: unpack_rows<uint64_t>(values, cu, n, start, num_sequences, unpacked); break;
    default: MEGARL_CHECK(op, false, "values must be of 2, 4 or 8 bytes each, got ", values.scalar_type());
  }
  return unpacked;
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CPU, m) {
  m.impl("pack_sequences", &pack_sequences);
  m.impl("unpack_values", &unpack_values);
}

}  // namespace megarl
