// Divergences between two distributions over the vocabulary, and their gradients, on CPUs. See
// csrc/bindings.cpp for the schemas and megarl/ops/vocab_kl.py for the formulas.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "common/check.h"
#include "common/logit_rows.h"
#include "common/vec_exp.h"

namespace megarl {
namespace {

constexpr int64_t kNumStats = 6;

template <typename acc>
constexpr acc kLowest = -std::numeric_limits<acc>::infinity();

void check_pair(const char* op, const at::Tensor& student, const at::Tensor& teacher,
                const at::Tensor& temperature) {
  check_logits(op, "student", student);
  check_logits(op, "teacher", teacher);
  MEGARL_CHECK(op, teacher.sizes() == student.sizes(), "teacher must have shape ", student.sizes(), ", got ",
               teacher.sizes());
  MEGARL_CHECK(op, teacher.scalar_type() == student.scalar_type(), "teacher is ", teacher.scalar_type(),
               ", student ", student.scalar_type());
  const int64_t count = temperature.numel() == 1 ? 1 : student.size(0);
  check_vector(op, "temperature", temperature, count, at::kFloat);
  MEGARL_CHECK(op, temperature.is_contiguous(), "temperature must be contiguous");
  const float* values = temperature.const_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    MEGARL_CHECK(op, values[i] > 0 && std::isfinite(values[i]), "temperature[", i,
                 "] must be positive and finite, got ", values[i]);
  }
}

void check_writable(const char* op, const at::Tensor& student) {
  MEGARL_CHECK(op, student.size(0) < 2 || student.stride(0) >= student.size(1),
               "student logits whose rows overlap cannot be overwritten, got strides ", student.strides());
}

float temperature_of(const at::Tensor& temperature, int64_t i) {
  return temperature.const_data_ptr<float>()[temperature.numel() == 1 ? 0 : i];
}

template <typename scalar_t>
scalar_t* row_of(const at::Tensor& logits, int64_t i) {
  return static_cast<scalar_t*>(const_cast<void*>(logits.const_data_ptr())) + i * logits.stride(0);
}

template <typename acc>
acc block_max(const acc* block, int64_t n) {
  using Vec = Vectorized<acc>;
  Vec maximum = Vec::loadu(block);
  for (int64_t i = 0; i < n; i += Vec::size()) maximum = fast_max(maximum, Vec::loadu(block + i));
  return at::vec::vec_reduce_all<acc>([](Vec a, Vec b) { return fast_max(a, b); }, maximum);
}

// If a weight is 0 its term is 0, whatever the other factor.
template <typename Vec>
Vec weigh(Vec weight, Vec value) {
  return Vec::blendv(weight * value, Vec(0), weight == Vec(0));
}

template <typename acc>
double total(Vectorized<acc> values) {
  using Vec = Vectorized<acc>;
  return at::vec::vec_reduce_all<acc>([](Vec a, Vec b) { return a + b; }, values);
}

// Running sums of one row, shifted by the maxima seen so far.
struct KlSums {
  double student_max, teacher_max;
  double student, teacher;          // sums of exp(ds), exp(dt)
  double reverse, forward;          // sums of exp(ds) (ds - dt), exp(dt) (dt - ds)

  void raise_maxima(double new_student, double new_teacher, double scale) {
    const double ds = shift(student_max, new_student, scale), dt = shift(teacher_max, new_teacher, scale);
    reverse = std::exp(ds) * (reverse + (ds - dt) * student);
    forward = std::exp(dt) * (forward + (dt - ds) * teacher);
    student *= std::exp(ds);
    teacher *= std::exp(dt);
    student_max = std::max(student_max, new_student);
    teacher_max = std::max(teacher_max, new_teacher);
  }

  static double shift(double from, double to, double scale) {
    return from < to && from != kLowest<double> ? (from - to) * scale : 0.0;
  }
};

template <typename scalar_t>
void row_stats(const scalar_t* student, const scalar_t* teacher, int64_t columns, float temperature,
               acc_t<scalar_t>* stats) {
  using acc = acc_t<scalar_t>;
  using Vec = Vectorized<acc>;
  alignas(64) acc buffers[2][kBlock];
  const ShiftedExp<acc> shifted_exp(acc(1) / temperature);
  const double scale = shifted_exp.scale;
  KlSums sums{kLowest<double>, kLowest<double>, 0, 0, 0, 0};
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = std::min(kBlock, columns - begin), end = padded<acc>(n);
    const acc* x = load_block<scalar_t>(student + begin, n, std::nullopt, buffers[0]);
    const acc* y = load_block<scalar_t>(teacher + begin, n, std::nullopt, buffers[1]);
    sums.raise_maxima(block_max(x, end), block_max(y, end), scale);
    // No finite logit so far: any shift works, all weights are 0.
    const Vec student_shift(sums.student_max == kLowest<double> ? acc(0) : static_cast<acc>(sums.student_max));
    const Vec teacher_shift(sums.teacher_max == kLowest<double> ? acc(0) : static_cast<acc>(sums.teacher_max));
    const Vec clamp(shifted_exp.clamp);
    Vec student_sum(0), teacher_sum(0), reverse(0), forward(0);
    for (int64_t i = 0; i < end; i += Vec::size()) {
      const Vec ds = Vec::loadu(x + i) - student_shift, dt = Vec::loadu(y + i) - teacher_shift;
      const Vec p = shifted_exp(fast_max(clamp, ds)), q = shifted_exp(fast_max(clamp, dt));
      student_sum = student_sum + p;
      teacher_sum = teacher_sum + q;
      reverse = reverse + weigh(p, ds - dt);
      forward = forward + weigh(q, dt - ds);
    }
    sums.student += total<acc>(student_sum);
    sums.teacher += total<acc>(teacher_sum);
    sums.reverse += total<acc>(reverse) * scale;
    sums.forward += total<acc>(forward) * scale;
  }
  const double values[kNumStats] = {sums.student_max, sums.student, sums.teacher_max,
                                    sums.teacher,     sums.reverse, sums.forward};
  for (int64_t k = 0; k < kNumStats; ++k) stats[k] = static_cast<acc>(values[k]);
}

at::Tensor vocab_kl_cpu(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                        bool /*inplace_backward*/) {
  check_pair("vocab_kl", student, teacher, temperature);
  const int64_t rows = student.size(0), columns = student.size(1);
  at::Tensor stats = at::empty({rows, kNumStats}, student.options().dtype(stats_dtype(student.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, student.scalar_type(), "vocab_kl", [&] {
    auto* out = stats.mutable_data_ptr<acc_t<scalar_t>>();
    for_rows(rows, columns, [&](int64_t i) {
      row_stats(row_of<scalar_t>(student, i), row_of<scalar_t>(teacher, i), columns,
                temperature_of(temperature, i), out + i * kNumStats);
    });
  });
  return stats;
}

// Overwrites a row of student logits with gradient(x, y), block by block.
template <typename scalar_t, typename F>
void overwrite_row(scalar_t* student, const scalar_t* teacher, int64_t columns, const F& gradient) {
  using acc = acc_t<scalar_t>;
  using Vec = Vectorized<acc>;
  alignas(64) acc buffers[3][kBlock];
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = std::min(kBlock, columns - begin);
    const acc* x = load_block<scalar_t>(student + begin, n, std::nullopt, buffers[0]);
    const acc* y = load_block<scalar_t>(teacher + begin, n, std::nullopt, buffers[1]);
    for (int64_t i = 0; i < padded<acc>(n); i += Vec::size()) {
      gradient(Vec::loadu(x + i), Vec::loadu(y + i)).store(buffers[2] + i);
    }
    store_block<scalar_t>(buffers[2], student + begin, n);
  }
}

void vocab_kl_backward_cpu(at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                           const at::Tensor& row_max, const at::Tensor& grad_stats) {
  constexpr const char* op = "vocab_kl_backward_";
  check_pair(op, student, teacher, temperature);
  check_writable(op, student);
  const int64_t rows = student.size(0), columns = student.size(1);
  const auto dtype = stats_dtype(student.scalar_type());
  MEGARL_CHECK(op, row_max.dim() == 2 && row_max.size(0) == rows && row_max.size(1) == 2 &&
                       row_max.scalar_type() == dtype,
               "row_max must be ", dtype, " [", rows, ", 2], got ", row_max.scalar_type(), " ", row_max.sizes());
  MEGARL_CHECK(op, grad_stats.dim() == 2 && grad_stats.size(0) == rows && grad_stats.size(1) == kNumStats &&
                       grad_stats.scalar_type() == dtype,
               "grad_stats must be ", dtype, " [", rows, ", ", kNumStats, "], got ", grad_stats.scalar_type(), " ",
               grad_stats.sizes());
  const at::Tensor maxima = row_max.contiguous(), grads = grad_stats.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, student.scalar_type(), op, [&] {
    using acc = acc_t<scalar_t>;
    using Vec = Vectorized<acc>;
    for_rows(rows, columns, [&](int64_t i) {
      const acc* maximum = maxima.const_data_ptr<acc>() + 2 * i;
      const acc* grad = grads.const_data_ptr<acc>() + kNumStats * i;
      const ShiftedExp<acc> shifted_exp(acc(1) / temperature_of(temperature, i));
      const acc scale = shifted_exp.scale;
      // a shard whose logits are all -inf contributes nothing: with a finite shift its weights are 0
      const Vec student_shift(maximum[0] == kLowest<acc> ? acc(0) : maximum[0]);
      const Vec teacher_shift(maximum[1] == kLowest<acc> ? acc(0) : maximum[1]), clamp(shifted_exp.clamp);
      const Vec constant((grad[1] + grad[4]) * scale), slope(grad[4] * scale * scale), other(grad[5] * scale);
      // d/dx: exp(ds) (g_sum + g_reverse (1 + ds - dt)) - exp(dt) g_forward, over the temperature
      overwrite_row(row_of<scalar_t>(student, i), row_of<scalar_t>(teacher, i), columns, [&](Vec x, Vec y) {
        const Vec ds = x - student_shift, dt = y - teacher_shift;
        const Vec p = shifted_exp(fast_max(clamp, ds)), q = shifted_exp(fast_max(clamp, dt));
        // without a reverse part, an infinite ds - dt must not be multiplied by a slope of 0
        const Vec sloped = grad[4] == 0 ? p * constant : weigh(p, at::vec::fmadd(ds - dt, slope, constant));
        return sloped - q * other;
      });
    });
  });
}

// A column of both distributions and their mixture M. log_student is undefined where p is 0, log_teacher where q
// is 0.
template <typename acc>
struct Mixture {
  using Vec = Vectorized<acc>;

  Vec p, q, log_student, log_teacher;  // probabilities, log(p / M), log(q / M)

  Mixture(Vec x, Vec y, acc student_lse, acc teacher_lse, acc scale, const ShiftedExp<acc>& natural, acc beta) {
    const Vec clamp(natural.clamp);
    const Vec log_p = x * Vec(scale) - Vec(student_lse), log_q = y * Vec(scale) - Vec(teacher_lse);
    p = natural(fast_max(clamp, log_p));
    q = natural(fast_max(clamp, log_q));
    const Vec mixture = Vec(1 - beta) * p + Vec(beta) * q;
    const Vec log_mixture = mixture.log();
    log_student = log_p - log_mixture;
    log_teacher = log_q - log_mixture;
  }
};

void check_js(const char* op, const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
              const at::Tensor& student_lse, const at::Tensor& teacher_lse, double beta) {
  check_pair(op, student, teacher, temperature);
  const auto dtype = stats_dtype(student.scalar_type());
  check_vector(op, "student_lse", student_lse, student.size(0), dtype);
  check_vector(op, "teacher_lse", teacher_lse, student.size(0), dtype);
  MEGARL_CHECK(op, beta > 0 && beta < 1, "beta must lie between 0 and 1, got ", beta);
}

at::Tensor vocab_js_cpu(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                        const at::Tensor& student_lse, const at::Tensor& teacher_lse, double beta) {
  constexpr const char* op = "vocab_js";
  check_js(op, student, teacher, temperature, student_lse, teacher_lse, beta);
  const int64_t rows = student.size(0), columns = student.size(1);
  at::Tensor sums = at::empty({rows, 2}, student_lse.options());
  const at::Tensor student_lses = student_lse.contiguous(), teacher_lses = teacher_lse.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, student.scalar_type(), op, [&] {
    using acc = acc_t<scalar_t>;
    using Vec = Vectorized<acc>;
    const ShiftedExp<acc> natural(acc(1));
    for_rows(rows, columns, [&](int64_t row) {
      alignas(64) acc buffers[2][kBlock];
      const acc scale = acc(1) / temperature_of(temperature, row);
      double from_student = 0, from_teacher = 0;
      for (int64_t begin = 0; begin < columns; begin += kBlock) {
        const int64_t n = std::min(kBlock, columns - begin);
        const acc* x = load_block<scalar_t>(row_of<scalar_t>(student, row) + begin, n, std::nullopt, buffers[0]);
        const acc* y = load_block<scalar_t>(row_of<scalar_t>(teacher, row) + begin, n, std::nullopt, buffers[1]);
        Vec student_sum(0), teacher_sum(0);
        for (int64_t i = 0; i < padded<acc>(n); i += Vec::size()) {
          const Mixture<acc> m(Vec::loadu(x + i), Vec::loadu(y + i), student_lses.const_data_ptr<acc>()[row],
                               teacher_lses.const_data_ptr<acc>()[row], scale, natural, static_cast<acc>(beta));
          student_sum = student_sum + weigh(m.p, m.log_student);
          teacher_sum = teacher_sum + weigh(m.q, m.log_teacher);
        }
        from_student += total<acc>(student_sum);
        from_teacher += total<acc>(teacher_sum);
      }
      acc* out = sums.mutable_data_ptr<acc>() + 2 * row;
      out[0] = static_cast<acc>(from_student);
      out[1] = static_cast<acc>(from_teacher);
    });
  });
  return sums;
}

void vocab_js_backward_cpu(at::Tensor& student, const at::Tensor& teacher, const at::Tensor& temperature,
                           const at::Tensor& student_lse, const at::Tensor& teacher_lse, double beta,
                           const at::Tensor& student_sum, const at::Tensor& grad) {
  constexpr const char* op = "vocab_js_backward_";
  check_js(op, student, teacher, temperature, student_lse, teacher_lse, beta);
  check_writable(op, student);
  const int64_t rows = student.size(0), columns = student.size(1);
  const auto dtype = stats_dtype(student.scalar_type());
  check_vector(op, "student_sum", student_sum, rows, dtype);
  check_vector(op, "grad", grad, rows, dtype);
  const at::Tensor student_lses = student_lse.contiguous(), teacher_lses = teacher_lse.contiguous();
  const at::Tensor sums = student_sum.contiguous(), grads = grad.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, student.scalar_type(), op, [&] {
    using acc = acc_t<scalar_t>;
    using Vec = Vectorized<acc>;
    const ShiftedExp<acc> natural(acc(1));
    for_rows(rows, columns, [&](int64_t row) {
      const acc scale = acc(1) / temperature_of(temperature, row);
      const Vec factor(grads.const_data_ptr<acc>()[row] * scale * static_cast<acc>(1 - beta));
      const Vec mean(sums.const_data_ptr<acc>()[row]);
      // (1 - beta) p (log(p / M) - sum_k p_k log(p_k / M_k))
      overwrite_row(row_of<scalar_t>(student, row), row_of<scalar_t>(teacher, row), columns, [&](Vec x, Vec y) {
        const Mixture<acc> m(x, y, student_lses.const_data_ptr<acc>()[row],
                             teacher_lses.const_data_ptr<acc>()[row], scale, natural, static_cast<acc>(beta));
        return weigh(m.p, m.log_student - mean) * factor;
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megarl, CPU, m) {
  m.impl("vocab_kl", &vocab_kl_cpu);
  m.impl("vocab_kl_backward_", &vocab_kl_backward_cpu);
  m.impl("vocab_js", &vocab_js_cpu);
  m.impl("vocab_js_backward_", &vocab_js_backward_cpu);
}

}  // namespace megarl
