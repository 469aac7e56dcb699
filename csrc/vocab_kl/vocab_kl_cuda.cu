// Launchers of vocab_kl and vocab_js on CUDA. See csrc/bindings.cpp for the schemas.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/cuda_launch.h"
#include "vocab_kl/vocab_kl_kernels.cuh"

namespace megarl {
namespace {

namespace kernels = vocab_kl;

at::ScalarType stats_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_pair(const char* op, const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature) {
  check_logits(op, "student", student);
  check_logits(op, "teacher", teacher);
  MEGARL_CHECK(op, student.size(1) <= INT_MAX / 2, "student has ", student.size(1), " columns, more than ", INT_MAX / 2);
  MEGARL_CHECK(op, teacher.sizes() == student.sizes(), "teacher must have shape ", student.sizes(), ", got ",
               teacher.sizes());
  MEGARL_CHECK(op, teacher.scalar_type() == student.scalar_type(), "teacher must be ", student.scalar_type(), ", got ",
               teacher.scalar_type());
  MEGARL_CHECK(op, teacher.device() == student.device(), "teacher is on ", teacher.device(), ", student on ",
               student.device());
  const bool one_temperature = temperature.dim() == 1 && temperature.size(0) == 1;
  check_input(op, "temperature", temperature, one_temperature ? 1 : student.size(0), at::kFloat, student);
}

template <class T>
LogitPairs<T> pairs_of(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature) {
  return {
      .student = static_cast<T*>(const_cast<void*>(student.const_data_ptr())),
      .teacher = static_cast<const T*>(teacher.const_data_ptr()),
      .student_stride = student.stride(0),
      .teacher_stride = teacher.stride(0),
      .columns = static_cast<int>(student.size(1)),
      .num_rows = student.size(0),
      .temperature = temperature.const_data_ptr<float>(),
      .one_temperature = temperature.numel() == 1,
  };
}

template <class T>
RowGrid grid_of(const at::Tensor& student) {
  constexpr int64_t elements_per_block = kernels::kThreads * kPairsInFlight * kVectorSize<T>;
  return row_grid(student, student.size(0), kernels::kBlocksPerSm<T>, elements_per_block);
}

// A contiguous matrix of statistics [R, columns] (columns 0: a vector [R]) in their dtype.
at::Tensor take_stats(const char* op, const char* name, const at::Tensor& stats, int64_t columns,
                      const at::Tensor& student) {
  const bool vector = columns == 0;
  MEGARL_CHECK(op, stats.dim() == (vector ? 1 : 2) && stats.size(0) == student.size(0) &&
                       (vector || stats.size(1) == columns), name, " must have ", student.size(0), " rows",
               vector ? "" : " and ", vector ? std::string() : std::to_string(columns) + " columns", ", got ",
               stats.sizes());
  MEGARL_CHECK(op, stats.scalar_type() == stats_dtype(student), name, " must be ", stats_dtype(student), ", got ",
               stats.scalar_type());
  MEGARL_CHECK(op, stats.device() == student.device(), name, " is on ", stats.device(), ", student on ",
               student.device());
  return stats.contiguous();
}

at::Tensor vocab_kl_cuda(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                         bool /*inplace_backward*/) {
  constexpr const char* op = "vocab_kl";
  check_pair(op, student, teacher, temperature);
  const c10::cuda::CUDAGuard guard(student.device());
  const int64_t rows = student.size(0);
  const auto options = student.options().dtype(stats_dtype(student));
  at::Tensor stats = at::empty({rows, kernels::kNumStats}, options);
  if (rows == 0) return stats;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch_floating(op, "student", student.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto pairs = pairs_of<T>(student, teacher, temperature);
    const RowGrid grid = grid_of<T>(student);
    at::Tensor partial = at::empty({grid.num_splits > 1 ? rows * grid.num_splits * kernels::kNumStats : 0}, options);
    auto* sums = static_cast<kernels::PairSums<acc_t<T>>*>(partial.data_ptr());
    auto* out = stats.mutable_data_ptr<acc_t<T>>();
    kernels::forward<T><<<grid.blocks, kernels::kThreads, 0, stream>>>(pairs, grid.num_splits, out, sums);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (grid.num_splits > 1) {
      kernels::combine_splits<T><<<blocks_for(rows, kernels::kThreads), kernels::kThreads, 0, stream>>>(
          pairs, grid.num_splits, sums, out);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return stats;
}

void vocab_kl_backward_cuda(at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                            const at::Tensor& row_max, const at::Tensor& grad_stats) {
  constexpr const char* op = "vocab_kl_backward_";
  check_pair(op, student, teacher, temperature);
  check_writable(op, "student", student);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor maxima = take_stats(op, "row_max", row_max, 2, student);
  const at::Tensor grads = take_stats(op, "grad_stats", grad_stats, kernels::kNumStats, student);
  if (student.size(0) == 0) return;
  dispatch_floating(op, "student", student.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const RowGrid grid = grid_of<T>(student);
    kernels::backward<T><<<grid.blocks, kernels::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        pairs_of<T>(student, teacher, temperature), grid.num_splits, maxima.const_data_ptr<acc_t<T>>(),
        grads.const_data_ptr<acc_t<T>>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

at::Tensor vocab_js_cuda(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                         const at::Tensor& student_lse, const at::Tensor& teacher_lse, double beta) {
  constexpr const char* op = "vocab_js";
  check_pair(op, student, teacher, temperature);
  MEGARL_CHECK(op, beta >= 0 && beta <= 1, "beta must lie in [0, 1], got ", beta);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor of_student = take_stats(op, "student_lse", student_lse, 0, student);
  const at::Tensor of_teacher = take_stats(op, "teacher_lse", teacher_lse, 0, student);
  const int64_t rows = student.size(0);
  at::Tensor sums = at::empty({rows, 2}, of_student.options());
  if (rows == 0) return sums;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  dispatch_floating(op, "student", student.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const RowGrid grid = grid_of<T>(student);
    at::Tensor partial = at::empty({rows * grid.num_splits * 2}, of_student.options());
    kernels::js_forward<T><<<grid.blocks, kernels::kThreads, 0, stream>>>(
        pairs_of<T>(student, teacher, temperature), grid.num_splits, of_student.const_data_ptr<A>(),
        of_teacher.const_data_ptr<A>(), static_cast<A>(beta), partial.mutable_data_ptr<A>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    kernels::js_combine_splits<T><<<blocks_for(rows, kernels::kThreads), kernels::kThreads, 0, stream>>>(
        rows, grid.num_splits, partial.const_data_ptr<A>(), sums.mutable_data_ptr<A>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return sums;
}

void vocab_js_backward_cuda(at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                            const at::Tensor& student_lse, const at::Tensor& teacher_lse, double beta,
                            const at::Tensor& student_sum, const at::Tensor& grad) {
  constexpr const char* op = "vocab_js_backward_";
  check_pair(op, student, teacher, temperature);
  check_writable(op, "student", student);
  MEGARL_CHECK(op, beta >= 0 && beta <= 1, "beta must lie in [0, 1], got ", beta);
  const c10::cuda::CUDAGuard guard(student.device());
  const at::Tensor of_student = take_stats(op, "student_lse", student_lse, 0, student);
  const at::Tensor of_teacher = take_stats(op, "teacher_lse", teacher_lse, 0, student);
  const at::Tensor first = take_stats(op, "student_sum", student_sum, 0, student);
  const at::Tensor scale = take_stats(op, "grad", grad, 0, student);
  if (student.size(0) == 0) return;
  dispatch_floating(op, "student", student.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const RowGrid grid = grid_of<T>(student);
    kernels::js_backward<T><<<grid.blocks, kernels::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        pairs_of<T>(student, teacher, temperature), grid.num_splits, of_student.const_data_ptr<A>(),
        of_teacher.const_data_ptr<A>(), static_cast<A>(beta), first.const_data_ptr<A>(), scale.const_data_ptr<A>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CUDA, m) {
  m.impl("vocab_kl", &vocab_kl_cuda);
  m.impl("vocab_kl_backward_", &vocab_kl_backward_cuda);
  m.impl("vocab_js", &vocab_js_cuda);
  m.impl("vocab_js_backward_", &vocab_js_backward_cuda);
}

}  // namespace megarl
