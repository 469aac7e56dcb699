// Every native op of MegaRL on one page.
//
// Kernels register themselves (TORCH_LIBRARY_IMPL) in csrc/<op>/; fake and autograd registrations
// are in megarl/ops/<op>.py, beside the call. Collectives stay in Python, around the ops: with tensor
// parallelism an op sees its shard and returns per-row statistics that combine over shards.
//
// Words: T rows (tokens) of the logits, R rows evaluated (R = T without row_index), V columns of this
// vocabulary shard. temperature is [1] or [R]; statistics are float32 (float64 for float64 logits).

#include <pybind11/pybind11.h>
#include <torch/library.h>

// Read by megarl/ops/_load.py *before* this library is loaded: on a machine that lacks these
// instructions even its static initialisers would not run.
extern "C" __attribute__((used, visibility("default"))) const char megarl_cpu_capability[] =
    "MEGARL_CPU_CAPABILITY=" MEGARL_CPU_CAPABILITY;

TORCH_LIBRARY(megarl, m) {
  // -> [R, 4]: max logit, sum of exp((x - max) / temperature), target's logit (-inf when another shard
  // has it), sum of (x - max) / temperature * exp(...). Logits below min_logit [R] are outside the
  // sampler's support; the target never is. targets [R] are global ids. inplace_backward is read by the
  // autograd formula alone: its backward overwrites logits.
  m.def(
      "token_logprob(Tensor logits, Tensor targets, Tensor temperature, int vocab_start, "
      "Tensor? row_index, Tensor? min_logit, bool inplace_backward) -> Tensor");
  // Overwrites the R rows of logits by the gradient that grad_stats [R, 4] makes; column 0 (max) of
  // grad_stats is ignored: results do not depend on the shift. row_max [R] is the shift of stats.
  m.def(
      "token_logprob_backward_(Tensor(a!) logits, Tensor targets, Tensor temperature, int vocab_start, "
      "Tensor? row_index, Tensor? min_logit, Tensor row_max, Tensor grad_stats) -> ()");

  // Packing (layout: PackedBatch in megarl/records.py). M ragged sequences lie end to end in token_ids [N] int64,
  // loss_mask [N] uint8, rollout_logprobs [N] float32, bounded by offsets [M + 1] int64; advantages [M] float32.
  // Packs sequences indices [S] int64 (-1: a dummy without tokens) into cu_seqlens [S + 1] int32, padded and global;
  // returns the share of context-parallel rank cp_rank, T = num_tokens = cu_seqlens[S] / cp_size: token_ids, labels,
  // loss_mask, position_ids, sequence_ids, advantages, rollout_logprobs ([0] where none came in).
  m.def(
      "pack_sequences(Tensor token_ids, Tensor loss_mask, Tensor offsets, Tensor advantages, "
      "Tensor? rollout_logprobs, Tensor indices, Tensor cu_seqlens, int num_tokens, int cp_rank, int cp_size) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Its inverse for one field: values [T] -> [num_values = sum of lengths [S] int32], one to the right (element 0
  // of a sequence is 0), padding left out. starts [S] int64 is where each sequence goes.
  m.def(
      "unpack_values(Tensor values, Tensor cu_seqlens, Tensor lengths, Tensor starts, int num_values) -> Tensor");

  // values [T], cu_seqlens [S + 1] int32, mask [T] float32 (0 leaves a value out, NaN or not) -> [S] in the type of
  // values: masked sums, or means (0 over nothing). The backward returns [T = num_values].
  m.def("segment_reduce(Tensor values, Tensor cu_seqlens, Tensor? mask, bool mean) -> Tensor");
  m.def(
      "segment_reduce_backward(Tensor grad, Tensor cu_seqlens, Tensor? mask, int num_values, bool mean) -> Tensor");
  // rewards and values [T], mask [T] float32, cu_seqlens [S + 1] int32 -> advantages and returns [T], 0 off the mask;
  // the next state of a masked position is the next masked position of its sequence.
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor mask, Tensor cu_seqlens, float gamma, float gae_lambda) "
      "-> (Tensor, Tensor)");
  // rewards [N] float32 or float64, cu_groups [G + 1] int32 -> advantages [N] (megarl/advantages/group.py).
  m.def(
      "group_advantage(Tensor rewards, Tensor cu_groups, bool leave_one_out, bool normalize_std, float epsilon) "
      "-> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of MegaRL; importing registers torch.ops.megarl.*";
  m.attr("cpu_capability") = MEGARL_CPU_CAPABILITY;
#ifdef MEGARL_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
