// Logits of a head, hidden [R, H] x weight [V, H]^T, tile by tile in one reused buffer. Any device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "common/check.h"

namespace megarl {

// Tiles are wide in rows and narrow in columns: each GEMM then reads its part of the weight once, and the
// weight's gradient is written once. 4096 columns keep a GEMM efficient on GPUs; on CPUs 2048 are faster, since
// more of the tile is still in a cache when it is read. If the budget allows fewer rows per tile, the weight
// is read in more passes.
struct HeadTiles {
  static constexpr int64_t kColumns = 4096, kCpuColumns = 2048;
  static constexpr int64_t kFewestRows = 128;

  int64_t num_rows, num_columns;  // of all logits
  int64_t rows, columns;          // of a tile

  HeadTiles(const char* op, const at::Tensor& hidden, const at::Tensor& weight, int64_t max_bytes)
      : num_rows(hidden.size(0)), num_columns(weight.size(0)) {
    MEGARL_CHECK(op, max_bytes > 0, "max_extra_bytes must be positive, got ", max_bytes);
    const int64_t logits = std::max<int64_t>(1, max_bytes / static_cast<int64_t>(hidden.element_size()));
    const int64_t fewest = std::max<int64_t>(1, std::min(num_rows, kFewestRows));
    const int64_t widest = std::min(num_columns, hidden.is_cpu() ? kCpuColumns : kColumns);
    columns = std::clamp<int64_t>(logits / fewest, 1, widest);
    rows = std::clamp<int64_t>(logits / columns, 1, std::max<int64_t>(1, num_rows));
  }

  int64_t tiles_per_row() const { return (num_columns + columns - 1) / columns; }

  // body(first row, rows, first column, columns), all columns of a block of rows before the next rows.
  template <typename F>
  void for_each(const F& body) const {
    for (int64_t row = 0; row < num_rows; row += rows) {
      for (int64_t column = 0; column < num_columns; column += columns) {
        body(row, std::min(rows, num_rows - row), column, std::min(columns, num_columns - column));
      }
    }
  }
};

inline void check_head(const char* op, const at::Tensor& hidden, const at::Tensor& weight) {
  MEGARL_CHECK(op, hidden.dim() == 2, "hidden must have shape [T, H], got ", hidden.sizes());
  MEGARL_CHECK(op, weight.dim() == 2 && weight.size(1) == hidden.size(1), "weight must have shape [V, ",
               hidden.size(1), "], got ", weight.sizes());
  MEGARL_CHECK(op, weight.size(0) > 0, "weight has an empty vocabulary: ", weight.sizes());
  MEGARL_CHECK(op, weight.scalar_type() == hidden.scalar_type(), "weight is ", weight.scalar_type(),
               ", hidden ", hidden.scalar_type());
  MEGARL_CHECK(op, weight.device() == hidden.device(), "weight is on ", weight.device(), ", hidden on ",
               hidden.device());
}

// One head and the buffer that holds its current tile of logits.
class Head {
 public:
  Head(const at::Tensor& hidden, const at::Tensor& weight, const HeadTiles& tiles)
      : hidden_(hidden), weight_(weight), buffer_(at::empty({tiles.rows * tiles.columns}, hidden.options())) {}

  // Logits [n, c] of rows row.. and columns column..; valid until the next call.
  at::Tensor logits(int64_t row, int64_t n, int64_t column, int64_t c) {
    at::Tensor tile = buffer_.narrow(0, 0, n * c).view({n, c});
    at::mm_out(tile, hidden_.narrow(0, row, n), weight_.narrow(0, column, c).t());
    return tile;
  }

 private:
  at::Tensor hidden_, weight_, buffer_;
};

// Gradients of hidden and weight, summed tile by tile. The sum for hidden runs over many tiles of the
// vocabulary and is kept in float32 for 16-bit types, one block of rows at a time.
class HeadGradient {
 public:
  HeadGradient(const at::Tensor& hidden, const at::Tensor& weight, const HeadTiles& tiles, bool need_hidden,
               bool need_weight)
      : hidden_(hidden), weight_(weight) {
    const bool narrow = hidden.scalar_type() == at::kBFloat16 || hidden.scalar_type() == at::kHalf;
    if (need_hidden) grad_hidden_ = at::empty(hidden.sizes(), hidden.options());
    if (need_hidden && narrow) sum_ = at::empty({tiles.rows, hidden.size(1)}, hidden.options().dtype(at::kFloat));
    if (need_weight) {
      // Without rows no tile would write it.
      grad_weight_ = tiles.num_rows == 0 ? at::zeros(weight.sizes(), weight.options())
                                         : at::empty(weight.sizes(), weight.options());
    }
  }

  void add(const at::Tensor& grad_logits, int64_t row, int64_t column) {
    const int64_t n = grad_logits.size(0), c = grad_logits.size(1);
    if (grad_hidden_.defined()) {
      const at::Tensor weights = weight_.narrow(0, column, c);
      at::Tensor grad = grad_hidden_.narrow(0, row, n);
      if (sum_.defined()) {
        at::Tensor sum = sum_.narrow(0, 0, n);
        if (column == 0) sum.zero_();
        sum.add_(at::mm(grad_logits, weights));
        if (column + c == weight_.size(0)) grad.copy_(sum);
      } else if (column == 0) {
        at::mm_out(grad, grad_logits, weights);
      } else {
        grad.addmm_(grad_logits, weights);
      }
    }
    if (grad_weight_.defined()) {
      const at::Tensor rows = hidden_.narrow(0, row, n);
      at::Tensor grad = grad_weight_.narrow(0, column, c);
      if (row == 0) {
        at::mm_out(grad, grad_logits.t(), rows);
      } else {
        grad.addmm_(grad_logits.t(), rows);
      }
    }
  }

  // The gradients; empty tensors for those not requested.
  std::tuple<at::Tensor, at::Tensor> take() const {
    const at::Tensor none = at::empty({0}, hidden_.options());
    return {grad_hidden_.defined() ? grad_hidden_ : none, grad_weight_.defined() ? grad_weight_ : none};
  }

 private:
  at::Tensor hidden_, weight_, grad_hidden_, grad_weight_, sum_;
};

}  // namespace megarl
