// vLLM's own kernels that a dense decoder runs, for the CPU key: embedding, norms, rotary embedding,
// gated activation, cache writes.
// Intermediate values are float32, rounded where vLLM's kernels round.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace {
using at::Tensor;
using Maybe = std::optional<Tensor>;

Tensor normalized(const Tensor& x, const Maybe& weight, double epsilon) {
  auto real = x.to(at::kFloat);
  auto rounded = (real * at::rsqrt(real.square().mean(-1, true) + epsilon)).to(x.scalar_type());
  return weight ? rounded * *weight : rounded;
}

void rms_norm(Tensor result, const Tensor& input, const Maybe& weight, double epsilon) {
  result.copy_(normalized(input, weight, epsilon));
}

void fused_add_rms_norm(Tensor input, Tensor residual, const Maybe& weight, double epsilon) {
  residual.add_(input);
  input.copy_(normalized(residual, weight, epsilon));
}

void silu_and_mul(Tensor result, const Tensor& input) {
  auto halves = input.chunk(2, -1);
  result.copy_(at::silu(halves[0]) * halves[1]);
}

// One of query and key: the first `rotary` of each head's channels are turned by the token's angle.
void rotate(Tensor tensor, const Tensor& cos, const Tensor& sin, int64_t head_size, bool neox) {
  const int64_t tokens = cos.size(0), half = cos.size(-1);
  auto heads = tensor.reshape({tokens, -1, head_size});
  auto turned = heads.narrow(-1, 0, 2 * half).to(at::kFloat);
  // NeoX pairs channel i with i + half, GPT-J with its neighbour.
  auto pairs = neox ? turned.unflatten(-1, {2, half}) : turned.unflatten(-1, {half, 2}).transpose(-2, -1);
  auto x = pairs.select(-2, 0), y = pairs.select(-2, 1);
  auto c = cos.unsqueeze(1), s = sin.unsqueeze(1);
  auto result = at::stack({x * c - y * s, y * c + x * s}, -2);
  if (!neox) result = result.transpose(-2, -1);
  auto rest = heads.narrow(-1, 2 * half, head_size - 2 * half);
  tensor.copy_(at::cat({result.flatten(-2).to(tensor.scalar_type()), rest}, -1).view(tensor.sizes()));
}

void rotary_embedding(const Tensor& positions, Tensor query, Maybe key, int64_t head_size, const Tensor& cos_sin,
                      bool neox, int64_t offset, bool inverse) {
  TORCH_CHECK(offset == 0 && !inverse, "fakecuda: rotary_embedding with an offset or inverse");
  auto parts = cos_sin.index_select(0, positions.flatten()).to(at::kFloat).chunk(2, -1);
  rotate(query, parts[0], parts[1], head_size, neox);
  if (key) rotate(*key, parts[0], parts[1], head_size, neox);
}

// Pages are [page, slot, head, channel]; a negative slot is padding.
void reshape_and_cache_flash(const Tensor& key, const Tensor& value, Tensor key_cache, Tensor value_cache,
                             const Tensor& slots, c10::string_view kind, const Tensor&, const Tensor&) {
  TORCH_CHECK(kind.substr(0, 3) != "fp8", "fakecuda: a KV cache of ", kind);
  const int64_t page_size = key_cache.size(1);
  auto kept = slots.ge(0).nonzero().flatten();
  auto slot = slots.index_select(0, kept);
  auto page = slot.div(page_size, "floor"), within = slot.remainder(page_size);
  key_cache.index_put_({page, within}, key.index_select(0, kept).to(key_cache.scalar_type()));
  value_cache.index_put_({page, within}, value.index_select(0, kept).to(value_cache.scalar_type()));
}

// A tensor rank's part of the embedding: rows of its own vocabulary, and after some padding of its added tokens;
// zeros for tokens of other ranks.
void vocab_parallel_embedding(Tensor out, const Tensor& ids, const Tensor& weight, int64_t first, int64_t end,
                              int64_t padding, int64_t added_first, int64_t added_end) {
  auto own = ids.ge(first) & ids.lt(end);
  auto added = ids.ge(added_first) & ids.lt(added_end);
  auto row = at::where(added, ids - added_first + (end - first + padding), ids - first);
  auto here = own | added;
  auto rows = weight.index_select(0, row.masked_fill(~here, 0).to(at::kLong));
  out.copy_(rows.masked_fill(~here.unsqueeze(-1), 0));
}

TORCH_LIBRARY_IMPL(_C, CPU, m) {
  m.impl("vocab_parallel_embedding", vocab_parallel_embedding);
  m.impl("rms_norm", rms_norm);
  m.impl("fused_add_rms_norm", fused_add_rms_norm);
  m.impl("silu_and_mul", silu_and_mul);
  m.impl("rotary_embedding", rotary_embedding);
}
TORCH_LIBRARY_IMPL(_C_cache_ops, CPU, m) { m.impl("reshape_and_cache_flash", reshape_and_cache_flash); }
}  // namespace
