// Every native op of MegaRL on one page.
//
// Kernels register themselves (TORCH_LIBRARY_IMPL) in csrc/<op>/; fake and autograd registrations
// are in megarl/ops/<op>.py, next to the call. Collectives stay in Python, around the ops: with tensor
// parallelism an op gets its shard and returns per-row statistics that are merged over shards.
//
// Notation: T rows (tokens) of the logits, R rows evaluated (R = T without row_index), V columns of this
// vocabulary shard. temperature is [1] or [R]; statistics are float32 (float64 for float64 logits).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "packing/planner.h"

// Read by megarl/ops/_load.py *before* this library is loaded: on a machine without these instructions
// even its static initialisers would crash.
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
  // Overwrites the R rows of logits with the gradient of grad_stats [R, 4]; column 0 (max) of grad_stats
  // is ignored: results do not depend on the shift. row_max [R] is the shift of stats.
  m.def(
      "token_logprob_backward_(Tensor(a!) logits, Tensor targets, Tensor temperature, int vocab_start, "
      "Tensor? row_index, Tensor? min_logit, Tensor row_max, Tensor grad_stats) -> ()");

  // The same statistics of the logits hidden [R, H] x weight [V, H]^T, one tile of at most max_extra_bytes
  // at a time; the backward recomputes the tiles. A gradient that is not needed is returned empty.
  m.def(
      "linear_token_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, int vocab_start, "
      "Tensor? min_logit, int max_extra_bytes) -> Tensor");
  m.def(
      "linear_token_logprob_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, "
      "int vocab_start, Tensor? min_logit, Tensor row_max, Tensor grad_stats, int max_extra_bytes, "
      "bool need_hidden, bool need_weight) -> (Tensor, Tensor)");

  // Student and teacher logits [R, V] -> [R, 6]: student max and sum of exp(ds), teacher max and sum of exp(dt),
  // sum of exp(ds) (ds - dt), sum of exp(dt) (dt - ds), with d = (x - max) / temperature of each.
  // Gradients flow to the student; inplace_backward as above.
  m.def("vocab_kl(Tensor student, Tensor teacher, Tensor temperature, bool inplace_backward) -> Tensor");
  // Overwrites the student's logits with the gradient of grad_stats [R, 6]; the columns of the maxima
  // are ignored. row_max [R, 2] are the shifts: student's, teacher's.
  m.def(
      "vocab_kl_backward_(Tensor(a!) student, Tensor teacher, Tensor temperature, Tensor row_max, "
      "Tensor grad_stats) -> ()");
  // With p student, q teacher, M = (1 - beta) p + beta q and their log-sum-exps [R]: this shard's
  // sums [R, 2] of p log(p / M) and q log(q / M). The generalised Jensen-Shannon divergence is
  // (1 - beta) first + beta second.
  m.def(
      "vocab_js(Tensor student, Tensor teacher, Tensor temperature, Tensor student_lse, Tensor teacher_lse, "
      "float beta) -> Tensor");
  // Overwrites the student's logits with grad [R] times the gradient of the divergence; student_sum [R]
  // is the first sum over all shards.
  m.def(
      "vocab_js_backward_(Tensor(a!) student, Tensor teacher, Tensor temperature, Tensor student_lse, "
      "Tensor teacher_lse, float beta, Tensor student_sum, Tensor grad) -> ()");

  // Per sequence [S, 3] float64 over its tokens with weight != 0: sums of logprobs - old_logprobs and of
  // old_logprobs - rollout_logprobs (0 without), and their number. sequence_ids [R] int64 ascend.
  m.def(
      "policy_sequence_sums(Tensor logprobs, Tensor old_logprobs, Tensor? rollout_logprobs, Tensor weights, "
      "Tensor sequence_ids, int num_sequences) -> Tensor");
  // Per-token tensors are [R]; tokens of weight 0 are ignored, whatever their values. -> [17] float64: the loss, then
  // the logged sums in the order of megarl/ops/policy_loss.py. Only the loss has a gradient.
  // sequence_sums [S, 3] is needed by level "sequence", by objective "vespo" and by corrections "sequence_*".
  // numbers [15] are the options that are numbers, in the order of PolicyLossOptions.numbers.
  m.def(
      "policy_loss(Tensor logprobs, Tensor? entropy, Tensor old_logprobs, Tensor advantages, Tensor weights, "
      "Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? sequence_ids, Tensor? sequence_sums, "
      "str objective, str level, str correction, str sequence_weight, str kl, str kl_gradient, "
      "float[] numbers) -> Tensor");
  // -> gradients of logprobs and of entropy (empty without), times grad_loss [].
  m.def(
      "policy_loss_backward(Tensor grad_loss, Tensor logprobs, Tensor? entropy, Tensor old_logprobs, "
      "Tensor advantages, Tensor weights, Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? sequence_ids, "
      "Tensor? sequence_sums, str objective, str level, str correction, str sequence_weight, str kl, "
      "str kl_gradient, float[] numbers) -> (Tensor, Tensor)");

  // Packing (layout: PackedBatch in megarl/records.py). Ragged sequences are in token_ids [N] int64, loss_mask [N]
  // uint8 and rollout_logprobs [N] float32. Sequence s of S has lengths [S] int32 (0: a dummy) tokens from starts [S]
  // int64 on; its row in the caller's list is rows [S] int64, its advantage advantages [S] float32, its padded range
  // that of cu_seqlens [S + 1] int32. Returns the share of context-parallel rank cp_rank, T = num_tokens =
  // cu_seqlens[S] / cp_size: token_ids, labels, loss_mask, position_ids, sequence_ids, advantages, rollout_logprobs
  // ([0] if none were given).
  m.def(
      "pack_sequences(Tensor token_ids, Tensor loss_mask, Tensor? rollout_logprobs, Tensor starts, Tensor lengths, "
      "Tensor rows, Tensor advantages, Tensor cu_seqlens, int num_tokens, int cp_rank, int cp_size) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Its inverse for one field: values [T] -> [num_values = sum of lengths [S] int32], shifted one to the right
  // (element 0 of a sequence is 0), without padding. starts [S] int64 is each sequence's offset in the result.
  m.def(
      "unpack_values(Tensor values, Tensor cu_seqlens, Tensor lengths, Tensor starts, int num_values) -> Tensor");

  // values [T], cu_seqlens [S + 1] int32, mask [T] float32 (0 skips a value, NaN or not) -> [S] in the dtype of
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

namespace {

template <typename T>
pybind11::array_t<T> to_array(const std::vector<T>& values) {
  return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

// Padded lengths [n] -> (indices [n], microbatch offsets [K + 1], microbatches per rank [num_ranks]).
pybind11::tuple plan_microbatches(
    pybind11::array_t<int64_t, pybind11::array::c_style | pybind11::array::forcecast> lengths, int64_t max_tokens,
    int64_t num_ranks, int64_t group, bool equal_counts, double a, double b) {
  megarl::packing::Plan plan;
  {
    pybind11::gil_scoped_release unlocked;
    plan = megarl::packing::plan_microbatches(
        {lengths.data(), lengths.size(), max_tokens, num_ranks, group, equal_counts, a, b});
  }
  return pybind11::make_tuple(to_array(plan.indices), to_array(plan.offsets), to_array(plan.rank_counts));
}

}  // namespace

// The build names the module: _C, or a wheel's _C_avx2 and _C_avx512.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native ops of MegaRL; importing registers torch.ops.megarl.*";
  m.def("plan_microbatches", &plan_microbatches, pybind11::arg("lengths"), pybind11::kw_only(),
        pybind11::arg("max_tokens"), pybind11::arg("num_ranks"), pybind11::arg("group"),
        pybind11::arg("equal_counts"), pybind11::arg("a"), pybind11::arg("b"));
  m.attr("cpu_capability") = MEGARL_CPU_CAPABILITY;
#ifdef MEGARL_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
