// vLLM's kernels around its fused experts, for the CPU key: routing, the sorting of tokens into blocks of one expert,
// and the sum over a token's experts. The experts themselves are a Triton kernel (site/fakecuda_triton.py).
#include <ATen/ATen.h>
#include <torch/library.h>

namespace {
using at::Tensor;
using Maybe = std::optional<Tensor>;

// The bias decides which experts are taken and not how much they weigh. Padded tokens choose expert -1.
void choose(const Tensor& scores, Tensor weights, Tensor experts, Tensor rows, bool renormalize, const Maybe& bias,
            const Maybe& padding, double scale) {
  const int64_t tokens = weights.size(0), k = weights.size(1);
  auto ranked = bias ? scores + bias->to(at::kFloat) : scores;
  auto chosen = std::get<1>(ranked.topk(k, -1));
  auto taken = scores.gather(-1, chosen);
  if (renormalize) taken = taken / taken.sum(-1, true);
  if (padding) chosen = chosen.masked_fill(padding->unsqueeze(-1), -1);
  weights.copy_(taken * scale);
  experts.copy_(chosen);
  rows.copy_(at::arange(k * tokens).view({k, tokens}).t());
}

void topk_softmax(Tensor weights, Tensor experts, Tensor rows, const Tensor& logits, bool renormalize,
                  const Maybe& bias, const Maybe& padding) {
  choose(at::softmax(logits.to(at::kFloat), -1), weights, experts, rows, renormalize, bias, padding, 1.0);
}

void topk_sigmoid(Tensor weights, Tensor experts, Tensor rows, const Tensor& logits, bool renormalize,
                  const Maybe& bias, double scale, const Maybe& padding) {
  choose(at::sigmoid(logits.to(at::kFloat)), weights, experts, rows, renormalize, bias, padding, scale);
}

// Groups the routed rows (token * top_k + choice) by expert, each group padded to whole blocks with a row that does not
// exist. With a map only experts of this rank (>= 0 in it) take part, by their local number.
void moe_align_block_size(const Tensor& choices, int64_t experts, int64_t block, Tensor sorted_rows,
                          Tensor block_experts, Tensor total, const Maybe& map, const Maybe& scatter) {
  TORCH_CHECK(!scatter, "fakecuda: moe_align_block_size with scatter_idx");
  auto chosen = choices.flatten().to(at::kLong).contiguous();
  const int64_t* choice = chosen.const_data_ptr<int64_t>();
  std::vector<std::vector<int>> rows(experts);
  for (int64_t row = 0; row < chosen.numel(); row++) {
    int64_t expert = choice[row];
    if (expert < 0 || expert >= experts) continue;
    if (map) expert = (*map)[expert].item<int64_t>();
    if (expert >= 0) rows[expert].push_back(static_cast<int>(row));
  }
  sorted_rows.fill_(chosen.numel());
  block_experts.fill_(-1);
  int64_t at = 0;
  for (int64_t expert = 0; expert < experts; expert++) {
    const int64_t count = rows[expert].size(), blocks = (count + block - 1) / block;
    if (count == 0) continue;
    sorted_rows.narrow(0, at, count).copy_(at::tensor(rows[expert], at::kInt));
    block_experts.narrow(0, at / block, blocks).fill_(expert);
    at += blocks * block;
  }
  total.fill_(at);
}

// [tokens, top_k, hidden] to [tokens, hidden]; choices of other ranks' experts are left out.
void moe_sum(const Tensor& input, Tensor output, const Maybe& choices, const Maybe& map) {
  auto real = input.to(at::kFloat);
  if (choices) {
    auto local = choices->ge(0);
    if (map) local = local & map->index_select(0, choices->clamp_min(0).flatten().to(at::kLong)).view_as(local).ge(0);
    real = real.masked_fill(~local.unsqueeze(-1), 0);
  }
  output.copy_(real.sum(1));
}

TORCH_LIBRARY_IMPL(_moe_C, CPU, m) {
  m.impl("topk_softmax", topk_softmax);
  m.impl("topk_sigmoid", topk_sigmoid);
  m.impl("moe_align_block_size", moe_align_block_size);
  m.impl("moe_sum", moe_sum);
}
}  // namespace
