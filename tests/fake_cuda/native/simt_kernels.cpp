// MegaRL's own kernels as host code: the SIMT executor (tests/simt) runs what megarl._C launches, on the fake device's
// memory. Compiled with the executor's flags, so that every access is checked against the allocated blocks.
//
// A kernel is found by its mangled name, which nvcc and g++ form alike. One that is missing below is skipped and
// reported like any other; test_kernels.py asks for each that megarl._C registers.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "fake.h"
#include "packing/pack_sequences_kernels.cuh"
#include "policy_loss/policy_loss_kernels.cuh"
#include "segment/segment_reduce_kernels.cuh"
#include "token_logprob/token_logprob_kernels.cuh"
#include "vocab_kl/vocab_kl_kernels.cuh"

extern "C" {
const char* simt_error();
void simt_register(const char* name, const void* data, size_t bytes, int writable);
void simt_forget_buffers();
}

namespace {

// The executor has one state for the process, and this file's code is instrumented: it runs one at a time.
std::mutex& executor = *new std::mutex;
using Guard = std::lock_guard<std::mutex>;

template <class... Types>
struct Parameters {};
template <class First, class... Rest>
struct Parameters<First, Rest...> {
  First first;
  Parameters<Rest...> rest;
};

void read(Parameters<>&, void**) {}
template <class First, class... Rest>
void read(Parameters<First, Rest...>& parameters, void** addresses) {
  std::memcpy(&parameters.first, *addresses, sizeof(First));
  read(parameters.rest, addresses + 1);
}

template <class Kernel, class... Done>
void call(Kernel kernel, const Parameters<>&, const Done&... done) {
  kernel(done...);
}
template <class Kernel, class First, class... Rest, class... Done>
void call(Kernel kernel, const Parameters<First, Rest...>& parameters, const Done&... done) {
  call(kernel, parameters.rest, done..., parameters.first);
}

template <auto kernel>
struct Host;
template <class... Types, void (*kernel)(Types...)>
struct Host<kernel> {
  struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    Parameters<std::decay_t<Types>...> parameters;
  };

  static const char* name() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname) {
      fprintf(stderr, "fakecuda: a kernel has no symbol\n");
      abort();
    }
    return info.dli_sname;
  }

  static void bind(const fakecuda_launch* launch, fakecuda_work* work) {
    Guard guard(executor);
    auto* made = new Launch{{launch->grid[0], launch->grid[1], launch->grid[2]},
                            {launch->block[0], launch->block[1], launch->block[2]},
                            launch->shared_bytes,
                            {}};
    read(made->parameters, launch->arguments);
    *work = {run, made, drop};
  }

  static void run(void* context) {
    Guard guard(executor);
    const Launch& launch = *static_cast<Launch*>(context);
    simt_forget_buffers();
    fakecuda_visit_memory([](void*, void* base, size_t bytes) { simt_register("device memory", base, bytes, 1); }, nullptr);
    const auto parameters = launch.parameters;
    char* readable = abi::__cxa_demangle(name(), nullptr, nullptr, nullptr);
    if (simt::launch(readable, launch.grid, launch.block, launch.shared_bytes, [parameters] { call(kernel, parameters); }))
      fakecuda_device_assert(simt_error());
    free(readable);
  }

  static void drop(void* context) {
    Guard guard(executor);
    delete static_cast<Launch*>(context);
  }
};

template <auto... kernels>
void add() {
  (fakecuda_register_kernel(Host<kernels>::name(), Host<kernels>::bind), ...);
}

template <class T>
void add_float_or_double() {
  using namespace megarl;
  add<&policy_loss::forward<T>, &policy_loss::backward<T>, &policy_loss::sequence_sums<T>>();
}

template <class T>
void add_floating() {
  using namespace megarl;
  add<&token_logprob::forward<T, false>, &token_logprob::forward<T, true>, &token_logprob::backward<T, false>,
      &token_logprob::backward<T, true>, &token_logprob::combine_splits<T>>();
  add<&vocab_kl::forward<T>, &vocab_kl::combine_splits<T>, &vocab_kl::backward<T>, &vocab_kl::js_forward<T>,
      &vocab_kl::js_combine_splits<T>, &vocab_kl::js_backward<T>>();
  add<&segment_reduce::forward<T>, &segment_reduce::backward<T>>();
}

struct Registered {
  Registered() {
    namespace pack = megarl::pack_sequences;
    add<&pack::pack, &pack::unpack<uint16_t>, &pack::unpack<uint32_t>, &pack::unpack<uint64_t>>();
    add_float_or_double<float>();
    add_float_or_double<double>();
    add_floating<float>();
    add_floating<double>();
    add_floating<__nv_bfloat16>();
    add_floating<__half>();
  }
} registered;

}  // namespace
