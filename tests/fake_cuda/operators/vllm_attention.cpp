// Attention over a paged KV cache: vLLM's FlashAttention 2 and 3, and (as fakecuda::paged_attention, for
// site/fakecuda_triton.py) its Triton kernel, which takes minutes in Triton's interpreter.
#include <torch/library.h>

#include "attention_math.h"

namespace {
using at::Tensor;
using c10::IValue;
using fake::MaybeTensor;
using fake::Sight;
using torch::jit::Stack;

struct PagedBatch {
  Tensor q, k, v, out;           // q, out [tokens, heads, width]; k, v in a row or in pages [page, slot, heads, width]
  Tensor q_bounds;               // [sequences + 1]
  MaybeTensor k_bounds, k_used;  // where the keys lie in a row; how many of them count
  MaybeTensor pages;             // [sequences, pages of each]
  double scale;
  bool causal;
  int64_t left, right;
  double softcap;
};

// Writes batch.out; returns log-sum-exp [heads, tokens].
Tensor attend(const PagedBatch& batch) {
  auto lse = at::zeros({batch.q.size(1), batch.q.size(0)}, at::kFloat);
  auto bounds = batch.q_bounds.to(at::kLong);
  for (int64_t i = 0; i + 1 < bounds.numel(); i++) {
    const int64_t from = bounds[i].item<int64_t>(), count = bounds[i + 1].item<int64_t>() - from;
    if (count <= 0) continue;
    const int64_t first_key = batch.k_bounds ? (*batch.k_bounds)[i].item<int64_t>() : 0;
    const int64_t keys = batch.k_used ? (*batch.k_used)[i].item<int64_t>()
                                      : (*batch.k_bounds)[i + 1].item<int64_t>() - first_key;
    auto out = batch.out.narrow(0, from, count);
    if (keys <= 0) {
      out.zero_();
      continue;
    }
    auto of_sequence = [&](const Tensor& tensor) {
      if (!batch.pages) return tensor.narrow(0, first_key, keys);
      const int64_t page_size = tensor.size(1);
      auto ids = (*batch.pages)[i].narrow(0, 0, (keys + page_size - 1) / page_size);
      return tensor.index_select(0, ids.to(at::kLong)).flatten(0, 1).narrow(0, 0, keys);
    };
    Sight sight = Sight::causal(batch.causal, keys - count);
    sight.left = batch.left;
    if (!batch.causal) sight.right = batch.right;
    sight.softcap = batch.softcap;
    auto by_head = [](const Tensor& tensor) { return tensor.transpose(0, 1); };
    auto [part, part_lse] = fake::attention(by_head(batch.q.narrow(0, from, count)), by_head(of_sequence(batch.k)),
                                            by_head(of_sequence(batch.v)), {}, batch.scale, sight);
    out.copy_(by_head(part));
    lse.narrow(1, from, count).copy_(part_lse);
  }
  return lse;
}

// A boxed call's arguments by name: these operators have up to forty.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, Stack* stack) : schema_(op.schema()) {
    const size_t count = schema_.arguments().size();
    values_.assign(stack->end() - count, stack->end());
    torch::jit::drop(*stack, count);
  }
  const IValue& operator[](const char* name) const {
    auto index = schema_.argumentIndexWithName(name);
    TORCH_CHECK(index, "fakecuda: ", schema_.name(), " has no argument ", name);
    return values_[*index];
  }
  MaybeTensor maybe(const char* name) const {
    const IValue& value = (*this)[name];
    return value.isTensor() && value.toTensor().defined() ? MaybeTensor(value.toTensor()) : std::nullopt;
  }
  // Of the features a kernel has, those that no caller here uses.
  void refuse(std::initializer_list<const char*> names) const {
    for (const char* name : names) TORCH_CHECK(!maybe(name), "fakecuda: ", schema_.name(), " with ", name);
  }
  PagedBatch batch(const char* pages) const {
    auto q = (*this)["q"].toTensor();
    auto out = maybe("out");
    return {q, (*this)["k"].toTensor(), (*this)["v"].toTensor(), out ? *out : at::empty_like(q),
            *maybe("cu_seqlens_q"), maybe("cu_seqlens_k"), maybe("seqused_k"), maybe(pages),
            (*this)["softmax_scale"].toDouble(), (*this)["is_causal"].toBool(), (*this)["window_size_left"].toInt(),
            (*this)["window_size_right"].toInt(), (*this)["softcap"].toDouble()};
  }

 private:
  const c10::FunctionSchema& schema_;
  std::vector<IValue> values_;
};

void flash2(const c10::OperatorHandle& op, Stack* stack) {
  Arguments arguments(op, stack);
  arguments.refuse({"leftpad_k", "alibi_slopes"});
  auto batch = arguments.batch("block_table");
  if (batch.pages) batch.k_bounds.reset();  // bounds of a row that is not there
  auto lse = attend(batch);
  stack->push_back(c10::List<Tensor>({batch.out, lse}));
}

void flash3(const c10::OperatorHandle& op, Stack* stack) {
  Arguments arguments(op, stack);
  arguments.refuse({"k_new", "v_new", "q_v", "rotary_cos", "s_aux", "seqused_q", "kv_batch_idx", "leftpad_k"});
  auto batch = arguments.batch("page_table");
  auto lse = attend(batch);
  stack->push_back(c10::List<Tensor>({batch.out, lse, at::empty({0}), at::empty({0})}));
}

// The distribution of the kernel's blocks over the GPU: only the length matters here, since callers slice it.
void flash3_metadata(const c10::OperatorHandle& op, Stack* stack) {
  Arguments arguments(op, stack);
  stack->push_back(at::zeros({arguments["batch_size"].toInt() + 1}, at::kInt));
}

void paged_attention(const Tensor& q, const Tensor& k, const Tensor& v, Tensor out, const Tensor& q_bounds,
                     const Tensor& used, const Tensor& pages, double scale, bool causal, int64_t left, double softcap) {
  attend({q, k, v, out, q_bounds, std::nullopt, used, pages, scale, causal, left, -1, softcap});
}

TORCH_LIBRARY_IMPL(_vllm_fa2_C, CPU, m) {
  m.impl("varlen_fwd", torch::CppFunction::makeFromBoxedFunction<&flash2>());
}
TORCH_LIBRARY_IMPL(_vllm_fa3_C, CPU, m) {
  m.impl("fwd", torch::CppFunction::makeFromBoxedFunction<&flash3>());
  m.impl("get_scheduler_metadata", torch::CppFunction::makeFromBoxedFunction<&flash3_metadata>());
}
TORCH_LIBRARY_FRAGMENT(fakecuda, m) {
  m.def("paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor q_bounds, Tensor used, Tensor pages, "
        "float scale, bool causal, int left, float softcap) -> ()");
}
TORCH_LIBRARY_IMPL(fakecuda, CPU, m) { m.impl("paged_attention", paged_attention); }
}  // namespace
